"""Numbers on their way from the device to the user: added first, divided late, fetched once, written everywhere.

A row is ``{name: number or string}`` at a step. Every writer is a context manager that yields ``write(step, row)``.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

Row = Mapping[str, float | str]
Write = Callable[[int, Row], None]
Writer = contextlib.AbstractContextManager[Write]

SHOWN = (
    *("loss", "validation_loss", "validation_accuracy"),
    *("reward", "validation_reward", "completion_tokens", "tokens_per_second", "mfu"),
)
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# ---- on the device ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratio:
    """A mean kept as its two sums, so that micro-batches, devices and hosts add exactly: a pytree of two leaves."""

    total: Any
    count: Any

    def __add__(self, other: "Ratio") -> "Ratio":
        return Ratio(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> Any:
        """``total / count``, NaN where the count is 0: on the host for host numbers, else on the device."""
        array = jnp if isinstance(self.count, jax.Array) else np
        empty = array.equal(self.count, 0)
        return array.where(empty, math.nan, self.total / array.where(empty, 1, self.count))


def fetch(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Device metrics (``Ratio`` or scalar array by name) as Python floats, in one transfer: the only wait."""
    host = jax.device_get(dict(metrics))
    return {name: float(entry.value if isinstance(entry, Ratio) else entry) for name, entry in host.items()}


# ---- speed ----


@dataclasses.dataclass
class Throughput:
    """Tokens per second between calls of ``lap``, without the first lap, which compiles: end that one after one step.

    Call ``lap`` when the work it counts is finished on the device, that is after ``fetch``. ``tokens`` is the total of
    real tokens so far, a Python integer; a resumed run starts from its own. MFU appears when both FLOP numbers are
    given: ``flops_per_token`` forward and backward, ``peak_flops`` per second of all devices together.
    """

    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    tokens: int = 0
    clock: Callable[[], float] = time.perf_counter
    started: float = dataclasses.field(init=False)
    compiled: bool = dataclasses.field(init=False, default=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def lap(self, tokens: int, pads: int = 0) -> dict[str, float]:
        """The row for ``tokens`` real ones and ``pads`` since the lap before: totals, the pad fraction, and the speed.

        The first holds ``compile_seconds``, the others ``seconds``, ``tokens_per_second`` and ``mfu``.
        """
        tokens, pads, now = int(tokens), int(pads), self.clock()
        seconds, self.started = now - self.started, now
        self.tokens += tokens
        row = {"tokens": self.tokens, "pad_fraction": pads / max(tokens + pads, 1)}
        if not self.compiled:
            self.compiled = True
            return row | {"compile_seconds": seconds}
        row |= {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if self.flops_per_token and self.peak_flops:
            row["mfu"] = row["tokens_per_second"] * self.flops_per_token / self.peak_flops
        return row

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (validation, saving, sampling) belongs to no lap."""
        entered = self.clock()
        try:
            yield
        finally:
            self.started += self.clock() - entered


# ---- writers ----


@contextlib.contextmanager
def writers(*opened: Writer) -> Iterator[Write]:
    """One ``write(step, row)`` that feeds all the given writers; with none, as on all processes but the first, silent.

    >>> with writers(jsonl(path), progress(total_steps)) as write:
    ...     write(step, {"loss": 2.5})
    """
    with contextlib.ExitStack() as stack:
        sinks = [stack.enter_context(writer) for writer in opened]

        def write(step: int, row: Row) -> None:
            for sink in sinks:
                sink(step, row)

        yield write


@contextlib.contextmanager
def jsonl(path: Any, *, after_step: int = -1) -> Iterator[Write]:
    """Append one line of strict JSON per row, flushed at once.

    A run resumed from a checkpoint passes its step as ``after_step``: rows beyond it, which will be written again, are
    dropped first, as is a last line cut short by a kill. NaN and infinities are the strings ``"NaN"``, ``"Infinity"``,
    ``"-Infinity"``; ``read`` turns them back.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_rows_beyond(path, after_step)

    def write(step: int, row: Row) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:  # closed each time, or a full disk raises again at the end
                file.write(_line({"step": int(step), **row}))
        except OSError as error:
            raise OSError(
                f"step {step} could not be written to {path}: {error}. Free space there and resume."
            ) from error

    yield write


def read(path: Any) -> list[dict[str, float | str]]:
    """The rows of a ``metrics.jsonl``, oldest first, without a last line cut short by a kill.

    Raises ``ValueError`` that names any other line that is not a row, ``FileNotFoundError`` if there is no file.
    """
    rows = []
    lines = pathlib.Path(path).read_bytes().split(b"\n")[:-1]  # other ends of lines may stand in a text
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"]} | {name: _finite_or_not(value) for name, value in row.items()})
        except (ValueError, KeyError, TypeError) as error:
            shown = line.decode(errors="replace")[:80]
            raise ValueError(f"{path}:{number}: not a row of metrics ({error}): {shown!r}. Remove the line.") from error
    return rows


@contextlib.contextmanager
def tensorboard(directory: Any, *, after_step: int = -1) -> Iterator[Write]:
    """Numbers as scalars, strings as text, for TensorBoard; a resumed run hides its rows past ``after_step``."""
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError("TensorBoard logs need the package tensorboardX: pip install tensorboardX") from error
    with tensorboardX.SummaryWriter(str(directory), purge_step=after_step + 1) as events:

        def write(step: int, row: Row) -> None:
            for name, value in row.items():
                events.add_text(name, value, step) if isinstance(value, str) else events.add_scalar(name, value, step)
            events.flush()

        yield write


@contextlib.contextmanager
def progress(
    total_steps: int, *, start_step: int = 0, shown: tuple[str, ...] = SHOWN, stream: Any = None
) -> Iterator[Write]:
    """A bar with the ``shown`` numbers and the time left; plain lines, one a row, if ``stream`` is no terminal."""
    stream = stream or sys.stderr
    bar = _terminal_bar if stream.isatty() else _plain_lines
    with bar(total_steps, start_step, stream) as advance:
        latest: dict[str, str] = {}

        def write(step: int, row: Row) -> None:
            latest.update({name: _short(name, row[name]) for name in shown if name in row})
            advance(step, "  ".join(latest[name] for name in shown if name in latest))

        yield write


@contextlib.contextmanager
def _terminal_bar(total_steps: int, start_step: int, stream: Any) -> Iterator[Callable[[int, str], None]]:
    columns = (
        rich.progress.TextColumn("step"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(file=stream)) as bar:
        task = bar.add_task("", total=total_steps, completed=start_step, text="")
        yield lambda step, text: bar.update(task, completed=step, text=text)


@contextlib.contextmanager
def _plain_lines(total_steps: int, start_step: int, stream: Any) -> Iterator[Callable[[int, str], None]]:
    started, width = time.perf_counter(), len(str(total_steps))

    def advance(step: int, text: str) -> None:
        done = step - start_step
        left = (time.perf_counter() - started) * (total_steps - step) / done if done > 0 else math.nan
        print(f"step {step:>{width}}/{total_steps}  {text}  {_duration(left)} left", file=stream, flush=True)

    yield advance


# ---- spelling ----


def _drop_rows_beyond(path: pathlib.Path, step: int) -> None:
    """Rewritten beside and renamed over, so that a kill leaves either the old file or the new one."""
    if not path.exists():
        return
    kept = "".join(_line(row) for row in read(path) if row["step"] <= step)
    if kept.encode() != path.read_bytes():
        beside = path.with_name(f"{path.name}.tmp")
        beside.write_text(kept, encoding="utf-8")
        os.replace(beside, path)


def _line(row: Row) -> str:
    plain = {name: value.item() if isinstance(value, np.generic | np.ndarray) else value for name, value in row.items()}
    spelled = {name: _spelled(value) if isinstance(value, float) else value for name, value in plain.items()}
    return json.dumps(spelled, allow_nan=False, ensure_ascii=False) + "\n"


def _spelled(value: float) -> float | str:
    return value if math.isfinite(value) else "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _finite_or_not(value: Any) -> Any:
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _short(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name == "mfu":
        return f"mfu {100 * value:.1f}%"
    if name.endswith("_per_second"):
        return f"{_thousands(value)} {name.removesuffix('_per_second')}/s"
    return f"{name} {value:.4g}"


def _thousands(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
