"""A run's configuration, and the stages it may name: each is an objective and a source of batches for the one loop."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxllm.configure import nearest, section
from jaxllm.data import loader, tokens
from jaxllm.data.config import DataConfig
from jaxllm.evaluate.perplexity import weighed
from jaxllm.model import DecoderConfig, Model, build
from jaxllm.sharding import MeshConfig
from jaxllm.text import prepare as text
from jaxllm.text.special_tokens import PAD_ID
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.train import OptimizerConfig
from jaxllm.train.objectives import ObjectiveConfig, next_token


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """``configs/common.py`` explains each key beside its default."""

    steps: int
    batch_size: int
    micro_batches: int
    log_every: int
    evaluate_every: int
    evaluate_batches: int
    sample_every: int
    sample_prompts: tuple[str, ...]
    sample_tokens: int
    save_every: int
    keep_last: int
    keep_best: int
    tensorboard: bool

    def __post_init__(self):
        periods = ("log_every", "evaluate_every", "save_every")
        least = dict.fromkeys(("steps", "batch_size", "micro_batches", *periods, "sample_tokens", "keep_last"), 1)
        least |= dict.fromkeys(("evaluate_batches", "sample_every", "keep_best"), 0)
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
    tokenizer: text.TokenizerConfig
    data: DataConfig
    model: DecoderConfig
    optimizer: OptimizerConfig
    objective: ObjectiveConfig
    mesh: MeshConfig
    loop: LoopConfig

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"config.stage={self.stage!r} is not a stage{nearest(self.stage, STAGES)}")


class Stage(NamedTuple):
    """What the loop trains: ``objective(params, micro_batch)`` on ``prepare(batch)`` of each of ``batches``."""

    model: Model
    tokenizer: Tokenizer
    batches: Any  # iterator with get_state, set_state and fingerprint
    validation: Any  # re-iterable, finite
    prepare: Callable  # on the device: adds weight_BT over the global batch
    objective: Callable
    report: dict[str, Any]  # counts of what the data became


def run_config(values: Mapping) -> RunConfig:
    """The validated configuration of a run from an ``ml_collections`` config or a mapping; ``ValueError`` names what is
    wrong.
    """
    return section(RunConfig, values)


def pretrain(config: RunConfig, directory: Path) -> Stage:
    """Next-token prediction on documents; the tokenizer and the token cache are made in ``directory`` where they are
    missing.
    """
    tokenizer = text.prepare(config.tokenizer, tokens.training_texts(config.data), directory=directory / "tokenizer")
    stores = tokens.prepare(config.data, tokenizer, directory=config.data.cache or directory / "tokens")
    model = build(config.model.with_vocabulary(tokenizer.vocab_size))
    shape = dict(batch_size=config.loop.batch_size, micro_batches=config.loop.micro_batches, pad_id=PAD_ID)
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    batches = loader.train_batches(stores, config.data, **shape, **processes)
    return Stage(
        model=model,
        tokenizer=tokenizer,
        batches=batches,
        validation=loader.validation_batches(stores, config.data, **shape, **processes),
        prepare=weighed,
        objective=next_token(model, config.objective),
        report={
            name: {"train": store.train.report, "validation": store.validation.report} for name, store in stores.items()
        },
    )


STAGES: dict[str, Callable[[RunConfig, Path], Stage]] = {"pretrain": pretrain}


def limited(batches: Any, count: int) -> Iterator:
    """The first ``count`` of them; all where it is 0."""
    return itertools.islice(batches, count or None)
