"""Plans of rows in which a prompt lies before the two answers of a unit of preferences."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxllm.data.packing import PLANS, Dropped, Plan, Table, paired, table, targets_of
from jaxllm.data.tokens import TokenStore


class Units(NamedTuple):
    """The prompt and the two answers of each unit of preferences, [units, 3]: first token, and pairs, 0 where there is
    none: a document alone is an answer, its prompt included.

    differ: place from which on the documents differ. supervised: bool per token of the store.
    """

    starts: np.ndarray
    counts: np.ndarray
    differ: np.ndarray
    supervised: np.ndarray

    def targets(self, counts: np.ndarray) -> np.ndarray:
        """Supervised targets among the first so many pairs of each piece."""
        return targets_of(self.supervised, self.starts, counts)


def units(store: TokenStore, offsets: np.ndarray) -> Units:
    """The units of a store that lie between these offsets of it."""
    first = int(np.searchsorted(store.offsets, offsets[0]))
    known = store.units[first : first + len(offsets) - 1]
    begins, ends, shared = offsets[:-1], offsets[1:], known["shared"]
    answers, seconds = begins + shared, begins + known["second"]
    starts = np.stack([begins, answers, np.minimum(seconds, ends - 1)], axis=1)
    counts = np.stack([shared, seconds - answers - 1, np.maximum(ends - seconds - 1, 0)], axis=1)
    return Units(starts, counts, known["differ"], store.supervised)


def whole(units: Units, length: int) -> Table:
    """As `best_fit_whole`, of units."""
    fits = units.counts.sum(axis=1) <= length
    dropped = Dropped(documents=int((~fits).sum()), pairs=int(units.counts[~fits].sum()))
    return _table(units, units.counts, fits, length, dropped)


def truncated(units: Units, length: int) -> Table:
    """As `best_fit_truncated`: of a unit longer than a row, each answer is cut to what prompt and other answer leave of
    it, or to half of what the prompt leaves where that is more.
    """
    prompts, answers = units.counts[:, :1], units.counts[:, 1:]
    room = np.maximum(length - prompts, 0)
    counts = np.hstack([prompts, np.minimum(answers, np.maximum(room // 2, room - answers[:, ::-1]))])
    dropped = Dropped(ends=int((counts < units.counts).sum()), pairs=int((units.counts - counts).sum()))
    return _table(units, counts, np.ones(len(counts), bool), length, dropped)


def _table(units: Units, counts: np.ndarray, kept: np.ndarray, length: int, dropped: Dropped) -> Table:
    """Rows of the units that are kept and from which, so many pairs of each piece, there is something to learn."""
    empty = (units.targets(counts) == 0) & (units.counts > 0)
    unanswered = kept & np.any(empty[:, 1:], axis=1)
    # Not even the last target tells them apart.
    identical = kept & ~unanswered & (units.differ > counts[:, 0] + counts[:, 1:].max(axis=1))
    left_out = unanswered | identical
    dropped = dropped._replace(
        pairs=dropped.pairs + int(counts[left_out].sum()),
        identical=int(identical.sum()),
        unanswered=int(unanswered.sum()),
    )
    kept = kept & ~left_out
    return table(units.starts[kept], counts[kept], length, dropped)


UNIT_PLANS: dict[str, Callable[[Units, int], Plan]] = {
    "best_fit_whole": whole,
    "best_fit_truncated": truncated,
}


def plan(store: TokenStore, offsets: np.ndarray, packing: str, length: int) -> Plan:
    """Rows of the documents of a store that lie between these offsets of it."""
    if not paired(store):
        return PLANS[packing](offsets, length)
    return UNIT_PLANS[packing](units(store, offsets), length)
