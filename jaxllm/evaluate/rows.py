"""Sequences of ids of any lengths as batches of one size, for programs that compile for few shapes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.text.special_tokens import PAD_ID

SHORTEST = 16


class Rows(NamedTuple):
    """numbers: which sequences these are; further rows, up to the batch's size, are blank, of length 1."""

    numbers: list[int]
    tokens_BT: np.ndarray
    lengths_B: np.ndarray


def by_length(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[Rows]:
    """Every sequence once, those of similar lengths together, in rows as wide as the next power of two."""
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        lengths_B = np.ones(batch_size, np.int32)
        lengths_B[: len(numbers)] = [len(sequences[number]) for number in numbers]
        width = max(SHORTEST, 1 << (int(lengths_B.max()) - 1).bit_length())
        tokens_BT = np.full((batch_size, width), PAD_ID, np.int32)
        for row_T, number in zip(tokens_BT, numbers, strict=False):
            row_T[: len(sequences[number])] = sequences[number]
        yield Rows(numbers, tokens_BT, lengths_B)
