"""What makes a text worth dropping, each a pure function of the text and the limits, by the name of the reason.

Most are the rules of Rae et al. 2021 (Gopher, arXiv:2112.11446), section A.1.1 and table A1. Words are what blanks
separate: for a script without blanks, raise ``max_word_length`` and lower ``min_words``.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from jaxllm.curate.limits import Limits

STOP_WORDS = frozenset("the be to of and that have with".split())
SYMBOLS = frozenset("<>{}[]|\\#@~^_$&%*`§¶¦¬°•·…©®™�")
_RUN = re.compile(r"(\S.{0,3}?)\1{4,}")
_BULLETS = ("-", "*", "•", "‣", "·", "–", "o ")
_PARAGRAPH = re.compile(r"\n\s*\n")


class Page:
    """A text, cut once into what several filters look at."""

    def __init__(self, text: str):
        self.text = text
        self.words = text.split()
        self.lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.size = max(sum(map(len, self.words)), 1)  # characters that are not blank

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        return [paragraph.strip() for paragraph in _PARAGRAPH.split(self.text) if paragraph.strip()]

    def share(self, characters: Iterable[str]) -> float:
        """Of the characters that are not blank, those that are among these."""
        return sum(map(self.counts.__getitem__, characters)) / self.size

    @functools.cached_property
    def counts(self) -> Counter[str]:
        return Counter(self.text)


def reason(text: str, limits: Limits) -> str:
    """The name of the first filter that a text does not pass; "" where it passes all."""
    page = Page(text)
    return next((name for name, drops in FILTERS.items() if drops(page, limits)), "")


def _too_short(page: Page, limits: Limits) -> bool:
    return len(page.words) < max(limits.min_words, 1)


def _too_long(page: Page, limits: Limits) -> bool:
    return len(page.words) > limits.max_words


def _word_length(page: Page, limits: Limits) -> bool:
    return not limits.min_word_length <= page.size / len(page.words) <= limits.max_word_length


def _stop_words(page: Page, limits: Limits) -> bool:
    return limits.min_stop_words > 0 and len(STOP_WORDS & set(page.text.lower().split())) < limits.min_stop_words


def _symbols(page: Page, limits: Limits) -> bool:
    return page.share(SYMBOLS) > limits.max_symbols


def _not_alphanumeric(page: Page, limits: Limits) -> bool:
    return bool(page.words) and page.share(filter(str.isalnum, page.counts)) < limits.min_alphanumeric


def _no_letters(page: Page, limits: Limits) -> bool:
    if not limits.min_lettered:
        return False
    lettered = sum(any(map(str.isalpha, word)) for word in page.words)
    return lettered < limits.min_lettered * len(page.words)


def _bullets(page: Page, limits: Limits) -> bool:
    return sum(line.startswith(_BULLETS) for line in page.lines) > limits.max_bullets * len(page.lines)


def _ellipses(page: Page, limits: Limits) -> bool:
    return sum(line.endswith(("...", "…")) for line in page.lines) > limits.max_ellipses * len(page.lines)


def _repeated_characters(page: Page, limits: Limits) -> bool:
    """Runs of five and more of the same one to four characters: "aaaaa", "-=-=-=-=-="."""
    return sum(len(run[0]) for run in _RUN.finditer(page.text)) > limits.max_repeated_characters * page.size


def _repeated_lines(page: Page, limits: Limits) -> bool:
    return _repeated(page.lines) > limits.max_repeated_lines


def _repeated_paragraphs(page: Page, limits: Limits) -> bool:
    return _repeated(page.paragraphs) > limits.max_repeated_paragraphs


def _top_ngrams(page: Page, limits: Limits) -> bool:
    if len(page.words) < limits.ngram_words:
        return False
    return any(_top(page, length) > limits.max_top_ngrams * (1.2 - length / 10) for length in (2, 3, 4))


def _repeated_ngrams(page: Page, limits: Limits) -> bool:
    for length in range(5, 11):
        found = _repeated_words(page, length)
        if not found:
            return False  # what repeats no run repeats no longer one
        if found > limits.max_repeated_ngrams * (20 - length) / 15:
            return True
    return False


FILTERS: dict[str, Callable[[Page, Limits], bool]] = {
    "repeated_characters": _repeated_characters,
    "symbols": _symbols,
    "not_alphanumeric": _not_alphanumeric,
    "too_short": _too_short,
    "too_long": _too_long,
    "word_length": _word_length,
    "no_letters": _no_letters,
    "stop_words": _stop_words,
    "bullets": _bullets,
    "ellipses": _ellipses,
    "repeated_lines": _repeated_lines,
    "repeated_paragraphs": _repeated_paragraphs,
    "top_ngrams": _top_ngrams,
    "repeated_ngrams": _repeated_ngrams,
}


def _repeated(parts: Sequence[str]) -> float:
    """The share of the parts, or of their characters, that were there before, whichever is larger."""
    counts = Counter(parts)
    again = sum(len(part) * (count - 1) for part, count in counts.items())
    return max(1 - len(counts) / max(len(parts), 1), again / max(sum(map(len, parts)), 1))


def _top(page: Page, length: int) -> float:
    """The share of the most frequent run of so many words, where there are two of it."""
    found = Counter(zip(*(page.words[start:] for start in range(length)), strict=False)).most_common(1)
    return max((sum(map(len, words)) * count / page.size for words, count in found if count > 1), default=0.0)


def _repeated_words(page: Page, length: int) -> float:
    """The share of the words, by their characters, in a run of so many that was there before."""
    seen, ends, again = set(), 0, 0
    for start, run in enumerate(zip(*(page.words[first:] for first in range(length)), strict=False)):
        if run in seen:
            again += sum(map(len, page.words[max(start, ends) : start + length]))
            ends = start + length
        seen.add(run)
    return again / page.size
