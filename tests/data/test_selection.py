import pytest

from jaxllm.data.config import SourceConfig
from jaxllm.data.examples import TRAIN, VALIDATION, Example, content_key
from jaxllm.data.selection import selected
from jaxllm.data.units import Unit
from jaxllm.text.chat import Conversation


def chat(asked, answer):
    return Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": answer}))


def kept(contents, select, keep, scores=None, **fields):
    """Indices of the training examples that are selected; every third example is held out and must stay so."""
    score_field = "score" if scores else ""
    source = SourceConfig("a.jsonl", select=select, keep=keep, score_field=score_field, **fields)
    examples = [
        Example(content, content_key(str(content)), score=(scores or contents)[i] if scores else 0.0)
        for i, content in enumerate(contents)
    ]

    def labelled():
        for example in examples:
            yield VALIDATION, Example("held out, and longer than all the others", score=99.0)
            yield TRAIN, example
            yield "empty", Example()

    found = list(selected(labelled, source))
    assert [label for label, _ in found[0::3]] == [VALIDATION] * len(examples)
    assert [label for label, _ in found[2::3]] == ["empty"] * len(examples)
    assert [example for _, example in found[1::3]] == examples
    assert {label for label, _ in found[1::3]} <= {TRAIN, "not_selected"}
    return [index for index, (label, _) in enumerate(found[1::3]) if label == TRAIN]


def test_all_are_kept_unless_asked_otherwise():
    assert kept(["a", "b", "c"], "all", 0) == [0, 1, 2]


def test_the_longest_are_those_with_the_longest_answers():
    chats = [chat("a" * 50, "b"), chat("a", "b" * 9), chat("a", "b" * 30), chat("a" * 20, "b" * 10)]
    assert kept(chats, "longest", 2) == [2, 3]
    assert kept(["a", "bbb", "cc"], "longest", 1) == [1]


def test_the_longest_units_are_those_whose_answers_together_are():
    def unit(*answers):
        prompt = Conversation(({"role": "user", "content": "a" * 50},))
        return Unit(prompt, *(({"role": "assistant", "content": answer},) for answer in answers))

    assert kept([unit("b" * 9, "c" * 9), unit("b" * 12), unit("b", "c" * 18)], "longest", 2) == [0, 2]


def test_the_highest_and_the_lowest_score_are_kept():
    scores = [3.0, -1.0, 9.0, 0.5]
    assert kept(["a", "b", "c", "d"], "highest", 2, scores) == [0, 2]
    assert kept(["a", "b", "c", "d"], "lowest", 3, scores) == [0, 1, 3]
    assert kept(["a", "b", "c", "d"], "lowest", 0.25, scores) == [1]


def test_random_ones_follow_the_seed_and_a_smaller_choice_lies_within_a_larger():
    texts = [str(i) for i in range(200)]
    few, many, other = kept(texts, "random", 20), kept(texts, "random", 0.5), kept(texts, "random", 20, select_seed=1)
    assert len(few) == len(other) == 20 and len(many) == 100 and set(few) < set(many) and few != other
    assert 70 < sum(few) / 20 < 130 and few == kept(texts, "random", 20)


def test_diverse_ones_lie_far_apart():
    topics = ["the cat sat on the mat and purred", "prices of oil rose by two percent", "add one and two to get three"]
    texts = [f"{topic} {word}" for word in "today again now then so".split() for topic in topics]
    for count in (2, 3):
        found = kept(texts, "diverse", count)
        assert len({index % 3 for index in found}) == count, "two of one topic, while another has none"
    assert kept(texts, "diverse", 15) == list(range(15))
    assert set(kept(texts, "diverse", 4)) > set(kept(texts, "diverse", 3))


@pytest.mark.parametrize("keep", [4, 0.1])
def test_more_or_less_than_there_is_cannot_be_kept(keep):
    with pytest.raises(ValueError, match=f"keep={keep} of the 3 training documents of a.jsonl: change keep"):
        kept(["a", "b", "c"], "longest", keep)
