"""How much of what a document may have before it is dropped."""

import dataclasses
import math

from jaxllm.configure import nearest


@dataclasses.dataclass(frozen=True)
class Limits:
    """The thresholds of ``filters``, ``lines`` and ``duplicates``; ``HELP`` says what each is.

    These defaults drop only what hardly is text of any kind. ``PRESETS["web"]`` has the published values for pages.
    """

    min_words: int = 3
    max_words: int = 100_000
    min_word_length: float = 2.0
    max_word_length: float = 12.0
    min_stop_words: int = 0
    max_symbols: float = 0.15
    min_alphanumeric: float = 0.5
    min_lettered: float = 0.0
    max_bullets: float = 1.0
    max_ellipses: float = 0.5
    max_repeated_characters: float = 0.2
    max_repeated_lines: float = 0.3
    max_repeated_paragraphs: float = 0.3
    max_top_ngrams: float = 0.2
    max_repeated_ngrams: float = 0.3
    ngram_words: int = 100
    max_boilerplate: float = 0.5
    max_recurring: int = 50
    similarity: float = 0.8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{field.name}={value!r} must be a number of at least 0")
            if field.type is int and value != int(value):
                raise ValueError(f"{field.name}={value!r} must be a whole number")
            if isinstance(field.default, float) and field.default <= 1 < value:
                raise ValueError(f"{field.name}={value!r} is a share: it must be at most 1")
        for least, most in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(
                    f"{least}={getattr(self, least)} is more than {most}={getattr(self, most)}: no document can pass"
                )
        if self.similarity < 0.3:
            raise ValueError(f"similarity={self.similarity} is too low to be found: it must be at least 0.3")


HELP = {
    "min_words": "fewest words of a document",
    "max_words": "most words",
    "min_word_length": "least mean length of its words",
    "max_word_length": "greatest mean length",
    "min_stop_words": "different ones of the, be, to, of, and, that, have, with: nearly every English page has two",
    "max_symbols": "share of characters that markup and code have and prose has not",
    "min_alphanumeric": "share of letters and digits",
    "min_lettered": "share of the words that have a letter",
    "max_bullets": "share of the lines that begin with a bullet",
    "max_ellipses": "share of the lines that end with an ellipsis",
    "max_repeated_characters": "share in runs of the same few characters",
    "max_repeated_lines": "share of the lines, or of their characters, that were there before",
    "max_repeated_paragraphs": "the same of paragraphs",
    "max_top_ngrams": "share of the most frequent two words; of three 0.9 of this, of four 0.8 of it",
    "max_repeated_ngrams": "share in five words in a row that were there before; for ten in a row 2/3 of it",
    "ngram_words": "from so many words on the most frequent are asked: a short life names its hero in each line",
    "max_boilerplate": "share in sentences such as sites have on every page; lines with more of it are removed",
    "max_recurring": "documents that may have the same line before it is removed from all; 0 for any number",
    "similarity": "from which on two documents are near duplicates; 1 for none",
}

# web: Rae et al. 2021 (Gopher, arXiv:2112.11446), section A.1.1 and table A1.
PRESETS = {
    "any": Limits(),
    "web": Limits(
        min_words=50,
        min_word_length=3.0,
        max_word_length=10.0,
        min_stop_words=2,
        max_symbols=0.1,
        min_lettered=0.8,
        max_bullets=0.9,
        max_ellipses=0.3,
        max_repeated_ngrams=0.15,
        ngram_words=0,
    ),
}


def limits(preset: str = "any", **changes: float) -> Limits:
    """A preset, with these thresholds of ``Limits`` changed. Raises ``ValueError`` for what is none."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not one of {tuple(PRESETS)}")
    known = [field.name for field in dataclasses.fields(Limits)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{name} is no threshold{nearest(name, known)}")
    return dataclasses.replace(PRESETS[preset], **changes)
