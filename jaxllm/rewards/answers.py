"""What a completion says its answer is, and what number that is: one order of asking, written down here.

What is not clearly one answer is none. Nothing raises, whatever a model says, and every step is linear in the text.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from jaxllm.text.special_tokens import ANSWER, END_ANSWER, END_THINK, THINK

TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
LONGEST_NUMBER = 64  # characters

DEEPEST = 4  # wrappings around an answer that are taken off

# Possessive, so that no run of blanks is gone over twice.
_SAID = re.compile(r"\banswer(?:\s+is\b|\s*[:=])[*_]*+[ \t]*+:?[*_]*+[ \t]*+(?:\n\s*+)?(?=\S)", re.IGNORECASE)
# Of a line, in Markdown: opened after a blank or a sign, so that no product is taken for it.
_EMPHASIS = re.compile(r"(?<![^\s:=])(\*{1,3}+|_{1,3}+)(?=\S)((?:(?!\1)[^\n])++)(?<=\S)\1(?![\w*])")
# A word and what may follow it: a sentence, or words alone.
_FIRST = re.compile(r"(\S+?)(?:[.!?;]\s+[^\W\d_]{2,}.*|[.,!?;:]?(?:\s+[^\W\d_]{2,}[^\d\\=^{}]*)?)")
_SENTENCE_END = re.compile(r"(?<!\b(?:Dr|Mr|Ms|Mt|St))[.!?;](?=\s|$)")
_WRAPPINGS = (("**", "**"), ("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("`", "`"), ('"', '"'))
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff0d": "-"})
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"([+-]?)(?:\\?[$€£¥] ?)?([+-]?)({_UNSIGNED})(?:[eE]([+-]?\d{{1,2}}))?(?: ?[€£¥])?", re.ASCII)
_FRACTION = re.compile(r"([+-]?)(?:(\d+) ?/ ?(\d+)|\\[dt]?frac ?\{(-?\d+)\}\{(\d+)\})", re.ASCII)


class Number(NamedTuple):
    """What a text says: `value`, before a percent sign where there is one."""

    value: Fraction
    percent: bool = False


def extracted(completion: str) -> str | None:
    """The one answer that a completion gives, or None. The first of these that the completion uses at all decides:

    1. tags: what stands between <answer> and </answer>, if each comes exactly once, in order and after any thinking;
    2. without tags, and after any thinking, the rest of the last line with "####" (GSM8K);
    3. the last \\boxed{...}, braces within it balanced;
    4. what follows the last "answer is", "answer:" or "answer =", on its line or else the next, up to the end of its
       sentence, without emphasis;
    5. the whole text, if it is one line.

    Of 2 and 4, a number that only words follow is taken alone: "12 apples" is 12, but "12 or 13" is no number.
    """
    if ANSWER in completion or END_ANSWER in completion:
        return _plain(_between_tags(completion))
    if completion.count(THINK) > completion.count(END_THINK):
        return None  # still thinking
    said = completion.rpartition(END_THINK)[2]
    for mark, read in _MARKS:
        if mark in said:
            return _plain(read(said))
    plain = _EMPHASIS.sub(r"\2", said)
    if phrases := list(_SAID.finditer(plain)):
        sentence = _SENTENCE_END.split(plain[phrases[-1].end() :].partition("\n")[0], maxsplit=1)[0]
        return _plain(_first_number(sentence))
    return _plain(said if "\n" not in said.strip() else None)


def number(text: str) -> Number | None:
    """The number that a text is, and nothing else: 1,234 and $12, -3 and 0.50, 1e3, 1/2 and \\frac{1}{2}, 50%.

    None where it is anything more, or less, or longer than ``LONGEST_NUMBER`` characters.
    """
    text = _unwrapped(text).translate(_MINUS).replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    text = text.removesuffix(".")
    if len(text) > LONGEST_NUMBER:
        return None
    bare = text.removesuffix("%").removesuffix("\\").rstrip() if text.endswith("%") else text
    value = _value(bare)
    return None if value is None else Number(value, percent=bare != text)


def same_number(first: Number, second: Number) -> bool:
    """Whether two numbers are one. 50% is 1/2, and also the 50 of a question that asks for percents."""
    if first.percent == second.percent:
        return first.value == second.value
    percent, plain = (first, second) if first.percent else (second, first)
    return plain.value in (percent.value, percent.value / 100)


def _between_tags(completion: str) -> str | None:
    places = [completion.find(tag) for tag in (ANSWER, END_ANSWER)]
    thinking = max(completion.rfind(tag) for tag in (THINK, END_THINK))
    once = completion.count(ANSWER) == completion.count(END_ANSWER) == 1
    closed = completion.count(THINK) <= completion.count(END_THINK)
    if not (once and closed and thinking < places[0]):
        return None
    return completion[places[0] + len(ANSWER) : places[1]]


def _after_hashes(text: str) -> str:
    return _first_number(text.rpartition("####")[2].partition("\n")[0])


def _first_number(text: str) -> str:
    found = _FIRST.fullmatch(text.strip())
    return found[1] if found and number(found[1]) else text


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return None


_MARKS: tuple[tuple[str, Callable[[str], str | None]], ...] = (("####", _after_hashes), ("\\boxed{", _boxed))


def _plain(answer: str | None) -> str | None:
    """An answer without what it is wrapped in; None where nothing is left."""
    return (_unwrapped(answer) or None) if answer is not None else None


def _unwrapped(text: str) -> str:
    """Without blanks, emphasis, quotes, mathematics' dollars and a box around the whole."""
    for _ in range(DEEPEST):
        text = text.strip()
        for left, right in _WRAPPINGS:
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
        if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
            text = text[1:-1]
        if text.startswith("\\boxed{") and text.count("\\boxed{") == 1 and _boxed(text) == text[7:-1]:
            text = text[7:-1]
    return text.strip()


def _value(text: str) -> Fraction | None:
    if found := _FRACTION.fullmatch(text):
        sign, *parts = found.groups()
        above, below = (int(part) for part in parts if part is not None)
        return (-1 if sign == "-" else 1) * Fraction(above, below) if below else None
    found = _NUMBER.fullmatch(text)
    if not found or (found[1] and found[2]):
        return None
    value = Fraction(found[3].replace(",", "").removesuffix(".")) * Fraction(10) ** int(found[4] or 0)
    return -value if "-" in (found[1], found[2]) else value
