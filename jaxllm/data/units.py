"""Preferences to units, and units to what a store keeps of them.

A unit is what lies together in a row: the conversation with the better answer and that with the worse; or an answer
alone, and beside it one that answers another prompt. Their prompt is stored once, without its last token: each answer
begins with that, so that all it says is a target.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from math import nan
from typing import NamedTuple

import numpy as np

from jaxllm.data.preferences import Messages, Preference, answered
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import Tokenizer

FORMAT = 2  # raise it when the same preferences would give other units
# What is known of a unit beside its tokens. shared: how many tokens its second document takes from the first, 0 where
# there is none. second: where the rest of it begins; all tokens' number where there is none. differ: place in the
# documents at which they first differ; 0 where they are not to be compared.
UNIT = np.dtype([("shared", "<i8"), ("second", "<i8"), ("differ", "<i8"), ("margin", "<f4"), ("scores", "<f4", (2,))])


class Unit(NamedTuple):
    """One or two answers to a prompt that lie together, by how much the first is better, and the score of each.

    comparable: whether the answers say what is better; not where the second is one to another prompt.
    """

    prompt: Conversation
    first: Messages
    second: Messages = ()
    margin: float = 0.0
    scores: tuple[float, float] = (nan, nan)
    comparable: bool = True

    @property
    def conversations(self) -> list[Conversation]:
        """The documents that it becomes."""
        return [answered(self.prompt, answer) for answer in (self.first, self.second) if answer]


class RenderedUnit(NamedTuple):
    """tokens and supervised of a unit's first document, and of the rest of its second; numbers: those of a UNIT."""

    tokens: np.ndarray
    supervised: np.ndarray
    numbers: tuple


def mismatched(unit: Unit, other: Unit) -> Unit:
    """The unit with the first answer of another beside its own."""
    return unit._replace(second=other.first, comparable=False)


def render(units: Sequence[Unit], tokenizer: Tokenizer) -> list[RenderedUnit]:
    """Each conversation as the chat template has it, its last answer supervised and last, and then EOS.

    EOS is not supervised: it is there so that the end of the answer is an input, where a reward is read.
    """
    documents = [unit.conversations for unit in units]
    rendered = iter(chat.render(list(chain.from_iterable(documents)), tokenizer, turns="last"))
    return [
        _rendered(unit, [next(rendered).trimmed() for _ in own], tokenizer.eos_id)
        for unit, own in zip(units, documents, strict=True)
    ]


def _rendered(unit: Unit, documents: list[chat.Rendered], eos_id: int) -> RenderedUnit:
    ended = [np.append(document.tokens, eos_id).astype(np.int32) for document in documents]
    marks = [np.append(document.supervised, False) for document in documents]
    differ = _first_difference(*ended) if len(ended) == 2 else 0
    shared = min(differ, *map(np.argmax, marks)) - 1 if differ else 0
    numbers = (shared, len(ended[0]), differ if unit.comparable else 0, unit.margin, unit.scores)
    tokens, supervised = (np.concatenate([first, *(x[shared:] for x in rest)]) for first, *rest in (ended, marks))
    return RenderedUnit(tokens, supervised, numbers)


def _first_difference(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _paired(preference: Preference) -> list[Unit]:
    both = (preference.chosen, preference.chosen_score), (preference.rejected, preference.rejected_score)
    (first, score), (second, other) = both if preference.chosen else both[::-1]
    return [Unit(preference.prompt, first, second, preference.margin, (score, other))]


def _alone(preference: Preference) -> list[Unit]:
    both = (preference.chosen, 1.0), (preference.rejected, 0.0)
    return [Unit(preference.prompt, answer, scores=(liked, nan)) for answer, liked in both if answer]


# A unit of both answers, or of the one that is known; or one of each.
ANSWERS: dict[str, Callable[[Preference], list[Unit]]] = {"paired": _paired, "alone": _alone}
