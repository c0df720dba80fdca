"""Plans of rows over the flat tokens, and the rows themselves, each found without reading the ones before it.

A pair is a token and the next one of the same document: n tokens give n - 1 pairs. A row holds up to T pairs; a piece
is a run of pairs of one document in it, and becomes a segment whose positions start at 0.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from jaxllm.data.columns import AnnotatedStore
from jaxllm.data.tokens import TokenStore

_MANY_SIZES = 1000  # up to so many, brim-full rows are found within a second


class Dropped(NamedTuple):
    """What a plan leaves out: whole documents, ends of documents that it cuts, and the pairs of both.

    identical, unanswered: units of preferences that the cut left with two equal answers, or with one that is empty.
    """

    documents: int = 0
    ends: int = 0
    pairs: int = 0
    identical: int = 0
    unanswered: int = 0


class Plan(Protocol):
    """Which pieces lie in which row.

    spans: index of the first token, and number of pairs, of runs of pairs that together are those of all rows.
    """

    spans: tuple[np.ndarray, np.ndarray]
    dropped: Dropped

    def __len__(self) -> int: ...

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Index of the first token, and number of pairs, of each piece of a row."""


class Concatenated:
    """All pairs in one stream, cut every `length`: no padding but in the last row, every pair in exactly one row.

    A document that a cut divides goes on in the next row as a new segment.
    """

    dropped = Dropped()

    def __init__(self, offsets: np.ndarray, length: int):
        self._length = length
        self.spans = offsets[:-1], np.diff(offsets) - 1
        self._first_token = int(offsets[0])
        # each document has one pair less than tokens
        self._first_pairs = offsets - self._first_token - np.arange(len(offsets))
        self._num_pairs = int(self._first_pairs[-1])

    def __len__(self) -> int:
        return -(-self._num_pairs // self._length)

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        start = row * self._length
        stop = min(start + self._length, self._num_pairs)
        first = np.searchsorted(self._first_pairs, start, side="right") - 1
        last = np.searchsorted(self._first_pairs, stop, side="left")
        begins = np.maximum(self._first_pairs[first:last], start)
        ends = np.minimum(self._first_pairs[first + 1 : last + 1], stop)
        return begins + np.arange(first, last) + self._first_token, ends - begins


@dataclass(frozen=True)
class Table:
    """A plan written out: row i holds the lines row_offsets[i] to row_offsets[i + 1] of `starts` and `counts`.

    starts, counts: [lines, k] index of the first token, and number of pairs, of pieces that lie side by side.
    """

    starts: np.ndarray
    counts: np.ndarray
    row_offsets: np.ndarray
    dropped: Dropped

    @property
    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        return self.starts.ravel(), self.counts.ravel()

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        lines = slice(self.row_offsets[row], self.row_offsets[row + 1])
        return self.starts[lines].ravel(), self.counts[lines].ravel()


def best_fit(offsets: np.ndarray, length: int) -> Table:
    """Whole documents in as few rows as can be found; one longer than a row is cut into pieces.

    Best-fit decreasing, as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830: the
    longest first, each in the fullest row that still takes it. Or brim-full rows, where they are fewer.
    """
    pairs = np.diff(offsets) - 1
    num_pieces = -(-pairs // length)
    piece_of_document = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    skipped = piece_of_document * length
    counts = np.minimum(np.repeat(pairs, num_pieces) - skipped, length)
    return table(np.repeat(offsets[:-1], num_pieces) + skipped, counts, length, Dropped())


def best_fit_whole(offsets: np.ndarray, length: int) -> Table:
    """As `best_fit`, but a document longer than a row is dropped and counted."""
    pairs = np.diff(offsets) - 1
    fits = pairs <= length
    dropped = Dropped(documents=int((~fits).sum()), pairs=int(pairs[~fits].sum()))
    return table(offsets[:-1][fits], pairs[fits], length, dropped)


def best_fit_truncated(offsets: np.ndarray, length: int) -> Table:
    """As `best_fit`, but of a document longer than a row only the beginning is kept, and the end counted as dropped."""
    pairs = np.diff(offsets) - 1
    counts = np.minimum(pairs, length)
    dropped = Dropped(ends=int((pairs > length).sum()), pairs=int((pairs - counts).sum()))
    return table(offsets[:-1], counts, length, dropped)


PLANS: dict[str, Callable[[np.ndarray, int], Plan]] = {
    "concatenated": Concatenated,
    "best_fit": best_fit,
    "best_fit_whole": best_fit_whole,
    "best_fit_truncated": best_fit_truncated,
}


def table(starts: np.ndarray, counts: np.ndarray, length: int, dropped: Dropped) -> Table:
    """Of lines of pieces, [lines, k]; or [lines] of a piece each. A line without a pair, of a document of one token, is
    in no row.
    """
    counts = counts.reshape(len(counts), *counts.shape[1:] or [1])
    starts, counts = (each[counts.any(axis=1)] for each in (starts.reshape(counts.shape), counts))
    rows = _fewest_rows(counts.sum(axis=1), length)
    order = np.argsort(rows, kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Table(starts[order], counts[order], row_offsets, dropped)


def _fewest_rows(counts: np.ndarray, length: int) -> np.ndarray:
    """Row of each piece: by best fit, or by brim-full rows where these are fewer.

    Best fit pairs pieces of a third to a half of a row and wastes the rest, as conversations often are; where sizes are
    many it wastes little, and the other way takes long.
    """
    rows = _best_fit_rows(counts, length)
    if len(np.unique(counts)) > _MANY_SIZES:
        return rows
    return min(rows, _brim_full_rows(counts, length), key=lambda each: each.max(initial=0))


def _best_fit_rows(counts: np.ndarray, length: int) -> np.ndarray:
    """Row of each piece. Rows wait in lists by the room they have left; bit r of `rooms` says that list r has one."""
    rows = np.zeros(len(counts), np.int64)
    waiting: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = num_rows = 0
    for piece in np.argsort(-counts, kind="stable").tolist():
        count = int(counts[piece])
        fitting = rooms >> count
        if fitting:
            room = count + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the tightest fit
            row = waiting[room].pop()
            rooms ^= (not waiting[room]) << room
        else:
            row, room, num_rows = num_rows, length, num_rows + 1
        rows[piece] = row
        if room > count:
            waiting[room - count].append(row)
            rooms |= 1 << (room - count)
    return rows


def _brim_full_rows(counts: np.ndarray, length: int) -> np.ndarray:
    """Row of each piece. One row after the other gets the sizes that fill it best, as often as there are pieces."""
    rows, num_rows = np.zeros(len(counts), np.int64), 0
    waiting = {int(size): np.flatnonzero(counts == size).tolist() for size in np.unique(counts)[::-1]}
    while waiting:
        sizes = Counter(_fullest({size: len(pieces) for size, pieces in waiting.items()}, length))
        repeats = min(len(waiting[size]) // number for size, number in sizes.items())
        for size in sizes.elements():
            rows[waiting[size][-repeats:]] = np.arange(num_rows, num_rows + repeats)
            del waiting[size][-repeats:]
        num_rows += repeats
        waiting = {size: pieces for size, pieces in waiting.items() if pieces}
    return rows


def _fullest(available: Mapping[int, int], length: int) -> list[int]:
    """Sizes, of the many available, whose sum is the largest up to `length`; of equal sums those most alike.

    Bit s of `sums` says that the sizes so far, the largest first, can add up to s: the search ends where they suffice.
    """
    sums, before, full = 1, [], (1 << length + 1) - 1
    for size, number in available.items():
        before.append((size, sums))
        for _ in range(min(number, length // size)):
            sums |= sums << size & full
        if sums >> length:
            break
    total, chosen = sums.bit_length() - 1, []
    for size, smaller in reversed(before):
        while not smaller >> total & 1:
            total -= size
            chosen.append(size)
    return chosen


def supervised(store: TokenStore) -> np.ndarray | None:
    """bool per token of a store of conversations; None of texts, which documents in memory are."""
    return store.supervised if isinstance(store, TokenStore) else None


def paired(store: TokenStore) -> bool:
    """Whether a store holds units of preferences; documents in memory are none."""
    return isinstance(store, TokenStore) and store.paired


def judgements(store: TokenStore, index: np.ndarray) -> dict[str, np.ndarray]:
    """The score of the answer, and the margin of the unit, of each of these tokens; none but of preferences.

    Both are 0 in a prompt that answers share.
    """
    if not paired(store):
        return {}
    unit = np.searchsorted(store.offsets, index, side="right") - 1
    known, place = store.units[unit], index - store.offsets[unit]
    scores = np.where(place < known["second"], *known["scores"].T)
    prompt = place < known["shared"]
    return {"score_BT": np.where(prompt, 0, scores), "margin_BT": np.where(prompt, 0, known["margin"])}


def targets_of(marks: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many of the targets of so many pairs from each start are marked."""
    before = np.concatenate([[0], np.cumsum(marks, dtype=np.int64)])
    return before[starts + counts + 1] - before[starts + 1]


def columns(store: TokenStore) -> Mapping[str, np.ndarray]:
    """Further numbers per token, by their name in a batch; none, in general."""
    return store.columns if isinstance(store, AnnotatedStore) else {}


def _documents(counts: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(position of its first token, numbers) of each piece."""
    return np.zeros_like(counts), {"segments_BT": 1 + np.arange(len(counts))}


def _units(counts: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """As `_documents`, of a prompt, which may be empty, and two answers to it, over and over."""
    shared, unit = np.repeat(counts[::3], 3), np.repeat(1 + np.arange(len(counts) // 3), 3)
    side = np.arange(len(counts)) % 3
    segments = np.where(side, 2 * unit - 2 + side, -unit)
    return np.where(side, shared, 0), {"segments_BT": segments, "parents_BT": np.where(shared, -unit, segments)}


class Rows:
    """The rows of a store under a plan, by index: what Grain calls a random-access source.

    A row has `tokens_BT`, `targets_BT`, `positions_BT`, `segments_BT` (int32) and `mask_BT` (bool), each of T numbers
    and named as in the batch that it becomes a line of. Segments count from 1; 0 is padding. The mask is True where a
    target is supervised: in texts everywhere but in the padding. The columns of an annotated store come along, those
    of each pair's first token, with zeros in the padding.

    In rows of preferences the answers of the p-th unit are segments 2p - 1 and 2p, the second left out where it has
    none, and the prompt that they share is segment -p: `parents_BT` (int32) is -p in all three, and a segment's own
    number where it shares none. Positions go on from prompt to answer. There are `score_BT` of the answer, NaN where
    none is known, and `margin_BT` (float32), 0 in the prompt.
    """

    def __init__(self, store: TokenStore, plan: Plan, *, length: int, pad_id: int):
        self.plan = plan
        self._store, self._length, self._pad_id = store, length, pad_id

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self._row(*self.plan.pieces(row))

    def blank(self) -> dict[str, np.ndarray]:
        """A row of padding alone."""
        return self._row(*np.zeros((2, 0), np.int64))

    def _row(self, starts: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """That of these pieces."""
        piece = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        first, numbers = (_units if paired(self._store) else _documents)(counts)
        numbers = {name: values[piece] for name, values in numbers.items()}
        return self._padded(starts[piece] + place, {"positions_BT": first[piece] + place} | numbers)

    def _padded(self, index: np.ndarray, numbers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens, marks = self._store.tokens, supervised(self._store)
        mask = np.ones(len(index), bool) if marks is None else marks[index + 1]
        beside = {name: values[index] for name, values in columns(self._store).items()}
        beside |= judgements(self._store, index)
        return {
            "tokens_BT": self._to_length(tokens[index], np.int32, self._pad_id),
            "targets_BT": self._to_length(tokens[index + 1], np.int32, self._pad_id),
            **{name: self._to_length(values, np.int32) for name, values in numbers.items()},
            "mask_BT": self._to_length(mask, bool),
            **{name: self._to_length(values, values.dtype) for name, values in beside.items()},
        }

    def _to_length(self, values: np.ndarray, dtype: np.typing.DTypeLike, fill: int = 0) -> np.ndarray:
        row = np.full((self._length, *values.shape[1:]), fill, dtype)
        row[: len(values)] = values
        return row

    @functools.cached_property
    def targets_of_spans(self) -> np.ndarray:
        """Supervised targets in each of the plan's spans."""
        (starts, counts), marks = self.plan.spans, supervised(self._store)
        return counts if marks is None else targets_of(marks, starts, counts)

    @property
    def num_targets(self) -> int:
        return int(self.targets_of_spans.sum())

    @property
    def report(self) -> dict[str, int | float]:
        """Rows, supervised targets, shares of padding and of what is supervised of the rest, and what was dropped.

        Documents without a target are read for nothing, as where their answer lies beyond the end of a row.
        """
        counts, dropped = self.plan.spans[1], self.plan.dropped
        pairs = int(counts.sum())
        units = {"dropped_identical": dropped.identical, "dropped_unanswered": dropped.unanswered}
        # A shared prompt is no document, and no unit is kept without a target in each of its answers.
        silent = 0 if paired(self._store) else int(((self.targets_of_spans == 0) & (counts > 0)).sum())
        return {
            "rows": len(self),
            "targets": self.num_targets,
            "pad_fraction": 1 - pairs / (len(self) * self._length) if len(self) else 0.0,
            "supervised_fraction": self.num_targets / max(pairs, 1),
            "documents_without_target": silent,
            "dropped_documents": dropped.documents,
            "dropped_ends": dropped.ends,
            "dropped_targets": dropped.pairs,
        } | (units if paired(self._store) else {})
