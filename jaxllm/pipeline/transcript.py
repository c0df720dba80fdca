"""What every stage's model answered to the same questions, as markup for the report: escaped, and marked where it holds
what was expected.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

View = dict[str, Any]

LONGEST = 600  # characters of an answer that are shown before the rest is folded away
_THOUGHT = re.compile(r"(<think>.*?(?:</think>|\Z))", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
_TAG = r"</?[A-Za-z_]+>|<\|[^<>|\s]+\|>"
_NEVER = r"(?!)"


def transcript(questions: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Any]]) -> list[View]:
    """Each question with what every stage of ``answers`` made of it, in their order.

    What a question has as "expected" is a text, several of which each is right, or None.
    """
    return [
        {
            "prompt": question.get("prompt") or "",
            "expected": expectations(question.get("expected")),
            "continued": question.get("kind") == "text",
            "answers": [
                {"stage": stage, **_answer(given, place, question.get("expected"))} for stage, given in answers.items()
            ],
        }
        for place, question in enumerate(questions)
    ]


def telling(asked: Sequence[View]) -> View | None:
    """The question that the fewest stages answer as expected: the last among those, and not the first. None without."""
    found = [each for each in asked if each["answers"] and each["answers"][-1]["right"]]
    found = [each for each in found if not each["answers"][0]["right"]]
    return min(found, key=lambda each: sum(answer["right"] for answer in each["answers"]), default=None)


def expectations(expected: Any) -> tuple[str, ...]:
    """The texts of which each is right: none, one or several."""
    several = [expected] if isinstance(expected, str) else expected or []
    return tuple(text for text in map(str, several) if text.strip())


def holds(text: str, expected: Any) -> bool:
    """Whether expected words occur in the answer: between its tags, where it has them; else outside its thoughts."""
    answer = _ANSWER.search(text)
    said = answer[1] if answer else _THOUGHT.sub(" ", text)
    return re.search(_words(expectations(expected)), said, re.IGNORECASE) is not None


def marked(text: str, expected: Any) -> Markup:
    """The answer with its tags, its thoughts and the expected words made visible."""
    words = _words(expectations(expected))
    parts = []
    for place, part in enumerate(_THOUGHT.split(text)):
        thought = place % 2 == 1
        around = '<span class="thought">{}</span>' if thought else "{}"
        parts.append(Markup(around).format(_tagged(part, _NEVER if thought else words)))
    return Markup("").join(parts)


def _answer(given: Sequence[Any], place: int, expected: Any) -> View:
    text = given[place] if place < len(given) else None
    said = "" if text is None else str(text).strip()
    # A few characters more are not worth folding away.
    shown = said if len(said) <= 1.2 * LONGEST else said[:LONGEST]
    return {
        "asked": text is not None,
        "right": holds(said, expected),
        "shown": marked(shown, expected),
        "rest": marked(said[len(shown) :], expected),
    }


def _tagged(text: str, words: str) -> Markup:
    parts, end = [], 0
    for found in re.finditer(f"(?P<tag>{_TAG})|{words}", text, re.IGNORECASE):
        around = '<span class="tag">{}</span>' if found["tag"] else "<mark>{}</mark>"
        parts += [escape(text[end : found.start()]), Markup(around).format(found[0])]
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


@functools.lru_cache
def _words(expected: tuple[str, ...]) -> str:
    """A pattern of any of the texts as whole words, whatever is between them; the longest is tried first."""
    each = (r"\s+".join(map(re.escape, text.split())) for text in sorted(expected, key=len, reverse=True))
    found = "|".join(each)
    return rf"(?<!\w)(?:{found})(?!\w)" if found else _NEVER
