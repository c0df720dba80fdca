"""A run's configuration, and the stages it may name: each is an objective and a source of batches for the one loop."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxllm import workdir
from jaxllm.configure import nearest, section
from jaxllm.data import loader, tokens
from jaxllm.data.config import DataConfig
from jaxllm.data.prompts import Prompt, prompts
from jaxllm.evaluate.perplexity import weighed
from jaxllm.evaluate.teaching import taught
from jaxllm.generate import SamplerConfig
from jaxllm.model import DecoderConfig, Model, build
from jaxllm.model.config import COMPUTATION
from jaxllm.rl.rollout import on_policy
from jaxllm.sharding import MeshConfig
from jaxllm.text import chat
from jaxllm.text import prepare as text
from jaxllm.text.special_tokens import BOS_ID, PAD_ID
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.train import OptimizerConfig
from jaxllm.train.objectives import ObjectiveConfig, distillation, next_token, stored_distillation


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
    tensorboard: bool

    def __post_init__(self):
        periods = ("log_every", "evaluate_every", "save_every")
        least = dict.fromkeys(("steps", "batch_size", "micro_batches", *periods, "sample_tokens", "keep_last"), 1)
        least |= dict.fromkeys(("evaluate_batches", "evaluate_answers", "sample_every", "keep_best"), 0)
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
    """What the loop trains: ``objective(params, micro_batch, **frozen)`` on ``prepare`` of each of ``batches``."""

    model: Model
    tokenizer: Tokenizer
    batches: Any  # iterator with get_state, set_state and fingerprint
    validation: Mapping[str, Any]  # source -> batches, re-iterable and finite
    prepare: Callable  # on the device: adds weight_BT over the global batch
    objective: Callable
    report: dict[str, Any]  # counts of what the data became
    prompt: Callable  # (text) -> ids of it as this stage's model is asked
    keys: tuple[str, ...] = ()  # random keys that training adds to a micro-batch
    prompts: Sequence[Prompt] = ()  # held out, as many as a validation asks, with the answers that the data give
    start: workdir.Saved | None = None  # the parameters to start from; None: random ones
    frozen: Mapping[str, workdir.Saved] = {}  # further arguments of the objective: parameters that it does not train
    rollout: Callable | None = None  # (params, batch, step) -> the batch to train on


def run_config(values: Mapping) -> RunConfig:
    """The validated configuration of a run from an ``ml_collections`` config or a mapping; ``ValueError`` names what is
    wrong.
    """
    return section(RunConfig, values)


def resolved(values: Mapping) -> dict:
    """The config with the architecture and the tokenizer of the run that it starts from, whatever it says of them.

    How the model is computed stays as it says. A run that starts at random takes its teacher's tokenizer, if it has
    one. Raises ``FileNotFoundError`` where there is no such run.
    """
    config, values = run_config(values), dict(values)
    if config.start:
        model = workdir.config(config.start)["model"]
        values["model"] = model | {key: values["model"][key] for key in COMPUTATION}
    if other := config.start or config.teacher:
        values["tokenizer"] = workdir.config(other)["tokenizer"] | {"path": str(Path(other) / "tokenizer")}
    return values


def pretrain(config: RunConfig, directory: Path) -> Stage:
    """Next-token prediction on documents; the tokenizer and the token cache are made in ``directory`` where they are
    missing.
    """
    return _imitation(config, directory)


def sft(config: RunConfig, directory: Path) -> Stage:
    """Next-token prediction of the answers in conversations, and of the texts that are mixed in against forgetting.

    Raises ``ValueError`` where no source holds conversations.
    """
    stage = _imitation(config, directory)
    chats = [name for name, source in config.data.sources.items() if source.is_chat]
    if not chats:
        raise ValueError(
            f"config.stage='sft' needs conversations, but every source of {list(config.data.sources)} has "
            "format='text': set one's format to 'auto'"
        )
    return stage._replace(prompt=partial(_question, stage.tokenizer))


def distill(config: RunConfig, directory: Path) -> Stage:
    """As ``sft``, or ``pretrain`` where no source holds conversations, from the distributions of a teacher.

    At ``objective.student_fraction`` of the steps the student writes the answers itself. With
    ``objective.store_teacher`` the teacher is asked here, once, and is not there in training. Raises ``ValueError``
    where there is no teacher, or where it has another tokenizer.
    """
    if not config.teacher:
        raise ValueError("config.teacher='' names no run to learn from: give the directory of a trained one")
    is_chat = any(source.is_chat for source in config.data.sources.values())
    stage, teacher = (sft if is_chat else pretrain)(config, directory), workdir.saved(config.teacher)
    if teacher.tokenizer.fingerprint != stage.tokenizer.fingerprint:
        raise ValueError(
            f"the teacher {config.teacher} has another tokenizer ({teacher.tokenizer.vocab_size} ids) than the student "
            f"({stage.tokenizer.vocab_size} ids), so its distributions are over other tokens: set config.start or "
            "tokenizer.path to what shares its tokenizer, or let it write data (experiments/distill_data.py)"
        )
    if config.objective.store_teacher:
        objective = stored_distillation(stage.model, config.objective)
        return stage._replace(objective=objective, **_batches(config, _taught(config, stage, teacher, directory)))
    return stage._replace(
        objective=distillation(stage.model, teacher.model, config.objective),
        frozen={"teacher_params": teacher},
        rollout=_own_answers(config, stage, directory) if config.objective.student_fraction else None,
    )


STAGES: dict[str, Callable[[RunConfig, Path], Stage]] = {"pretrain": pretrain, "sft": sft, "distill": distill}


def _imitation(config: RunConfig, directory: Path) -> Stage:
    """What all stages share that learn to say what is written."""
    tokenizer = text.prepare(config.tokenizer, tokens.training_texts(config.data), directory=directory / "tokenizer")
    stores = tokens.prepare(config.data, tokenizer, directory=_cache(config, directory))
    model = build(config.model.with_vocabulary(tokenizer.vocab_size))
    read = _batches(config, stores)
    noise = {"dropout_key": config.model.dropout, "noise_key": config.objective.neftune_alpha}
    return Stage(
        model=model,
        tokenizer=tokenizer,
        **read,
        prepare=weighed,
        objective=next_token(model, config.objective),
        report={name: _report(name, store, read["batches"].reports) for name, store in stores.items()},
        prompt=partial(_document, tokenizer),
        keys=tuple(name for name, rate in noise.items() if rate),
        prompts=_prompts((store.validation for store in stores.values()), config.loop.evaluate_answers),
        start=workdir.saved(config.start) if config.start else None,
    )


def _batches(config: RunConfig, stores: Mapping[str, tokens.Split]) -> dict[str, Any]:
    """What a stage reads of the stores: ``batches`` to train on, and ``validation`` batches of each source."""
    shape = dict(batch_size=config.loop.batch_size, micro_batches=config.loop.micro_batches, pad_id=PAD_ID)
    shape |= dict(process_index=jax.process_index(), process_count=jax.process_count())
    return {
        "batches": loader.train_batches(stores, config.data, **shape),
        "validation": loader.validation_by_source(stores, config.data, **shape),
    }


def _cache(config: RunConfig, directory: Path) -> Path:
    return Path(config.data.cache or directory / "tokens")


def _taught(config: RunConfig, stage: Stage, teacher: workdir.Saved, directory: Path) -> dict[str, tokens.Split]:
    """The stage's stores with what the teacher says beside their tokens."""
    cache = _cache(config, directory)
    return taught(
        tokens.prepare(config.data, stage.tokenizer, directory=cache),
        teacher.model,
        teacher.params,
        identity=teacher.identity,
        data=config.data,
        objective=config.objective,
        directory=cache,
        batch_size=config.loop.batch_size // config.loop.micro_batches,
    )


def _report(name: str, store: tokens.Split, rows: Mapping[str, dict]) -> dict[str, Any]:
    """Documents of both sides of a source, and the rows that each of its tasks became."""
    own = {task: counts for task, counts in rows.items() if task == name or task.startswith(f"{name}/")}
    return {"train": store.train.report, "validation": store.validation.report, "rows": own}


def _prompts(stores: Iterator[tokens.TokenStore], count: int | None = None) -> list[Prompt]:
    """The first ``count`` prompts of the stores that hold conversations, or all."""
    return [prompt for store in stores if store.chat for prompt in prompts(store, count)][:count]


def _own_answers(config: RunConfig, stage: Stage, directory: Path) -> Callable:
    stores = tokens.prepare(config.data, stage.tokenizer, directory=_cache(config, directory))
    asked = [prompt.prompt_ids.tolist() for prompt in _prompts(store.train for store in stores.values())]
    return on_policy(
        stage.model,
        asked,
        fraction=config.objective.student_fraction,
        batch_size=config.loop.batch_size,
        micro_batches=config.loop.micro_batches,
        length=config.data.sequence_length,
        max_new_tokens=config.loop.sample_tokens,
        sampler=SamplerConfig(),
        seed=config.seed,
    )


def _document(tokenizer: Tokenizer, start: str) -> list[int]:
    """The start of a document."""
    return [BOS_ID, *tokenizer.encode(start)]


def _question(tokenizer: Tokenizer, question: str) -> list[int]:
    """A user's first message."""
    return chat.prompt(chat.Conversation(({"role": "user", "content": question},)), tokenizer)


def limited(batches: Any, count: int) -> Iterator:
    """The first ``count`` of them; all where it is 0."""
    return itertools.islice(batches, count or None)
