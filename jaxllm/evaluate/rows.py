"""Sequences of ids of any lengths as batches of one size, for programs that compile for few shapes."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from jaxllm.sharding import whole_shards

T = TypeVar("T")

SHORTEST = 16


class Rows(NamedTuple):
    """numbers: which sequences these are; further rows, up to the batch's size, are blank, of length 1."""

    numbers: list[int]
    tokens_BT: np.ndarray
    lengths_B: np.ndarray


def by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[Rows]:
    """Every sequence once, those of similar lengths together, in rows as wide as the next power of two.

    Under a mesh the rows of a batch are as many more as spread evenly over it.
    """
    batch_size = whole_shards(batch_size)
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        lengths_B = np.ones(batch_size, np.int32)
        lengths_B[: len(numbers)] = [len(sequences[number]) for number in numbers]
        width = max(SHORTEST, 1 << (int(lengths_B.max()) - 1).bit_length())
        tokens_BT = np.zeros((batch_size, width), np.int32)
        for row_T, number in zip(tokens_BT, numbers, strict=False):
            row_T[: len(sequences[number])] = sequences[number]
        yield Rows(numbers, tokens_BT, lengths_B)


def shown(work: Iterable[T], doing: str, total: int | None = None) -> Iterable[T]:
    """The work with a bar of how far it is, where somebody watches. total: of what has no length of its own."""
    console = Console(stderr=True)
    return track(work, doing, total=total, console=console, disable=not sys.stderr.isatty(), transient=True)


class Packed(NamedTuple):
    """Sequences side by side in rows, where they do not see each other. places: (sequence, row, where it begins)."""

    places: list[tuple[int, int, int]]
    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    positions_BT: np.ndarray
    segments_BT: np.ndarray


def packed(sequences: Sequence[Sequence[int]], batch_size: int, *, length: int) -> Iterator[Packed]:
    """Every sequence once, its pairs of a token and the next one in a row of up to ``length`` of them.

    Which sequences share a row does not depend on ``batch_size``. Rows are no wider than is worth it: a power of two
    of pairs that has room for eight of the longest. Raises ``ValueError`` where one does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    pairs = [len(sequence) - 1 for sequence in sequences]
    if wrong := [each + 1 for each in pairs if not 0 < each <= length]:
        raise ValueError(f"a sequence of {wrong[0]} tokens has no place in rows of {length} and one more: cut it")
    width = min(length, 1 << (8 * max(pairs, default=1) - 1).bit_length())
    rows = _rows(pairs, width)
    for start in range(0, len(rows), batch_size):
        yield _filled(sequences, rows[start : start + batch_size], batch_size, width)


def _rows(pairs: Sequence[int], width: int) -> list[list[int]]:
    """The numbers of the sequences of each row, the longest first: a row ends where the next one does not fit."""
    rows: list[list[int]] = []
    left = -1
    for number in sorted(range(len(pairs)), key=lambda number: -pairs[number]):
        if pairs[number] > left:
            rows.append([])
            left = width
        rows[-1].append(number)
        left -= pairs[number]
    return rows


def _filled(sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], height: int, width: int) -> Packed:
    found = Packed([], *np.zeros((4, height, width), np.int32))
    for row, numbers in enumerate(rows):
        start = 0
        for segment, number in enumerate(numbers, 1):
            ids = np.asarray(sequences[number], np.int32)
            end = start + len(ids) - 1
            found.tokens_BT[row, start:end], found.targets_BT[row, start:end] = ids[:-1], ids[1:]
            found.positions_BT[row, start:end], found.segments_BT[row, start:end] = np.arange(end - start), segment
            found.places.append((number, row, start))
            start = end
    return found
