"""A run's directory: what lies where in it, what a second run in it may change, and how to load its model.

config.json  environment.json  tokenizer/  tokens/  checkpoints/  metrics.jsonl  samples.jsonl  figures/*.png
evaluation.json  evaluation_items.jsonl
"""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax

from jaxllm import checkpoint
from jaxllm.checkpoint import differences
from jaxllm.configure import section
from jaxllm.model import DecoderConfig, Model, build, placement
from jaxllm.text import tokenizer
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

MEND = ", or --accept_changes to go on with the new values."
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "ml_collections", "numpy")


def open(directory: str | os.PathLike, values: Mapping, *, accept_changes: bool = False, mend: str = MEND) -> Path:
    """The run directory, created with its ``config.json``, or opened again for the same config.

    Raises ``ValueError`` naming every key that differs from the run's own config, both values and the mend; with
    ``accept_changes`` they are shown instead, and ``record`` writes them once the run goes on: only a run's tokenizer
    never changes. Raises it too for a directory that holds something else than a run. mend: what can be done.
    """
    directory = Path(directory).expanduser().absolute()
    path = directory / "config.json"
    if path.exists():
        differing = differences(config(directory), json.loads(json.dumps(values)))
        kept = [name for name in differing if name.startswith("tokenizer.")]
        if kept or (differing and not accept_changes):
            lines = [
                f"  {name}: {saved!r} there, {wanted!r} here" for name, (saved, wanted) in sorted(differing.items())
            ]
            mend = "; a run keeps its tokenizer." if kept else mend
            raise ValueError(
                "\n".join([f"{directory} holds a run with another config:", *lines, f"Use another --workdir{mend}"])
            )
        for name, (saved, wanted) in sorted(differing.items()):
            print(f"changed from the run so far: {name}: {saved!r} -> {wanted!r}", file=sys.stderr)
    elif directory.exists() and any(path.name != "config.tmp" for path in directory.iterdir()):
        raise ValueError(f"{directory} is not empty and holds no config.json of a run; use another --workdir")
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, values)
    return directory


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Inside, the run belongs to this job, whose first process writes for all; ``ValueError`` where it belongs to
    another one.

    What is locked is the place of its checkpoints: its caches, which may lie in the directory itself, have own locks.
    """
    (directory / "checkpoints").mkdir(exist_ok=True)
    opened = os.open(directory / "checkpoints", os.O_RDONLY)
    try:
        if jax.process_index() == 0:
            _lock(opened, directory)
        yield
    finally:
        os.close(opened)


def _lock(opened: int, directory: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"another process trains the run in {directory}: wait until it ends, or use another --workdir"
        ) from error
    except OSError:  # a file system that knows no locks
        pass


class Saved(NamedTuple):
    """What a run saved: its model, its tokenizer, and a function that reads the parameters of its newest checkpoint."""

    model: Model
    tokenizer: Tokenizer
    params: Callable[..., Tree]  # (shardings=None)
    identity: str  # tells these parameters from all others


def saved(directory: str | os.PathLike, *, step: int | None = None) -> Saved:
    """The run in this directory, its parameters (the newest whole checkpoint's, or those of ``step``) still unread.

    Read, they lie on the mesh that is set; on the first device where none is, or as ``shardings`` say.
    """
    values = config(directory)
    tokens = tokenizer.load(Path(directory) / "tokenizer")
    model = build(section(DecoderConfig, values["model"], path="config.model").with_vocabulary(tokens.vocab_size))

    def params(shardings: Tree = None) -> Tree:
        on = jax.sharding.get_mesh()
        if shardings is None and not on.empty:
            shardings = placement(model, on)
        return checkpoint.restore_params(Path(directory) / "checkpoints", step=step, shardings=shardings)

    return Saved(model, tokens, params, _identity(directory, values, step))


def _identity(directory: str | os.PathLike, values: Mapping, step: int | None) -> str:
    """Of the run's parameters: the names of a checkpoint's files are drawn at random when it is saved."""
    checkpoints = Path(directory) / "checkpoints"
    step = next(checkpoint.whole_steps(checkpoints), "") if step is None else step
    files = sorted(str(path.relative_to(checkpoints)) for path in (checkpoints / str(step)).rglob("*"))
    return f"step {step} ({hashlib.sha256(json.dumps([values['model'], files]).encode()).hexdigest()[:16]})"


def load(directory: str | os.PathLike, *, step: int | None = None) -> tuple[Model, Tree, Tokenizer]:
    """(model, params, tokenizer) of a run: its newest whole checkpoint, or that of ``step``, placed as by ``saved``."""
    found = saved(directory, step=step)
    return found.model, found.params(), found.tokenizer


def config(directory: str | os.PathLike) -> dict:
    """The config of the run in this directory; ``FileNotFoundError`` where there is none, ``ValueError`` where it is
    damaged.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run in {directory}: config.json is missing; name a directory that train.py made")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): write it again, checkpoints/*/meta hold the config") from error


def write_evaluation(directory: str | os.PathLike, result: Mapping) -> None:
    """Writes ``evaluation.json``."""
    write_json(Path(directory) / "evaluation.json", result)


def evaluation(directory: str | os.PathLike) -> dict:
    """What ``evaluation.json`` holds; nothing where there is none."""
    path = Path(directory) / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_evaluation_items(directory: str | os.PathLike, suite: str, rows: Iterable[Mapping]) -> None:
    """Writes ``evaluation_items.jsonl``, a row for each item: those of this suite anew, other suites' as they were."""
    path = Path(directory) / "evaluation_items.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["suite"] != suite]
    new = [json.dumps({"suite": suite, **row}, ensure_ascii=False) for row in rows]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(line + "\n" for line in kept + new), encoding="utf-8")
    os.replace(beside, path)


def record(directory: Path, values: Mapping, data: Mapping) -> None:
    """Writes the config that goes on, and versions, device, commit, command and what the data became, so that the run
    can be made again; those that it began under, where they were others, stay beside them as ``earlier``.
    """
    if jax.process_index() > 0:
        return
    write_json(directory / "config.json", values)
    path, now = directory / "environment.json", environment() | {"data": dict(data)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    earlier = before.pop("earlier", [])
    if before and differences(before, json.loads(json.dumps(now))):
        earlier.append(before)
    write_json(path, now | {"earlier": earlier})


def environment() -> dict:
    """Versions of Python and of the packages that decide numbers, the device, the code's commit and the command."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "commit": _commit(),
        "command": sys.argv,
    }


def _commit() -> str:
    """The commit of this checkout, with ``-dirty`` where it was changed; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_json(path: Path, content: Mapping) -> None:
    """A file of JSON, its keys sorted, that appears when it is whole."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(beside, path)
