"""An ordinary run directory out of other people's model: every stage, evaluation and chat takes it by its name.

It is made beside its place and renamed there last, so that half of one is never taken for a run.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from jaxllm import checkpoint, interop, tree, workdir
from jaxllm.interop import gguf, hf
from jaxllm.model import DecoderConfig
from jaxllm.model.config import COMPUTATION
from jaxllm.text.tokenizer import Tokenizer


class Imported(NamedTuple):
    """What a run directory was made of. parameters: how many numbers."""

    config: DecoderConfig
    tokenizer: Tokenizer
    parameters: int


def make(directory: str | os.PathLike, values: Mapping[str, Any], source: str | os.PathLike) -> Imported | None:
    """Makes the run directory of a Hugging Face folder's or a GGUF file's model; None where it is that already.

    ``values`` are a whole config; its ``model`` and ``tokenizer`` become the source's, but for how a model is computed.
    The checkpoint 0 holds float32 parameters. Raises ``ValueError`` where the directory holds something else, or the
    source something that we do not have.
    """
    directory, source = Path(directory).expanduser().absolute(), Path(source).expanduser().absolute()
    found = interop.kind(source)
    if found == "run":
        raise ValueError(f"{source} is a run directory already: name it as --workdir, or as config.start")
    origin = _origin(source)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if _made_of(directory) == origin:
            return None
        raise ValueError(f"{directory} exists and holds something else than {source}; use another --workdir")
    computed = {key: values["model"][key] for key in COMPUTATION}
    with interop.beside(directory) as place:
        return _fill(place, values, source, gguf if found == "gguf" else hf, computed, {"imported": origin})


def _fill(directory: Path, values: Mapping, source: Path, format, computed: Mapping, data: Mapping) -> Imported:
    tokenizer = interop.read_tokenizer(source)
    with _bar() as bar:
        task = bar.add_task(source.name, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        config, params = format.read(source, progress=progress, **computed)
    config.with_vocabulary(tokenizer.vocab_size)  # refuses ids without a row
    tokenizer.save(directory / "tokenizer")
    described = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "path": ""}
    values = {**values, "model": dataclasses.asdict(config), "tokenizer": {**values["tokenizer"], **described}}
    meta = {"tokenizer": tokenizer.fingerprint, "data": data, "config": values}
    with checkpoint.open(directory / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": params}, position=None, meta=meta)
    workdir.record(directory, values, data)
    return Imported(config, tokenizer, tree.size(params))


def _origin(source: Path) -> dict[str, Any]:
    """What tells a source from another: its place, and the sizes and times of its files."""
    files = [source] if source.is_file() else sorted(file for file in source.iterdir() if file.is_file())
    facts = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"source": str(source), "files": facts}


def _made_of(directory: Path) -> dict[str, Any] | None:
    path = directory / "environment.json"
    return json.loads(path.read_text(encoding="utf-8"))["data"].get("imported") if path.is_file() else None


def _bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
