"""The numbers of each step on their way into rows: fetched one step late, checked, averaged, and saved with the run."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.data.loader import batch_fingerprint
from jaxllm.metrics import Throughput, Write, fetch

# Of these a row holds the last step's value; of everything else the mean over the steps since the row before.
LAST = ("learning_rate", "skipped")


@dataclasses.dataclass
class Log:
    """Averages between rows. A step's numbers are fetched while the next step runs, so that neither waits for the
    other.
    """

    write: Write
    throughput: Throughput
    pending: tuple | None = None
    step: int = 0
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    tokens: int = 0  # of these steps; places hold a token or a pad
    places: int = 0
    untimed: int = 0  # tokens since the last lap
    speed: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, step: int, batch: Mapping[str, np.ndarray], measured: Mapping[str, Any]) -> None:
        """Takes a step that was just dispatched, and checks the one before it (``FloatingPointError``).

        ``batch`` is this process's share; ``measured`` holds ``loss``, ``grad_norm``, the ``tokens`` of all, and more.
        """
        self.settle()
        self.pending = (step, batch, measured)
        if not self.throughput.compiled:  # the first step's time is the compiler's: waited for, and reported apart
            self.settle()
            self._lap()

    def settle(self) -> None:
        """Waits for the step that is under way and checks that its loss and its gradient are finite."""
        if self.pending is None:
            return
        (self.step, batch, measured), self.pending = self.pending, None
        row = fetch(measured)
        tokens = int(row.pop("tokens"))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise FloatingPointError(
                f"the loss is {row['loss']} and the gradient norm {row['grad_norm']} at step {self.step} "
                f"(batch {batch_fingerprint(batch)}). The last checkpoint is sound. Try a lower "
                "optimizer.learning_rate, a longer optimizer.warmup, optimizer.spike_deviations=6, or "
                "model.operand_dtype='float32'"
            )
        self.rows.append(row)
        self.tokens += tokens
        self.untimed += tokens
        segments = batch["segments_BT"]  # an empty micro-batch is not computed
        self.places += int(np.any(segments, axis=(1, 2)).sum()) * segments[0].size * jax.process_count()

    def flush(self) -> None:
        """Writes the row of the steps since the row before; nothing where there were none."""
        self.settle()
        if not self.rows:
            return
        names = dict.fromkeys(name for row in self.rows for name in row)
        each = {name: [row[name] for row in self.rows if name in row] for name in names}
        row = {name: values[-1] if name in LAST else float(np.mean(values)) for name, values in each.items()}
        if self.untimed:
            self._lap()
        self.write(self.step, row | self.speed | {"pad_fraction": 1 - self.tokens / max(self.places, 1)})
        self.rows, self.speed, self.tokens, self.places = [], {}, 0, 0

    def _lap(self) -> None:
        self.speed |= self.throughput.lap(self.untimed)
        self.untimed = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (validation, samples, saving) is no step's; that of the step under way ends before."""
        self.settle()
        with self.throughput.paused():
            yield

    def position(self) -> dict[str, Any]:
        """What a later process needs to write the very rows that this one would have written; JSON-able."""
        self.settle()
        total = self.throughput.tokens + self.untimed
        return {"rows": self.rows, "tokens": self.tokens, "places": self.places, "total": total}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Continues from what ``position`` returned."""
        self.rows, self.tokens, self.places = list(position["rows"]), position["tokens"], position["places"]
        self.throughput.tokens = position["total"]
