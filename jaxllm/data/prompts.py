"""Prompts with the answers that the data give, out of a store of conversations: what to ask a model."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from jaxllm.data.tokens import TokenStore


class Prompt(NamedTuple):
    """prompt_ids: int32, up to where the last answer begins. reference_ids: that answer, its end included."""

    prompt_ids: np.ndarray
    reference_ids: np.ndarray


def prompts(store: TokenStore, count: int | None = None) -> list[Prompt]:
    """One for each of the first ``count`` conversations of the store, or of all. ValueError for a store of texts.

    A prompt of preferences comes once, however many there are, with the first answer to it that the store has.
    """
    if store.supervised is None:
        raise ValueError(f"{store.directory} holds texts, which ask nothing: take a source of conversations")
    if store.units is not None:
        return list(islice(_distinct(store), count))
    spans = zip(store.offsets, store.offsets[1:][:count], strict=False)
    return [_prompt(store, start, stop) for start, stop in spans]


def _distinct(store: TokenStore) -> Iterator[Prompt]:
    seen = set()
    for start, length in zip(store.offsets, store.units["second"], strict=False):
        found = _prompt(store, start, start + length)
        if found.prompt_ids.tobytes() not in seen:
            seen.add(found.prompt_ids.tobytes())
            yield found


def _prompt(store: TokenStore, start: int, stop: int) -> Prompt:
    """The last run of supervised tokens is the answer: the role that every turn begins with is not supervised."""
    marks = store.supervised[start:stop]
    end = int(np.flatnonzero(marks)[-1]) + 1
    begin = int(np.flatnonzero(~marks[:end])[-1]) + 1
    tokens = store.tokens[start:stop].astype(np.int32)
    return Prompt(tokens[:begin], tokens[begin:end])
