"""A run's configuration: everything that decides a run, one frozen dataclass per section of the config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from jaxllm import workdir
from jaxllm.configure import section
from jaxllm.data.config import DataConfig
from jaxllm.model import DecoderConfig
from jaxllm.model.config import COMPUTATION
from jaxllm.rl.config import RolloutConfig
from jaxllm.sharding import MeshConfig
from jaxllm.text.prepare import TokenizerConfig
from jaxllm.train import OptimizerConfig
from jaxllm.train.objectives import ObjectiveConfig
from jaxllm.train.policy import PolicyConfig
from jaxllm.train.preferences import PreferenceConfig, RewardConfig


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """``configs/common.py`` explains each key beside its default."""

    steps: int
    batch_size: int
    micro_batches: int
    log_every: int
    evaluate_every: int
    evaluate_first: bool
    evaluate_batches: int
    evaluate_answers: int
    sample_every: int
    sample_prompts: tuple[str, ...]
    sample_tokens: int
    save_every: int
    keep_last: int
    keep_best: int
    best_metric: str
    best_mode: str
    tensorboard: bool

    def __post_init__(self):
        periods = ("log_every", "evaluate_every", "save_every")
        least = dict.fromkeys(("batch_size", "micro_batches", *periods, "sample_tokens", "keep_last"), 1)
        least |= dict.fromkeys(("steps", "evaluate_batches", "evaluate_answers", "sample_every", "keep_best"), 0)
        for key, count in least.items():
            if getattr(self, key) < count:
                raise ValueError(f"loop.{key}={getattr(self, key)} must be at least {count}")
        if self.sample_every and not self.sample_prompts:
            raise ValueError(
                "loop.sample_prompts is empty: give a prompt, or set loop.sample_every=0 to sample nothing"
            )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run: one frozen dataclass per section of the config."""

    stage: str
    seed: int
    start: str
    teacher: str
    reference: str
    tokenizer: TokenizerConfig
    data: DataConfig
    model: DecoderConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    preference: PreferenceConfig
    reward: RewardConfig
    policy: PolicyConfig
    rollout: RolloutConfig
    mesh: MeshConfig
    loop: LoopConfig


def run_config(values: Mapping) -> RunConfig:
    """The validated configuration of a run from an ``ml_collections`` config or a mapping; ``ValueError`` names what is
    wrong.
    """
    return section(RunConfig, values)


def resolved(values: Mapping) -> dict:
    """The config with the architecture and the tokenizer of the run that it starts from, whatever it says of them.

    How the model is computed stays as it says, and whether it has a scalar head and a critic. A run that starts at
    random takes its teacher's tokenizer, if it has one. Raises ``FileNotFoundError`` where there is no such run.
    """
    config, values = run_config(values), dict(values)
    if config.start:
        model = workdir.config(config.start)["model"]
        values["model"] = model | {key: values["model"][key] for key in (*COMPUTATION, "scalar_head", "critic")}
    if other := config.start or config.teacher:
        values["tokenizer"] = workdir.config(other)["tokenizer"] | {"path": str(Path(other) / "tokenizer")}
    return values
