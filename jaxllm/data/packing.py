"""Plans of rows over the flat tokens, and the rows themselves, each found without reading the ones before it.

A pair is a token and the next one of the same document: n tokens give n - 1 pairs. A row holds up to T pairs; a piece
is a run of pairs of one document in it, and becomes a segment whose positions start at 0.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxllm.data.tokens import TokenStore


class Plan(Protocol):
    """Which pieces lie in which row. num_pairs: in all rows. dropped: documents, and their pairs, that fit in none."""

    num_pairs: int
    dropped: tuple[int, int]

    def __len__(self) -> int: ...

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Index of the first token, and number of pairs, of each piece of a row."""


class Concatenated:
    """All pairs in one stream, cut every `length`: no padding but in the last row, every pair in exactly one row.

    A document that a cut divides goes on in the next row as a new segment.
    """

    def __init__(self, offsets: np.ndarray, length: int):
        self._length = length
        self._first_pairs = offsets - np.arange(len(offsets))  # each document has one pair less than tokens
        self.num_pairs = int(self._first_pairs[-1])
        self.dropped = (0, 0)

    def __len__(self) -> int:
        return -(-self.num_pairs // self._length)

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        start = row * self._length
        stop = min(start + self._length, self.num_pairs)
        first = np.searchsorted(self._first_pairs, start, side="right") - 1
        last = np.searchsorted(self._first_pairs, stop, side="left")
        begins = np.maximum(self._first_pairs[first:last], start)
        ends = np.minimum(self._first_pairs[first + 1 : last + 1], stop)
        return begins + np.arange(first, last), ends - begins


@dataclass(frozen=True)
class Table:
    """A plan written out: the pieces of row i are those from row_offsets[i] to row_offsets[i + 1]."""

    starts: np.ndarray
    counts: np.ndarray
    row_offsets: np.ndarray
    dropped: tuple[int, int]

    @property
    def num_pairs(self) -> int:
        return int(self.counts.sum())

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.row_offsets[row], self.row_offsets[row + 1])
        return self.starts[span], self.counts[span]


def best_fit(offsets: np.ndarray, length: int) -> Table:
    """Whole documents, the longest first, each in the fullest row that still takes it; a longer one is cut into pieces.

    Best-fit decreasing, as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    pairs = np.diff(offsets) - 1
    num_pieces = -(-pairs // length)
    piece_of_document = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    skipped = piece_of_document * length
    counts = np.minimum(np.repeat(pairs, num_pieces) - skipped, length)
    return _table(np.repeat(offsets[:-1], num_pieces) + skipped, counts, length, (0, 0))


def best_fit_whole(offsets: np.ndarray, length: int) -> Table:
    """As `best_fit`, but a document longer than a row is dropped and counted."""
    pairs = np.diff(offsets) - 1
    fits = pairs <= length
    return _table(offsets[:-1][fits], pairs[fits], length, (int((~fits).sum()), int(pairs[~fits].sum())))


PLANS = {"concatenated": Concatenated, "best_fit": best_fit, "best_fit_whole": best_fit_whole}


def _table(starts: np.ndarray, counts: np.ndarray, length: int, dropped: tuple[int, int]) -> Table:
    rows = _best_fit_rows(counts, length)
    order = np.argsort(rows, kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Table(starts[order], counts[order], row_offsets, dropped)


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


class Rows:
    """The rows of a store under a plan, by index: what Grain calls a random-access source.

    A row has `tokens_BT`, `targets_BT`, `positions_BT`, `segments_BT` (int32) and `mask_BT` (bool), each of T numbers
    and named as in the batch that it becomes a line of. Segments count from 1; 0 is padding.
    """

    def __init__(self, store: TokenStore, plan: Plan, *, length: int, pad_id: int):
        self.plan = plan
        self._store, self._length, self._pad_id = store, length, pad_id

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        starts, counts = self.plan.pieces(row)
        segments = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(segments)) - np.repeat(np.cumsum(counts) - counts, counts)
        index = starts[segments] + positions
        tokens = self._store.tokens
        return self._padded(tokens[index], tokens[index + 1], positions, segments + 1)

    def blank(self) -> dict[str, np.ndarray]:
        """A row of padding alone."""
        return self._padded(*np.zeros((4, 0), np.int32))

    def _padded(self, tokens, targets, positions, segments) -> dict[str, np.ndarray]:
        return {
            "tokens_BT": self._to_length(tokens, self._pad_id),
            "targets_BT": self._to_length(targets, self._pad_id),
            "positions_BT": self._to_length(positions, 0),
            "segments_BT": self._to_length(segments, 0),
            "mask_BT": np.arange(self._length) < len(tokens),
        }

    def _to_length(self, values: np.ndarray, fill: int) -> np.ndarray:
        row = np.full(self._length, fill, np.int32)
        row[: len(values)] = values
        return row

    @property
    def report(self) -> dict[str, int | float]:
        """Rows, targets, the share of padding, and what the plan dropped."""
        places = max(len(self) * self._length, 1)
        documents, targets = self.plan.dropped
        return {
            "rows": len(self),
            "targets": self.plan.num_pairs,
            "pad_fraction": 1 - self.plan.num_pairs / places if len(self) else 0.0,
            "dropped_documents": documents,
            "dropped_targets": targets,
        }
