import math

import numpy as np
import pytest

from jaxllm.data import units
from jaxllm.data.preferences import Preference
from jaxllm.data.units import ANSWERS, UNIT, Unit
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import ASSISTANT, EOS_ID, SPECIAL_TOKENS
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPT = Conversation(
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"})
)
OTHER = Conversation(({"role": "user", "content": "z"},))


def said(text):
    return ({"role": "assistant", "content": text},)


def document(prompt, answer):
    return chat.render([Conversation((*prompt.messages, *answer))], TOKENIZER, turns="last")[0]


def test_a_unit_is_a_prompt_and_two_answers_each_ended_and_only_these_are_supervised():
    unit = Unit(PROMPT, said("good"), said("bad answer"), 2.5, (4.0, 1.0))
    (found,) = units.render([unit], TOKENIZER)
    first, second = document(PROMPT, unit.first), document(PROMPT, unit.second)
    shared = len(chat.prompt(PROMPT, TOKENIZER)) - 1
    assert found.tokens.tolist() == [*first.tokens, EOS_ID, *second.tokens[shared:], EOS_ID]
    assert found.supervised.tolist() == [*first.supervised, False, *second.supervised[shared:], False]
    assert found.tokens[shared] == found.tokens[len(first.tokens) + 1] == SPECIAL_TOKENS.index(ASSISTANT)
    assert found.tokens.dtype == np.int32 and found.supervised.dtype == bool
    spoken = TOKENIZER.decode(found.tokens[found.supervised].tolist())
    assert spoken == "good<|end|>bad answer<|end|>"
    number = np.array([found.numbers], UNIT)[0]
    assert (number["shared"], number["second"]) == (shared, len(first.tokens) + 1)
    assert (number["margin"], number["scores"].tolist()) == (2.5, [4.0, 1.0])


def test_what_a_template_writes_behind_an_answer_is_no_part_of_it(theirs):
    """Of these two one writes a newline behind the end of a turn: the end must be the last input, where a reward is."""
    for name in ("qwen", "llama3"):
        tokenizer = theirs(name)
        (found,) = units.render([Unit(PROMPT, said("good"), said("bad"))], tokenizer)
        shared, second = found.numbers[:2]
        assert shared == len(chat.prompt(PROMPT, tokenizer)) - 1
        for document in (found.tokens[:second], found.tokens[second:]):
            assert document[-2:].tolist() == [tokenizer.end_id, tokenizer.eos_id]
        assert found.tokens[shared] == found.tokens[second]
        spoken = tokenizer.decode(found.tokens[found.supervised].tolist())
        assert spoken == "".join(text + tokenizer.special_tokens[tokenizer.end_id] for text in ("good", "bad"))


def test_answers_of_several_turns_share_what_they_have_in_common_before_either_is_supervised():
    """Up to where they differ, whether that is in a turn of the user's or in what the assistant says at last."""
    turns = [*said("first"), {"role": "user", "content": "more"}]
    other = [*said("first"), {"role": "user", "content": "mole"}]
    long, short = (*turns, *said("y")), said("first")
    for first, second, last in (
        (long, (*turns, *said("z")), ASSISTANT), (long, (*other, *said("y")), "o"),
        (long, short, ASSISTANT), (short, long, ASSISTANT),
    ):  # fmt: skip
        (found,) = units.render([Unit(OTHER, first, second)], TOKENIZER)
        a, b = (document(OTHER, answer) for answer in (first, second))
        shared = found.numbers[0]
        assert found.tokens.tolist() == [*a.tokens, EOS_ID, *b.tokens[shared:], EOS_ID]
        assert np.array_equal(a.tokens[: shared + 1], b.tokens[: shared + 1])
        assert not a.supervised[: shared + 1].any() and not b.supervised[: shared + 1].any()
        assert TOKENIZER.decode([int(a.tokens[shared])]) == last


@pytest.mark.parametrize(
    ("first", "second"), [("good", "bad"), ("good", "goodness"), ("goodness", "good"), ("same", "same"), ("x", "y")]
)
def test_where_two_documents_first_differ(first, second):
    (found,) = units.render([Unit(PROMPT, said(first), said(second))], TOKENIZER)
    a, b = ([*document(PROMPT, said(text)).tokens, EOS_ID] for text in (first, second))
    expected = next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    assert found.numbers[2] == expected


def test_a_lone_document_has_no_second():
    lone, pair = Unit(PROMPT, said("good"), scores=(1.0, math.nan)), Unit(PROMPT, said("b"), said("c"))
    found, after = units.render([lone, pair], TOKENIZER)
    assert found.numbers[:3] == (0, len(found.tokens), 0)
    assert len(found.tokens) == len(document(PROMPT, lone.first).tokens) + 1
    assert after.numbers[1] == len(document(PROMPT, pair.first).tokens) + 1 < len(after.tokens)


def test_paired_answers_are_a_unit_and_one_that_is_known_alone_comes_first():
    both = Preference(PROMPT, said("good"), said("bad"), 2.0, 4.0, 2.0)
    assert ANSWERS["paired"](both) == [Unit(PROMPT, said("good"), said("bad"), 2.0, (4.0, 2.0))]
    (disliked,) = ANSWERS["paired"](Preference(PROMPT, rejected=said("bad"), rejected_score=0.0))
    assert disliked[:4] == (PROMPT, said("bad"), (), 0.0) and disliked.scores[0] == 0 and math.isnan(disliked.scores[1])
    (liked,) = ANSWERS["paired"](Preference(PROMPT, said("good"), chosen_score=3.0))
    assert liked[:3] == (PROMPT, said("good"), ()) and liked.scores[0] == 3 and math.isnan(liked.scores[1])


def test_answers_alone_are_a_unit_each_of_score_1_or_0():
    both = ANSWERS["alone"](Preference(PROMPT, said("good"), said("bad"), 2.0, 4.0, 2.0))
    assert [(unit.first, unit.second, unit.margin, unit.scores[0]) for unit in both] == [
        (said("good"), (), 0.0, 1.0), (said("bad"), (), 0.0, 0.0),
    ]  # fmt: skip
    assert all(math.isnan(unit.scores[1]) for unit in both)
    (alone,) = ANSWERS["alone"](Preference(PROMPT, rejected=said("bad")))
    assert alone.first == said("bad") and alone.scores[0] == 0


def test_a_mismatched_answer_lies_beside_and_is_not_compared():
    unit = units.mismatched(Unit(PROMPT, said("yes"), scores=(1.0, math.nan)), Unit(OTHER, said("yes"), said("no")))
    assert (unit.prompt, unit.first, unit.second) == (PROMPT, said("yes"), said("yes"))
    (found,) = units.render([unit], TOKENIZER)
    shared, second, differ, *_ = found.numbers
    assert differ == 0 and shared == len(chat.prompt(PROMPT, TOKENIZER)) - 1
    assert np.array_equal(found.tokens[shared:second], found.tokens[second:])
