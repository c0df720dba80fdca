"""What is told of a rollout: numbers for the log, a table of completions, and warnings of what is likely wrong."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.problems import Problem
from jaxllm.rl.rewarding import Verdict
from jaxllm.rl.sampling import Sampled


class Group(NamedTuple):
    """A problem, the completions of it, and what they are worth."""

    problem: Problem
    answers: list[Sampled]
    verdicts: list[Verdict]

    @property
    def rewards(self) -> np.ndarray:
        return np.array([verdict.reward for verdict in self.verdicts], np.float32)

    @property
    def is_decided(self) -> bool:
        """Whether some completions are worth more than others: else a group has nothing to teach."""
        finite = self.rewards[np.isfinite(self.rewards)]
        return len(finite) > 1 and finite.min() < finite.max()


def measured(groups: Sequence[Group]) -> dict[str, float]:
    """Of a rollout: rewards and lengths."""
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    answers = [answer for group in groups for answer in group.answers]
    lengths = [len(answer.sample.tokens) for answer in answers]
    parts = {name for verdict in verdicts for name in verdict.values}
    return {
        "reward": _mean(verdict.reward for verdict in verdicts),
        **{
            f"reward/{name}": _mean(verdict.values.get(name, math.nan) for verdict in verdicts)
            for name in sorted(parts)
        },
        "reward_failures": sum(bool(verdict.failure) for verdict in verdicts) / len(verdicts),
        "completion_tokens": _mean(lengths),
        "completion_tokens_max": float(max(lengths)),
        "clipped_fraction": _mean(not answer.ended for answer in answers),
    }


def undecided(groups: Sequence[Group]) -> float:
    """The share of groups that have nothing to teach."""
    return _mean(not group.is_decided for group in groups)


def failures(groups: Sequence[Group]) -> list[str]:
    """Why rewards failed, each reason once."""
    found = (verdict.failure for group in groups for verdict in group.verdicts if verdict.failure)
    return [f"a reward failed: {failure}" for failure in dict.fromkeys(found)]


def shown(group: Group) -> list[dict[str, Any]]:
    """A row of the table of completions for each of a group's."""
    question = group.problem.prompt.messages[-1]["content"]
    return [
        {"prompt": question, "text": answer.text, "reward": verdict.reward, **verdict.values}
        for answer, verdict in zip(group.answers, group.verdicts, strict=True)
    ]


def _mean(values: Iterable[float]) -> float:
    """Of the finite ones."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def explained_variance(returns: np.ndarray, values: np.ndarray) -> float:
    """1 - Var(return - value) / Var(return): 1 for a critic that knows, 0 for one that says a constant. NaN where the
    returns are all the same, or none.
    """
    variance = float(np.var(returns)) if len(returns) else 0.0
    return 1 - float(np.var(returns - values)) / variance if variance > 0 else math.nan


def warnings(told: Mapping[str, float]) -> list[str]:
    """What is likely wrong with a run that tells these numbers."""
    found = {
        "most completions are cut at rollout.max_new_tokens": told["clipped_fraction"] > 0.5,
        "nearly no completion ends by itself": told["clipped_fraction"] > 0.95,
        "in most groups every completion is worth the same, so nothing is learned": told.get("undecided", 0) > 0.9,
        "the estimate of the KL is below 0: sampler and trainer disagree": "kl" in told and told["kl"] < -0.05,
    }
    return [text for text, holds in found.items() if holds]
