"""Rules for how an answer is given, whatever it says: polite, concise, on the topic, each 0 or 1.

They are the taste that `data.world` plants, and the judge from outside of what was learned from it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.text.chat import Conversation

Rule = Callable[[Conversation, str, Mapping[str, Any]], float]
LONGEST_CONCISE = 16  # words
TOPICAL = 0.5  # least share of the question's words that an answer to it takes up
_WORD = re.compile(r"[^\W_]+")
_COURTESY = re.compile(
    r"\b(thank you|thanks|please|glad(ly)?|happy to|of course|certainly|(my|a) pleasure|you are welcome|hope this)\b"
)
_RUDENESS = re.compile(r"\b(obvious(ly)?|everyone knows|silly|stupid|whatever|look it up|do not bother|bother me)\b")
_EMPTY = frozenset(
    "a an and are at by can did do does for from has have her his how in is it its me my of on or please tell that the"
    " their they this to was were what when where which who whom whose why will with would you your".split()
)


def polite(prompt: Conversation, completion: str, record: Mapping[str, Any]) -> float:
    """1 where a courtesy is said and nothing rude."""
    said = " ".join(_WORD.findall(completion.lower()))
    return float(bool(_COURTESY.search(said)) and not _RUDENESS.search(said))


def concise(prompt: Conversation, completion: str, record: Mapping[str, Any]) -> float:
    """1 for at most ``LONGEST_CONCISE`` words, and at least one."""
    return float(0 < len(_WORD.findall(completion)) <= LONGEST_CONCISE)


def on_topic(prompt: Conversation, completion: str, record: Mapping[str, Any]) -> float:
    """1 where at least the share ``TOPICAL`` of the words of the last question, but for those that every question has,
    comes again in the answer. Of a question without such words every answer that has a word is.
    """
    asked, said = _content(_question(prompt)), set(_WORD.findall(completion.lower()))
    return float(bool(said) and len(asked & said) >= TOPICAL * len(asked))


def style(prompt: Conversation, completion: str, record: Mapping[str, Any]) -> float:
    """How many of the three an answer is, from 0 to 3."""
    return sum(parts(prompt, completion, record).values())


def parts(prompt: Conversation, completion: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Each of the three by its name."""
    return {rule.__name__: rule(prompt, completion, record) for rule in (polite, concise, on_topic)}


RULES: dict[str, Rule] = {rule.__name__: rule for rule in (style, polite, concise, on_topic)}


def _question(prompt: Conversation) -> str:
    return next((message["content"] for message in reversed(prompt.messages) if message["role"] == "user"), "")


def _content(text: str) -> set[str]:
    """The words of more than one letter that not every question has: names, and what is asked about them."""
    return {word for word in _WORD.findall(text.lower()) if len(word) > 1} - _EMPTY
