"""What a stage does, by its kind, what is known of it before it is run, and the command that does the same alone.

Each can be called again on what it left: it goes on, or finds everything done.
"""

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxllm import curate, loop, metrics, workdir
from jaxllm.configure import check_keys, section
from jaxllm.curate.limits import limits
from jaxllm.data import lessons, made
from jaxllm.data.sources import DocumentSource
from jaxllm.model import flops_per_token
from jaxllm.pipeline.config import flat
from jaxllm.run_config import RunConfig
from jaxllm.stages import named
from jaxllm.text import prepare

Values = Mapping[str, Any]


class Kind(NamedTuple):
    """run: (values, directory) -> numbers that a gate may be about. spent: directory -> "tokens", "flops", "mfu".

    script: the command; out: its flag for the directory, prefix: of all others. usual: what the flags are untold.
    check: (values, the name of their section), raises ``ValueError`` for what is wrong with them whatever they name.
    numbers: patterns of what ``run`` returns.
    """

    run: Callable[[Values, str], dict[str, Any]]
    spent: Callable[[str], dict[str, float | None]]
    script: str
    out: str = "out"
    prefix: str = ""
    usual: Values = {}
    check: Callable[[Values, str], None] = lambda values, path: None
    numbers: tuple[str, ...] = ("*",)


def command(kind: Kind, values: Values, untold: Values, directory: str, config: str) -> str:
    """The command of a stage: what its values say that would not be so untold."""
    usual = flat(untold)
    said = [f"--{kind.prefix}{key}={_spelled(value)}" for key, value in flat(values).items() if usual.get(key) != value]
    named = [f"--config={config}"] if config else []
    return shlex.join(["python", kind.script, *named, f"--{kind.out}={directory}", *said])


def _spelled(value: Any) -> str:
    return repr(value) if isinstance(value, list | tuple) else str(value)


def _lessons(values: Values, directory: str) -> dict[str, Any]:
    written = dict(made.write(directory, lessons.lessons(lessons.Plan(**values))))
    return {path.stem: count for path, count in written.items()}


def _clean(values: Values, directory: str) -> dict[str, Any]:
    report = curate.clean(out=directory, **values)
    return {**curate.numbers(report), "report": report}


def _tokenizer(values: Values, directory: str) -> dict[str, Any]:
    """files, vocab_size, and perhaps field and held_out: as the flags of the script."""
    given = dict(values)
    source = DocumentSource(given.pop("files"), given.pop("field", "text"))
    return prepare.learn((document.text for document in source.documents()), out=directory, **given)


def _check_lessons(values: Values, path: str) -> None:
    check_keys(values, lessons.Plan._fields, path=path)
    lessons.lessons(lessons.Plan(**values))


def _check_clean(values: Values, path: str) -> None:
    thresholds = [field.name for field in dataclasses.fields(curate.Limits)]
    check_keys(values, ("files", "field", "preset", *thresholds), path=path, needed=("files",))
    limits(**{key: value for key, value in values.items() if key not in ("files", "field")})


def _check_tokenizer(values: Values, path: str) -> None:
    needed = ("files", "vocab_size")
    check_keys(values, (*needed, "field", "held_out"), path=path, needed=needed)


def _check_train(values: Values, path: str) -> None:
    named(section(RunConfig, values, path=path).stage)


def _nothing(directory: str) -> dict[str, float | None]:
    return {"tokens": None, "flops": None, "mfu": None}


def _train(values: Values, directory: str) -> dict[str, Any]:
    return loop.run(values, directory)


def _trained(directory: str) -> dict[str, float | None]:
    """Tokens that were trained on, what forward and backward of them took, and the MFU, by the time of each row."""
    length = workdir.config(directory)["data"]["sequence_length"]
    rows = [row for row in metrics.read(f"{directory}/metrics.jsonl") if "tokens_per_second" in row]
    tokens = max((row["tokens"] for row in rows), default=0)
    each = flops_per_token(workdir.saved(directory).model.config, length)
    known = [row for row in rows if isinstance(row.get("mfu"), float)]
    seconds = sum(row["seconds"] for row in known)
    mfu = sum(row["mfu"] * row["seconds"] for row in known) / seconds if seconds else None
    return {"tokens": tokens, "flops": tokens * each, "mfu": mfu}


KINDS = {
    "lessons": Kind(
        _lessons,
        _nothing,
        "experiments/lessons.py",
        usual=lessons.Plan()._asdict(),
        check=_check_lessons,
        numbers=("documents", "instructions", "preferences", "questions", "heldout_*"),
    ),
    "clean": Kind(
        _clean,
        _nothing,
        "experiments/curate.py",
        usual={"field": "text", "preset": "any"},
        check=_check_clean,
        numbers=("documents", "kept", "caught", "lost"),
    ),
    "tokenizer": Kind(
        _tokenizer,
        _nothing,
        "experiments/tokenizer.py",
        usual={"vocab_size": 4096},
        check=_check_tokenizer,
        numbers=("vocab_size", "bytes_per_token", "documents", "bytes", "held_out_documents", "held_out_bytes"),
    ),
    "train": Kind(
        _train,
        _trained,
        "experiments/train.py",
        out="workdir",
        prefix="config.",
        check=_check_train,
        numbers=("validation_*",),
    ),
}
