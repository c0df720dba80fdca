"""What a rollout is: which problems are asked, how they are answered, and what an answer is worth."""

import dataclasses
from collections.abc import Mapping

from jaxllm.configure import nearest, section
from jaxllm.data.problems import ProblemSource
from jaxllm.generate import SamplerConfig
from jaxllm.rewards.scoring import Term
from jaxllm.rl.tools import TOOLS


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """``configs/common.py`` explains each key beside its default."""

    sources: Mapping[str, ProblemSource]
    rewards: Mapping[str, Term]
    completions: int
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    validation_temperature: float
    slots: int
    refill_rounds: int
    tools: tuple[str, ...]
    turns: int
    workers: int
    time_limit: float
    shown: int

    def __post_init__(self):
        for key, cls in (("sources", ProblemSource), ("rewards", Term)):
            given = {
                name: each if isinstance(each, cls) else section(cls, each, path=f"config.rollout.{key}.{name}")
                for name, each in getattr(self, key).items()
            }
            object.__setattr__(self, key, given)
        least = dict(completions=1, max_prompt_tokens=1, max_new_tokens=1, turns=1, slots=0, refill_rounds=0, workers=0)
        for key, count in (least | {"shown": 0}).items():
            if getattr(self, key) < count:
                raise ValueError(f"rollout.{key}={getattr(self, key)} must be at least {count}")
        for key in ("temperature", "time_limit"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ValueError(f"rollout.{key}={getattr(self, key)} must be positive and finite")
        for temperature in (self.temperature, self.validation_temperature):
            SamplerConfig(temperature)
        for name in self.tools:
            if name not in TOOLS:
                raise ValueError(f"rollout.tools has {name!r}, which is no tool{nearest(name, TOOLS)}")
        if self.tools and self.turns < 2:
            raise ValueError(f"rollout.turns={self.turns} leaves no turn after a tool's: set 2 or more")
