"""Documents to tokens, once: a directory holds the flat ids and the offsets of the documents, or does not exist.

A document is a text between the tokenizer's marks of a start and an end; or a conversation as the chat template renders
it, whose store has the mask of what is supervised beside the ids; or a unit of preferences, two such conversations
whose common prompt is there once, with what is known of them. The order of the documents is a keyed shuffle of the
source's, task by task.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxllm.data import units
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.examples import TRAIN, VALIDATION, Example, labelled, resolved
from jaxllm.data.selection import selected
from jaxllm.data.sources import DocumentSource
from jaxllm.text import chat
from jaxllm.text.tokenizer import Tokenizer

_FORMAT = 1  # raise it when the same source would give other files
_ELSEWHERE = ("path", "field", "validation_path", "weights", "packing", "balance")  # in the fingerprint, or in no file
_CHUNK_BYTES = 1 << 22
_PARTIAL = f".partial-{os.uname().nodename}-"  # between the name of a place and a random one
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that its multiples visit every uint64


@dataclass(frozen=True)
class TokenStore:
    """Tokens of one side of one source, on disk.

    num_bytes: UTF-8 bytes of what is supervised, special tokens counting none. report: counts of what was kept and
    dropped, and why. chat: whether these are conversations. tasks: documents of each, where a tag tells them apart.
    paired: whether they are units of preferences.
    """

    directory: Path
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    fingerprint: str
    report: dict[str, Any]
    chat: bool = False
    tasks: dict[str, int] = field(default_factory=dict)
    paired: bool = False

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Flat ids, uint16 or uint32, mapped from the file."""
        return mapped(self.directory / "tokens.bin", self.dtype, self.num_tokens)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64, one more than documents: document i is tokens[offsets[i]:offsets[i + 1]]."""
        return mapped(self.directory / "offsets.bin", "int64", self.num_documents + 1)

    @functools.cached_property
    def supervised(self) -> np.ndarray | None:
        """bool per token of conversations; None of texts, in which every token is."""
        return mapped(self.directory / "supervised.bin", "bool", self.num_tokens) if self.chat else None

    @functools.cached_property
    def units(self) -> np.ndarray | None:
        """A `units.UNIT` for each document of preferences; None of others."""
        return mapped(self.directory / "units.bin", units.UNIT, self.num_documents) if self.paired else None

    @property
    def offsets_of_tasks(self) -> dict[str, np.ndarray]:
        """The part of `offsets` of each task; of "" where there are none."""
        tasks = self.tasks or {"": self.num_documents}
        starts = np.cumsum([0, *tasks.values()])
        return {task: self.offsets[start : start + tasks[task] + 1] for task, start in zip(tasks, starts, strict=False)}

    def __reduce__(self):
        return open_store, (self.directory,)  # to another process goes the place, not the tokens


class Split(NamedTuple):
    """The two sides of a source."""

    train: TokenStore
    validation: TokenStore


def prepare(config: DataConfig, tokenizer: Tokenizer, *, directory: str | os.PathLike) -> dict[str, Split]:
    """Tokenises every source of the config that `directory` does not hold yet, and opens them all.

    Raises ValueError or FileNotFoundError for a source that cannot be read, or that leaves a side without documents.
    """
    return {
        name: _prepared(name, source, config, tokenizer, Path(directory)) for name, source in config.sources.items()
    }


def training_texts(config: DataConfig) -> Iterator[str]:
    """Texts of the training documents, from the sources in turn: what a tokenizer may learn from."""
    streams = [
        (example.text for label, example in _selected(resolved(source), config) if label == TRAIN)
        for source in config.sources.values()
    ]
    while streams:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                yield text


def open_store(directory: Path) -> TokenStore:
    """Raises ValueError where a file is missing, or not as long as the description says."""
    try:
        description = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        store = TokenStore(directory=directory, **description)
        store.tokens, store.offsets, store.supervised, store.units  # noqa: B018  mapping them checks their length
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the token cache {directory.parent} is damaged ({error}): delete it") from error
    return store


def _prepared(name: str, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, directory: Path) -> Split:
    source = resolved(source)
    held_out = DocumentSource(source.validation_path, source.field).fingerprint if source.validation_path else ""
    rule = [held_out] if held_out else [config.split, config.validation]
    content = [_FORMAT, DocumentSource(source.path, source.field).fingerprint, tokenizer.fingerprint, *rule]
    fingerprint = hashlib.sha256(json.dumps(content + _options(source)).encode()).hexdigest()
    place = directory / f"{name}-{fingerprint[:16]}"
    if not place.is_dir():
        write_whole(place, lambda partial: _tokenise(name, source, config, tokenizer, partial, fingerprint))
    return Split(*(open_store(place / side) for side in (TRAIN, VALIDATION)))


def _options(source: SourceConfig) -> list[tuple[str, Any]]:
    """What decides the tokens and is not at its default: a new option leaves the caches that do not use it valid."""
    values = ((option, getattr(source, option.name)) for option in fields(source) if option.name not in _ELSEWHERE)
    template = [("template", chat.JINJA)] if source.is_chat else []
    layout = [("units", units.FORMAT)] if source.is_preference else []
    return [(option.name, value) for option, value in values if value != option.default] + template + layout


def write_whole(place: Path, write: Callable[[Path], None]) -> None:
    """Runs `write` in a directory beside `place` and renames it: what bears the name is whole, whoever was killed.

    What those leave goes when somebody writes beside it again, and nobody else of this host does.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with _writing_in(place.parent):
        partial = place.with_name(f"{place.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")
        partial.mkdir()
        try:
            write(partial)
            try:
                partial.rename(place)
            except OSError:
                if not place.is_dir():  # else another process was faster, with the same content
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _writing_in(directory: Path) -> Iterator[None]:
    """Shares a lock on the directory, which ends with the process; who has it alone removes what the dead left there.

    File systems may keep locks from other hosts, or have none: so others' partials stay, and without locks all do.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for dead in directory.glob(f"*{_PARTIAL}*"):
                shutil.rmtree(dead, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _tokenise(
    name: str, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, directory: Path, fingerprint: str
) -> None:
    counts = Counter()
    with contextlib.ExitStack() as stack, _progress() as progress:
        writers = {
            side: stack.enter_context(contextlib.closing(_Writer(directory / side, tokenizer, source)))
            for side in (TRAIN, VALIDATION)
        }
        total = DocumentSource(source.path, source.field).num_bytes
        task = progress.add_task(f"tokenise {name} ({source.format})", total=total, documents=0, tokens=0)
        for chunk in _chunks(_selected(source, config)):
            counts.update(label for label, _ in chunk)
            kept = [(label, example) for label, example in chunk if label in writers]
            rendered = _kept([example.content for _, example in kept], tokenizer, source)
            for (label, example), document in zip(kept, rendered, strict=True):
                if isinstance(document, chat.Malformed):
                    counts.subtract([label])
                    counts.update([document.reason])
                else:
                    writers[label].append(example, document)
            tokens = sum(writer.num_tokens for writer in writers.values())
            progress.update(task, completed=chunk[-1][1].read, documents=counts.total(), tokens=tokens)
    dropped = {label: count for label, count in sorted(counts.items()) if label not in writers}
    _check_sides(name, source, config, counts, dropped)
    for side, writer in writers.items():
        report = {f"dropped_{label}": count for label, count in dropped.items()}
        writer.finish(hashlib.sha256(f"{fingerprint} {side}".encode()).hexdigest(), report)


def _check_sides(name: str, source: SourceConfig, config: DataConfig, counts: Counter, dropped: dict[str, int]) -> None:
    wanted = [TRAIN] + [VALIDATION] * bool(config.validation or source.validation_path)
    lost, mend = (f" (dropped: {dropped})", "mend what is dropped, ") if dropped else ("", "")
    for side in wanted:
        if not counts[side]:
            raise ValueError(
                f"source {name!r} ({source.path}) has {counts.total()} documents{lost}, and none for {side} with "
                f"split={config.split!r}, validation={config.validation}: {mend}change validation, give a "
                "validation_path, or use split='tail' for a single document"
            )


def _selected(source: SourceConfig, config: DataConfig) -> Iterator[tuple[str, Example]]:
    return selected(functools.partial(labelled, source, config), source)


def _kept(contents: list, tokenizer: Tokenizer, source: SourceConfig) -> list:
    """Each content as ids, or why a tokenizer's own template refuses it, where that is no error of the run."""
    try:
        return _rendered(contents, tokenizer, source)
    except chat.Malformed as error:
        if source.on_error == "raise":
            raise error.or_skip() from error
        if len(contents) == 1:
            return [error]
    half = len(contents) // 2
    return [*_kept(contents[:half], tokenizer, source), *_kept(contents[half:], tokenizer, source)]


def _rendered(
    contents: list, tokenizer: Tokenizer, source: SourceConfig
) -> list[chat.Rendered] | list[units.RenderedUnit]:
    if source.is_preference:
        return units.render(contents, tokenizer)
    if source.is_chat:
        return chat.render(contents, tokenizer, turns=source.turns)
    return [chat.Rendered(tokens, np.ones(len(tokens), bool)) for tokens in tokenizer.documents(contents)]


def _chunks(labelled: Iterator[tuple[str, Example]]) -> Iterator[list[tuple[str, Example]]]:
    """Enough documents at a time to keep every thread busy, few enough to stay in memory."""
    chunk, size = [], 0
    for label, example in labelled:
        chunk.append((label, example))
        size += len(example.text) + 64
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Writer:
    """Takes documents in the order of the source, and leaves them in the order of their tasks and keys."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, source: SourceConfig):
        directory.mkdir()
        self.directory, self.source = directory, source
        self.dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
        self.num_tokens = self.num_bytes = 0
        self._byte_lengths_V = tokenizer.byte_lengths_V
        self._columns = {"tokens": self.dtype} | ({"supervised": np.dtype(bool)} if source.is_chat else {})
        self._arrived = {name: (directory / f"{name}.arrived").open("wb") for name in self._columns}
        self._keys, self._offsets, self._tasks = array("Q"), array("q", [0]), []
        self._units: list[tuple] = []

    def append(self, example: Example, document: chat.Rendered | units.RenderedUnit) -> None:
        for name, file in self._arrived.items():
            file.write(getattr(document, name).astype(self._columns[name]))
        self.num_tokens += len(document.tokens)
        self.num_bytes += int(self._byte_lengths_V[document.tokens[document.supervised]].sum())
        # duplicates share their content key: the count tells them apart, so that they do not end up side by side
        self._keys.append((example.key + len(self._keys) * _GOLDEN) % 2**64)
        self._offsets.append(self.num_tokens)
        self._tasks.append(example.task)
        if self.source.is_preference:
            self._units.append(document.numbers)

    def close(self) -> None:
        for file in self._arrived.values():
            file.close()

    def finish(self, fingerprint: str, dropped: dict[str, int]) -> None:
        offsets, tasks = np.array(self._offsets, np.int64), Counter(self._tasks)
        place = {task: index for index, task in enumerate(sorted(tasks))}
        order = np.lexsort((np.array(self._keys, np.uint64), [place[task] for task in self._tasks]))
        for name, dtype in self._columns.items():
            path = Path(self._arrived[name].name)
            arrived = mapped(path, dtype, self.num_tokens)
            # written, not mapped: on a full disk a write fails, a mapped page kills the process
            with (self.directory / f"{name}.bin").open("wb") as file:
                for index in order:
                    file.write(arrived[offsets[index] : offsets[index + 1]])
            path.unlink()
        with (self.directory / "offsets.bin").open("wb") as file:
            file.write(np.concatenate([[0], np.cumsum(np.diff(offsets)[order])]).astype(np.int64))
        if self.source.is_preference:
            (self.directory / "units.bin").write_bytes(np.array(self._units, units.UNIT)[order].tobytes())
        counts = dict(num_documents=len(order), num_tokens=self.num_tokens, num_bytes=self.num_bytes)
        report = counts | dropped
        options = {}
        if self.source.is_chat:
            options["chat"] = True
            report["format"] = self.source.format
        if self.source.is_preference:
            options["paired"] = True
        if self.source.tag:
            options["tasks"] = report["tasks"] = {task: tasks[task] for task in place}
        description = dict(dtype=self.dtype.name, fingerprint=fingerprint, report=report, **counts, **options)
        (self.directory / "store.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def mapped(path: Path, dtype: str | np.dtype, length: int) -> np.ndarray:
    size = length * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {size}")
    # a plain view: the subclass costs more than the reads
    return np.asarray(np.memmap(path, dtype, "r", shape=(length,))) if length else np.zeros(0, dtype)


def _progress() -> Progress:
    columns = "{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeRemainingColumn()
    counts = TextColumn("{task.fields[documents]:,} documents  {task.fields[tokens]:,} tokens")
    return Progress(*columns, counts, console=Console(stderr=True), disable=not sys.stderr.isatty())
