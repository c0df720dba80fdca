"""What completions are worth: rules in other processes while the model still samples, learned judges after it."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.data.problems import Problem
from jaxllm.evaluate import judges, rewarding
from jaxllm.rewards import scoring
from jaxllm.rewards.scoring import Term
from jaxllm.rl.sampling import Sampled
from jaxllm.text.chat import Conversation


class Verdict(NamedTuple):
    """reward: the weighted sum of ``values``, NaN where one is missing. failure: why, where a reward failed."""

    reward: float
    values: dict[str, float]
    failure: str = ""


# (prompts, completions of each) -> what each is worth
Learned = Callable[[Sequence[Conversation], Sequence[Sequence[str]]], list[np.ndarray]]


class Rewarding:
    """The rewards of a run, kept ready.

    Rules run in ``workers`` processes, each call for ``time_limit`` seconds at most; with no worker here, unlimited.
    """

    def __init__(self, terms: Mapping[str, Term], *, workers: int, time_limit: float):
        self.terms, self.waited = terms, 0.0
        self._stack = contextlib.ExitStack()
        rules = {name: term for name, term in terms.items() if term.kind not in scoring.LEARNED}
        self._submit = self._stack.enter_context(scoring.pool(rules, workers=workers, time_limit=time_limit))
        self._learned = {name: LEARNED[term.kind](term.path) for name, term in terms.items() if name not in rules}
        self._futures: dict[int, Any] = {}

    def close(self) -> None:
        """Ends the other processes."""
        self._stack.close()

    def begin(self) -> None:
        """Before the first completion of a rollout."""
        self._futures, self.waited = {}, 0.0

    def submit(self, number: int, problem: Problem, answer: Sampled, max_new_tokens: int) -> None:
        """Asks for what the rules say of completion ``number``; ``verdicts`` waits for it."""
        counts = {"completion_tokens": int(answer.sample.sampled.sum()), "max_new_tokens": max_new_tokens}
        record = {**problem.record, **counts, "ended": answer.ended}
        self._futures[number] = self._submit(problem.prompt, answer.text, record)

    def verdicts(self, problems: Sequence[Problem], answers: Sequence[Sampled]) -> list[Verdict]:
        """Of all that were submitted, in their order, as many of each problem; the same on every process."""
        began = time.perf_counter()
        outcomes = [self._futures[number].result() for number in range(len(answers))]
        values = [dict(outcome.values) for outcome in outcomes]
        for name, worth in self._learned.items():
            for each, found in zip(values, self._of_groups(worth, problems, answers), strict=True):
                each[name] = float(found)
        rewards = np.array([scoring.weighted(self.terms, each) for each in values], np.float32)
        if jax.process_count() > 1:  # a time limit may end a call on one of them alone
            rewards = multihost_utils.broadcast_one_to_all(rewards)
        self.waited = time.perf_counter() - began
        return [
            Verdict(float(reward), each, outcome.failure)
            for reward, each, outcome in zip(rewards, values, outcomes, strict=True)
        ]

    def _of_groups(self, worth: Learned, problems: Sequence[Problem], answers: Sequence[Sampled]) -> np.ndarray:
        size = len(answers) // len(problems)
        texts = [[answer.text for answer in answers[cut : cut + size]] for cut in range(0, len(answers), size)]
        return np.concatenate(worth([problem.prompt for problem in problems], texts))


def _model(path: str) -> Learned:
    """Reward models' scores, in standard deviations of their own on held-out answers."""
    score = rewarding.load(path.split(","))

    def worth(prompts, texts):
        asked = [prompt for prompt, each in zip(prompts, texts, strict=True) for _ in each]
        found = score(asked, [text for each in texts for text in each]).mean
        return np.split(found, np.cumsum([len(each) for each in texts])[:-1])

    return worth


def _judge(spec: str) -> Learned:
    """A judge's scores, or the share of a group's other completions that one is better than."""
    judge = judges.load(spec)
    return lambda prompts, texts: judges.points(judge, prompts, texts)[0]


LEARNED = {"model": _model, "judge": _judge}


def identities(terms: Mapping[str, Term]) -> dict[str, str]:
    """What tells the models that reward from all others, by the names of their terms."""
    judged_by = {"model": "reward:{}", "judge": "{}"}
    learned = {name: term for name, term in terms.items() if term.kind in judged_by}
    return {name: judges.identity(judged_by[term.kind].format(term.path)) for name, term in learned.items()}
