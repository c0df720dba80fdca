"""Documents to tokens, once: a directory holds the flat ids and the offsets of the documents, or does not exist.

A document is BOS, its text, EOS. Whether it is held out depends on its content alone, so that a duplicate never lies on
both sides. The order of the documents is a keyed shuffle of the source's.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.sources import Document, DocumentSource
from jaxllm.text.special_tokens import BOS_ID, EOS_ID
from jaxllm.text.tokenizer import Tokenizer

TRAIN, VALIDATION = "train", "validation"
_FORMAT = 1  # raise it when the same source would give other files
_CHUNK_BYTES = 1 << 22
_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that its multiples visit every uint64


@dataclass(frozen=True)
class TokenStore:
    """Tokens of one side of one source, on disk.

    num_bytes: UTF-8 bytes of the text, BOS and EOS counting none. report: counts of what was kept and dropped, and why.
    """

    directory: Path
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    fingerprint: str
    report: dict[str, int]

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Flat ids, uint16 or uint32, mapped from the file."""
        return _mapped(self.directory / "tokens.bin", self.dtype, self.num_tokens)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64, one more than documents: document i is tokens[offsets[i]:offsets[i + 1]]."""
        return _mapped(self.directory / "offsets.bin", "int64", self.num_documents + 1)

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
        (document.text for label, document in _labelled(source, config) if label == TRAIN)
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
        store.tokens, store.offsets  # noqa: B018  mapping them checks their length
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the token cache {directory.parent} is damaged ({error}): delete it") from error
    return store


def _prepared(name: str, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, directory: Path) -> Split:
    held_out = DocumentSource(source.validation_path, source.field).fingerprint if source.validation_path else ""
    rule = [held_out] if held_out else [config.split, config.validation]
    content = [_FORMAT, DocumentSource(source.path, source.field).fingerprint, tokenizer.fingerprint, *rule]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    place = directory / f"{name}-{fingerprint[:16]}"
    if not place.is_dir():
        _write_whole(place, lambda partial: _tokenise(name, source, config, tokenizer, partial, fingerprint))
    return Split(*(open_store(place / side) for side in (TRAIN, VALIDATION)))


def _write_whole(place: Path, write: Callable[[Path], None]) -> None:
    """Runs `write` in a directory beside `place` and renames it: what bears the name is whole, whoever was killed."""
    partial = place.with_name(f"{place.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        write(partial)
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tokenise(
    name: str, source: SourceConfig, config: DataConfig, tokenizer: Tokenizer, directory: Path, fingerprint: str
) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    counts = Counter()
    with contextlib.ExitStack() as stack, _progress() as progress:
        sides = (TRAIN, VALIDATION)
        writers = {side: stack.enter_context(contextlib.closing(_Writer(directory / side, dtype))) for side in sides}
        total = DocumentSource(source.path, source.field).num_bytes
        task = progress.add_task(f"tokenise {name}", total=total, documents=0, tokens=0)
        for chunk in _chunks(_labelled(source, config)):
            counts.update(label for label, _ in chunk)
            kept = [(label, document.text) for label, document in chunk if label in writers]
            encoded = tokenizer.encode_batch([text for _, text in kept])
            for (label, text), tokens in zip(kept, encoded, strict=True):
                writers[label].append(text, tokens)
            tokens = sum(writer.num_tokens for writer in writers.values())
            progress.update(task, completed=chunk[-1][1].read, documents=counts.total(), tokens=tokens)
    _check_sides(name, source, config, counts)
    dropped = {f"dropped_{label}": count for label, count in sorted(counts.items()) if label not in writers}
    for side, writer in writers.items():
        writer.finish(hashlib.sha256(f"{fingerprint} {side}".encode()).hexdigest(), dropped)


def _check_sides(name: str, source: SourceConfig, config: DataConfig, counts: Counter) -> None:
    wanted = [TRAIN] + [VALIDATION] * bool(config.validation or source.validation_path)
    for side in wanted:
        if not counts[side]:
            raise ValueError(
                f"source {name!r} ({source.path}) has {counts.total()} documents, and none for {side} with "
                f"split={config.split!r}, validation={config.validation}: change validation, give a validation_path, "
                "or use split='tail' for a single document"
            )


def _labelled(source: SourceConfig, config: DataConfig) -> Iterator[tuple[str, Document]]:
    """Each document with its side, or with the reason for which it is dropped."""
    documents = DocumentSource(source.path, source.field).documents()
    if source.validation_path:
        held_out = DocumentSource(source.validation_path, source.field).documents()
        labelled = _split_by_path(documents, held_out)
    else:
        labelled = _SPLITS[config.split](documents, config.validation)
    return ((label if document.text else "empty", document) for label, document in labelled)


def _split_by_document(documents: Iterator[Document], share: float) -> Iterator[tuple[str, Document]]:
    for document in documents:
        yield VALIDATION if _content_key(document.text) < share * 2**64 else TRAIN, document


def _split_tail(documents: Iterator[Document], share: float) -> Iterator[tuple[str, Document]]:
    """The last `share` of the bytes of the only document; the cut never lies inside a character."""
    document, *more = itertools.islice(documents, 2)
    if more:
        raise ValueError("split='tail' holds out the end of the only document, the source has more: use 'document'")
    data = document.text.encode()
    head = data[: int(len(data) * (1 - share))].decode(errors="ignore")
    yield TRAIN, Document(head, document.read)
    if share:
        yield VALIDATION, Document(document.text[len(head) :], document.read)


def _split_by_path(documents: Iterator[Document], held_out: Iterator[Document]) -> Iterator[tuple[str, Document]]:
    keys = set()
    for document in held_out:
        keys.add(_content_key(document.text))
        yield VALIDATION, document._replace(read=0)
    for document in documents:
        yield "in_validation" if _content_key(document.text) in keys else TRAIN, document


_SPLITS = {"document": _split_by_document, "tail": _split_tail}


def _content_key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=b"jaxllm").digest(), "little")


def _chunks(labelled: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Enough documents at a time to keep every thread busy, few enough to stay in memory."""
    chunk, size = [], 0
    for label, document in labelled:
        chunk.append((label, document))
        size += len(document.text) + 64
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Writer:
    """Takes documents in the order of the source, and leaves them in the order of their keys."""

    def __init__(self, directory: Path, dtype: str):
        directory.mkdir()
        self.directory, self.dtype = directory, np.dtype(dtype)
        self.num_tokens = self.num_bytes = 0
        self._arrived = (directory / "arrived.bin").open("wb")
        self._keys, self._offsets = array("Q"), array("q", [0])

    def append(self, text: str, tokens: np.ndarray) -> None:
        self._arrived.write(np.concatenate([[BOS_ID], tokens, [EOS_ID]]).astype(self.dtype))
        self.num_tokens += len(tokens) + 2
        self.num_bytes += len(text.encode())
        # duplicates share their content key: the count tells them apart, so that they do not end up side by side
        self._keys.append((_content_key(text) + len(self._keys) * _GOLDEN) % 2**64)
        self._offsets.append(self.num_tokens)

    def close(self) -> None:
        self._arrived.close()

    def finish(self, fingerprint: str, dropped: dict[str, int]) -> None:
        path = Path(self._arrived.name)
        arrived = _mapped(path, self.dtype, self.num_tokens)
        offsets = np.array(self._offsets, np.int64)
        order = np.argsort(np.array(self._keys, np.uint64), kind="stable")
        # written, not mapped: on a full disk a write fails, a mapped page kills the process
        with (self.directory / "tokens.bin").open("wb") as file:
            for index in order:
                file.write(arrived[offsets[index] : offsets[index + 1]])
        with (self.directory / "offsets.bin").open("wb") as file:
            file.write(np.concatenate([[0], np.cumsum(np.diff(offsets)[order])]).astype(np.int64))
        path.unlink()
        counts = dict(num_documents=len(order), num_tokens=self.num_tokens, num_bytes=self.num_bytes)
        description = dict(dtype=self.dtype.name, fingerprint=fingerprint, report={**counts, **dropped}, **counts)
        (self.directory / "store.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _mapped(path: Path, dtype: str | np.dtype, length: int) -> np.ndarray:
    size = length * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {size}")
    # a plain view: the subclass costs more than the reads
    return np.asarray(np.memmap(path, dtype, "r", shape=(length,))) if length else np.zeros(0, dtype)


def _progress() -> Progress:
    columns = "{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TimeRemainingColumn()
    counts = TextColumn("{task.fields[documents]:,} documents  {task.fields[tokens]:,} tokens")
    return Progress(*columns, counts, console=Console(stderr=True), disable=not sys.stderr.isatty())
