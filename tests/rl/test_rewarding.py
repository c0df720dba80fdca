import math

import numpy as np
import pytest

from jaxllm.data.problems import Problem
from jaxllm.rewards.scoring import Term
from jaxllm.rl import rewarding
from jaxllm.rl.layout import Sample
from jaxllm.rl.rewarding import Rewarding
from jaxllm.rl.sampling import Sampled
from jaxllm.text.chat import Conversation

PROBLEMS = [
    Problem(Conversation(({"role": "user", "content": text},)), {"task": "addition", "answer": answer})
    for text, answer in (("2+2=?", "4"), ("3+4=?", "7"))
]


def said(text, ended=True):
    tokens = np.arange(len(text), dtype=np.int32)
    sampled = np.ones(len(text), bool)
    return Sampled(Sample((2,), tokens, sampled, np.zeros(len(text), np.float32)), text, ended)


def judged(terms, texts, workers=0):
    found = Rewarding(terms, workers=workers, time_limit=30.0)
    answers = [said(text) for text in texts]
    found.begin()
    for number, answer in enumerate(answers):
        found.submit(number, PROBLEMS[number * len(PROBLEMS) // len(texts)], answer, 64)
    verdicts = found.verdicts(PROBLEMS, answers)
    found.close()
    return verdicts


TEXTS = ["<think>2+2=4</think><answer>4</answer>", "5", "<answer>7</answer>", "<think>no</think><answer>6</answer>"]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_reward_is_the_weighted_sum_of_its_parts(workers):
    terms = {"right": Term("accuracy"), "form": Term("format", weight=0.2), "watched": Term("format", weight=0.0)}
    verdicts = judged(terms, TEXTS, workers)
    assert [verdict.reward for verdict in verdicts] == pytest.approx([1.2, 0.0, 1.0, 0.2])
    assert [verdict.values["right"] for verdict in verdicts] == [1, 0, 1, 0]
    assert verdicts[0].values["watched"] == 1 and not any(verdict.failure for verdict in verdicts)


def test_what_a_model_says_of_an_answer_is_a_part_too(monkeypatch):
    asked = []

    def learned(path):
        def worth(prompts, texts):
            asked.append((path, [prompt.messages[-1]["content"] for prompt in prompts], texts))
            return [np.arange(len(each), dtype=float) + 10 * number for number, each in enumerate(texts)]

        return worth

    monkeypatch.setitem(rewarding.LEARNED, "model", learned)
    verdicts = judged({"right": Term("accuracy"), "taste": Term("model", weight=0.5, path="runs/rm")}, TEXTS)
    assert [verdict.reward for verdict in verdicts] == pytest.approx([1.0, 0.5, 6.0, 5.5])
    assert asked == [("runs/rm", ["2+2=?", "3+4=?"], [TEXTS[:2], TEXTS[2:]])]


def test_a_rule_that_fails_is_no_reward_of_0(monkeypatch):
    from jaxllm.rewards import scoring

    def broken(prompt, completion, record):
        raise KeyError("gone")

    monkeypatch.setitem(scoring.RULES, "style", broken)
    verdicts = judged({"taste": Term("style")}, TEXTS[:2])
    assert all(math.isnan(verdict.reward) and "gone" in verdict.failure for verdict in verdicts)
