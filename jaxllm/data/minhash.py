"""How alike two texts are, by the runs of words that they share: a sketch of each is enough to tell.

The measure is the Jaccard index of the two sets of runs, "resemblance" in Broder 1997, "On the resemblance and
containment of documents".
"""

import hashlib

import numpy as np

WORDS = 3  # of a run
PERMUTATIONS = 256  # that there are numbers for
SKETCH = 1024
# Each block of 64 draws its factors, then its terms, so that a longer signature begins with the shorter one.
_DRAWN = np.random.default_rng(0).integers(1 << 63, size=(PERMUTATIONS // 64, 2, 64), dtype=np.uint64)
_FACTORS, _TERMS = _DRAWN[:, 0].reshape(-1) | 1, _DRAWN[:, 1].reshape(-1)


def runs(text: str) -> np.ndarray:
    """A uint64 for each run of ``WORDS`` words that the text has, sorted; a shorter text is one run."""
    words = text.lower().split()
    found = {" ".join(words[start : start + WORDS]) for start in range(max(len(words) - WORDS, 0) + 1)}
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in found)
    return np.sort(np.frombuffer(digests, "<u8"))


def signature(runs: np.ndarray, *, length: int) -> np.ndarray:
    """MinHash: the share of equal places of two is their texts' resemblance within about 1 / sqrt(length).

    runs: of ``runs``. length: of the uint32 array that is returned, at most ``PERMUTATIONS``.
    """
    permuted = runs[:, None] * _FACTORS[:length] + _TERMS[:length]
    return (permuted >> np.uint64(32)).min(axis=0).astype(np.uint32)


def sketch(runs: np.ndarray) -> np.ndarray:
    """What ``resemblance`` needs of a text: the smallest so many of its sorted ``runs``."""
    return runs[:SKETCH]


def resemblance(first: np.ndarray, second: np.ndarray) -> float:
    """Runs in both texts over runs in either, of the ``sketch`` of each: exact where neither was cut, else within about
    1 / sqrt(SKETCH), as of what both sketches reach to (Broder 1997, section 3).
    """
    reach = min((known[-1] for known in (first, second) if len(known) == SKETCH), default=np.uint64(2**64 - 1))
    one, other = (
        len(known) if known[-1] <= reach else np.searchsorted(known, reach, "right") for known in (first, second)
    )
    both = len(np.intersect1d(first[:one], second[:other], assume_unique=True))
    return both / (one + other - both)
