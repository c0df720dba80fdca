"""Documents that are there already, said alike or nearly so: the first of them is kept.

As in Lee et al. 2022 (arXiv:2107.06499, section 4.2): candidates are found by locality-sensitive hashing of MinHash
signatures (Broder 1997), and are near duplicates where the sets of their runs of words are as similar, and the words in
their order too. The same sentences in another order are another document.
"""

import difflib
import hashlib
import unicodedata
from collections import defaultdict

import numpy as np

from jaxllm.data import minhash

LENGTH = 128  # of a signature
MISSED = 1e-3  # most, of the pairs at the threshold, that are no candidates
CROWD = 100  # documents with the same band, beyond which further ones are not found by it: it tells nothing


def bands(similarity: float) -> int:
    """Into how many a signature is cut: the fewest with which less than ``MISSED`` of such pairs share none."""
    rows = [2**power for power in range(LENGTH.bit_length())]
    fit = [each for each in rows if (1 - similarity**each) ** (LENGTH // each) < MISSED]
    return LENGTH // max(fit)


class Exact:
    """The texts so far, by what they say but for case, blanks and how a character is encoded."""

    def __init__(self):
        self._first: dict[bytes, int] = {}

    def before(self, number: int, text: str) -> int | None:
        """The number of the first document with this text; None, where it is this one."""
        said = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        first = self._first.setdefault(hashlib.blake2b(said.encode(), digest_size=16).digest(), number)
        return None if first == number else first


class Near:
    """The texts so far that were like none before; in memory, about as large as the texts, at most."""

    def __init__(self, similarity: float):
        self._similarity = similarity
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._places: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(bands(similarity))]

    def before(self, number: int, text: str) -> int | None:
        """The number of the first document that was kept and is as similar; None where this one is kept."""
        if self._similarity >= 1:
            return None
        runs, words = minhash.runs(text), _words(text)
        sketch, signature = minhash.sketch(runs), minhash.signature(runs, length=LENGTH)
        cut = [band.tobytes() for band in signature.reshape(len(self._places), -1)]
        candidates = {other for band, place in zip(cut, self._places, strict=True) for other in place.get(band, ())}
        for other in sorted(candidates):
            known, said = self._kept[other]
            if minhash.resemblance(sketch, known) >= self._similarity and unedited(words, said) >= self._similarity:
                return other
        self._kept[number] = sketch, words
        for band, place in zip(cut, self._places, strict=True):
            if len(place[band]) < CROWD:
                place[band].append(number)
        return None


def unedited(first: np.ndarray, second: np.ndarray) -> float:
    """1 less the edits that make one of the other, over the longer length: "EditSim" of Lee et al., of words.

    The edits are those that ``difflib`` finds, never fewer than are needed.
    """
    changes = difflib.SequenceMatcher(None, first.tolist(), second.tolist(), autojunk=False).get_opcodes()
    edits = sum(max(end - start, stop - begin) for tag, start, end, begin, stop in changes if tag != "equal")
    return 1 - edits / max(len(first), len(second))


def _words(text: str) -> np.ndarray:
    """A number for each word: of the hash of four bytes, so that no text is held."""
    words = (hashlib.blake2b(word.encode(), digest_size=4).digest() for word in text.lower().split())
    return np.frombuffer(b"".join(words), "<u4")
