"""Which training documents to keep, where less is more: ranked by a number of each, or chosen far apart.

What a smaller choice keeps lies within what a larger one keeps, so that a sweep over `keep` compares nested sets.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from jaxllm.data import minhash
from jaxllm.data.config import SourceConfig
from jaxllm.data.examples import TRAIN, Example
from jaxllm.text import chat

Labelled = Iterator[tuple[str, Example]]


def selected(labelled: Callable[[], Labelled], source: SourceConfig) -> Labelled:
    """The labelled examples, those for training that the source does not select labelled "not_selected".

    They are read twice, and never held together. Raises ValueError where there are fewer than are to be kept.
    """
    if source.select == "all":
        return labelled()
    feature, choose = CHOICES[source.select]
    features = np.array([feature(example, source.select_seed) for label, example in labelled() if label == TRAIN])
    count = int(source.keep) if source.keep >= 1 else round(source.keep * len(features))
    if not 0 < count <= len(features):
        raise ValueError(f"keep={source.keep} of the {len(features)} training documents of {source.path}: change keep")
    kept = np.zeros(len(features), bool)
    kept[choose(features, count)] = True
    return _marked(labelled(), iter(kept))


def _marked(labelled: Labelled, kept: Iterator[bool]) -> Labelled:
    for label, example in labelled:
        yield label if label != TRAIN or next(kept) else "not_selected", example


def _answer_length(example: Example, seed: int) -> int:
    """Characters that are learned: long answers alone beat many (Zhao et al. 2024, arXiv 2402.04833)."""
    if isinstance(example.content, str):
        return len(example.content)
    return sum(len(chat.text(chat.responses(each))) for each in example.conversations)


def _lot(example: Example, seed: int) -> int:
    drawn = hashlib.blake2b(f"{seed} {example.key}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "little", signed=True)


def _score(example: Example, seed: int) -> float:
    return example.score


def _signature(example: Example, seed: int) -> np.ndarray:
    return minhash.signature(minhash.runs(example.text), length=64)


def _highest(features: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(features, kind="stable")[::-1][:count]


def _lowest(features: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(features, kind="stable")[:count]


def _far_apart(signatures: np.ndarray, count: int) -> list[int]:
    """Greedily, from the first document on: always the one least similar to what it is most similar to so far."""
    chosen, nearest = [0], np.zeros(len(signatures))
    while len(chosen) < count:
        nearest = np.maximum(nearest, np.mean(signatures == signatures[chosen[-1]], axis=1))
        nearest[chosen[-1]] = 2.0  # more than any similarity, so that it is not chosen again
        chosen.append(int(np.argmin(nearest)))
    return chosen


CHOICES: dict[str, tuple[Callable, Callable]] = {
    "longest": (_answer_length, _highest),
    "random": (_lot, _highest),
    "diverse": (_signature, _far_apart),
    "highest": (_score, _highest),
    "lowest": (_score, _lowest),
}
