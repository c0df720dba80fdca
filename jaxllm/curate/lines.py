"""Lines that are no part of what a page says: notices of its site, and what recurs on many pages.

After the line filters of C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2), by sentences: a paragraph that merely
mentions a privacy policy stays.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

PHRASES = (
    *("use cookies", "uses cookies", "accept cookies", "accept all cookies", "reject all cookies", "manage cookies"),
    *("cookie policy", "cookie settings", "cookie notice", "cookie preferences", "cookie consent"),
    *("subscribe to", "subscribe now", "subscribe today", "unsubscribe", "newsletter", "in your inbox"),
    *("sign up for", "sign up to", "sign up now", "sign up today", "sign up free", "sign up here", "register now"),
    *("log in to", "sign in to", "to leave a comment", "first to comment", "people like this"),
    *("copyright ©", "copyright (c)", "copyright 19", "copyright 20", "©", "all rights reserved"),
    *("may be copied", "may be reproduced", "may not be reproduced", "may not be copied", "may not be republished"),
    *("terms of use", "terms of service", "terms and conditions", "privacy policy", "privacy notice"),
    *("enable javascript", "javascript is disabled", "javascript is required", "javascript must be enabled"),
    *("click here", "skip to content", "skip to main content", "back to top", "read more", "powered by"),
    *("related articles", "related posts", "related stories", "advertisement", "lorem ipsum"),
    *("follow us", "share this", "share on"),
)
_SENTENCE = re.compile(r"[^.!?|\n]*[.!?|\n]*\s*")
_FEWEST_WORDS = 4  # of a line that can recur: braces of code and one-word answers are left alone


class Cut(NamedTuple):
    """A text without the lines that were removed from it."""

    text: str
    removed: list[str]


def has_phrase(text: str) -> bool:
    lowered = text.lower()
    return any(phrase in lowered for phrase in PHRASES)


def boilerplate(text: str) -> float:
    """The share of a text in sentences with one of ``PHRASES``."""
    if not has_phrase(text):
        return 0.0
    return sum(len(sentence) for sentence in _SENTENCE.findall(text) if has_phrase(sentence)) / len(text)


def without_boilerplate(text: str, most: float) -> Cut:
    """The text without the lines that have a larger share of boilerplate."""
    if not has_phrase(text):
        return Cut(text, [])
    return without(text, lambda line: boilerplate(line) > most)


def without(text: str, unwanted: Callable[[str], bool]) -> Cut:
    """The text without the lines that are not wanted; all else, ends of lines included, stays as it was."""
    said = text.splitlines()
    removed = [line for line in said if line.strip() and unwanted(line)]
    if not removed:
        return Cut(text, removed)
    gone = set(removed)
    whole = zip(said, text.splitlines(keepends=True), strict=True)
    return Cut("".join(with_end for line, with_end in whole if line not in gone), removed)


def keys(text: str) -> Iterator[bytes]:
    """A key of each line that can recur, once each: equal but for blanks and case."""
    return iter({key(line): None for line in text.splitlines() if len(line.split()) >= _FEWEST_WORDS})


def key(line: str) -> bytes:
    return hashlib.blake2b(" ".join(line.lower().split()).encode(), digest_size=8).digest()
