"""The stages that a run may name: each is an objective and a source of batches for the one loop."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax

from jaxllm import workdir
from jaxllm.configure import nearest
from jaxllm.data import loader, tokens
from jaxllm.data.prompts import Prompt, prompts
from jaxllm.evaluate.duels import Loaded, Sampling, divergence
from jaxllm.evaluate.perplexity import weighed
from jaxllm.evaluate.teaching import referred, taught
from jaxllm.generate import SamplerConfig
from jaxllm.model import Model, build
from jaxllm.rl.experience import experience
from jaxllm.rl.layout import Shape, filled
from jaxllm.rl.on_policy import on_policy
from jaxllm.rl.rewarding import identities
from jaxllm.run_config import RunConfig
from jaxllm.sharding import whole_batch
from jaxllm.text import chat
from jaxllm.text import prepare as text
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.train import preferences
from jaxllm.train.objectives import distillation, next_token, stored_distillation
from jaxllm.train.policy import policy
from jaxllm.tree import Tree


class Stage(NamedTuple):
    """What the loop trains: ``objective(params, micro_batch, **frozen)`` on ``prepare`` of each of ``batches``."""

    model: Model
    tokenizer: Tokenizer
    batches: Any  # iterator with get_state, set_state and fingerprint
    validation: Mapping[str, Any]  # source -> batches, re-iterable and finite
    prepare: Callable  # (params, batch, **frozen), on the device: adds weights over the global batch, and what is given
    objective: Callable
    report: dict[str, Any]  # counts of what the data became
    prompt: Callable  # (text) -> ids of it as this stage's model is asked
    keys: tuple[str, ...] = ()  # random keys that training adds to a micro-batch
    prompts: Sequence[Prompt] = ()  # held out, as many as a validation asks, with the answers that the data give
    start: workdir.Saved | None = None  # the parameters to start from; None: random ones
    frozen: Mapping[str, workdir.Saved] = {}  # further arguments of the objective: parameters that it does not train
    rewarded_by: Mapping[str, str] = {}  # what tells the models that reward from all others, by name
    rollout: Callable | None = None  # (params, batch, step, **frozen) -> (the batch to train on, numbers to log)
    filled: Callable | None = None  # (batch) -> how many of its micro-batches hold anything; None: all
    samples: Callable | None = None  # () -> rows of prompts and texts to show; None: continuations of sample_prompts
    probe: Callable | None = None  # (params, **frozen) -> further numbers of a validation


def named(name: str) -> Callable[[RunConfig, Path], Stage]:
    """The stage of this name; ``ValueError`` names the nearest one where there is none."""
    if name not in STAGES:
        raise ValueError(f"config.stage={name!r} is not a stage{nearest(name, STAGES)}")
    return STAGES[name]


def pretrain(config: RunConfig, directory: Path) -> Stage:
    """Next-token prediction on documents; the tokenizer and the token cache are made in ``directory`` where they are
    missing.
    """
    return _imitation(config, directory)


def sft(config: RunConfig, directory: Path) -> Stage:
    """Next-token prediction of the answers in conversations, and of the texts that are mixed in against forgetting.

    Raises ``ValueError`` where no source holds conversations.
    """
    if pairs := [name for name, source in config.data.sources.items() if source.is_preference]:
        raise ValueError(
            f"config.stage={config.stage!r} would learn the rejected answers of {pairs} too: set their answers='chosen'"
        )
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
        ask = partial(taught, objective=config.objective)
        stores = _asked(ask, config, stage, teacher, directory)
        return stage._replace(objective=objective, **_batches(config, stores, stage.tokenizer))
    return stage._replace(
        objective=distillation(stage.model, teacher.model, config.objective),
        frozen={"teacher_params": teacher},
        rollout=_own_answers(config, stage, directory) if config.objective.student_fraction else None,
    )


def preference(config: RunConfig, directory: Path) -> Stage:
    """Preferences without a reward model, from a fine-tuned policy: DPO, IPO, ORPO, SimPO, KTO and their kin.

    The reference is the run that the policy starts from, unless ``config.reference`` names another. With
    ``preference.store_reference`` it is asked here, once, and is not there in training. Dropout is off, so that policy
    and reference agree before the first update. Raises ``ValueError`` where there is no policy to start from, where a
    source holds no preferences, and where the reference has another tokenizer.
    """
    if not config.start:
        raise ValueError("config.start='' begins at random: preferences tune a policy that answers; name its run")
    answers = "paired" if config.preference.is_paired else "alone"
    sources = {name: dataclasses.replace(each, answers=answers) for name, each in config.data.sources.items()}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    stage = _compared(config, directory)
    reference = workdir.saved(config.reference or config.start)
    if reference.tokenizer.fingerprint != stage.tokenizer.fingerprint:
        raise ValueError(
            f"the reference {config.reference} has another tokenizer ({reference.tokenizer.vocab_size} ids) than the "
            f"policy ({stage.tokenizer.vocab_size} ids): their log-probabilities do not compare; name another run"
        )
    stage = stage._replace(
        prepare=preferences.referred(stage.model, reference.model, config.preference),
        objective=preferences.preference(stage.model, config.preference),
        keys=(),
    )
    if config.preference.store_reference:
        stores = _asked(referred, config, stage, reference, directory)
        return stage._replace(**_batches(config, stores, stage.tokenizer))
    if not config.preference.has_reference:
        return stage
    probe = _divergence(config, stage, reference.model) if stage.prompts else None
    return stage._replace(frozen={"ref_params": reference}, probe=probe)


def reward(config: RunConfig, directory: Path) -> Stage:
    """A reward model: a network with a scalar head that learns from pairs of answers, from scores, or from both.

    Raises ``ValueError`` where the model has no scalar head, or where a source holds no preferences.
    """
    if not config.model.scalar_head:
        raise ValueError("config.stage='reward' needs model.scalar_head=True: a reward is what that head says")
    stage = _compared(config, directory)
    return stage._replace(
        prepare=preferences.weighed_scores,
        objective=preferences.reward(stage.model, config.reward),
    )


def rl(config: RunConfig, directory: Path) -> Stage:
    """Learning from rewards: REINFORCE, RLOO, PPO, GRPO and their kin, as ``config.policy`` composes them.

    Dropout is off, so that the policy that learns is the one that sampled. The reference is the run that the policy
    starts from, unless ``config.reference`` names another; where no coefficient needs one, it is measured only if it is
    named. Raises ``ValueError`` where a critic has no scalar head, where a reference is needed and none is there, and
    where the sizes of a rollout do not fit.
    """
    if config.policy.has_values and not config.model.scalar_head:
        raise ValueError("policy.advantage='gae' needs model.scalar_head=True: the critic is what that head says")
    named = config.reference or (config.start if config.policy.has_reference else "")
    if config.policy.has_reference and not named:
        raise ValueError(
            "policy.kl_loss and kl_reward need a reference: name a run in config.start or config.reference"
        )
    tokenizer = text.prepare(config.tokenizer, tokens.training_texts(config.data), directory=directory / "tokenizer")
    model = build(config.model.with_vocabulary(tokenizer.vocab_size))
    reference = workdir.saved(named) if named else None
    if reference and reference.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"the reference {named} has another tokenizer than the policy: name another run")
    loop = config.loop
    drawn = experience(
        config.rollout,
        config.policy,
        model,
        reference.model if reference else None,
        tokenizer,
        shape=Shape(loop.micro_batches, loop.batch_size // loop.micro_batches, config.data.sequence_length),
        place=partial(whole_batch, on=jax.sharding.get_mesh()),
        held_out=config.data.validation,
        seed=config.seed,
    )
    held_out = drawn.problems.validation(loop.evaluate_answers) if loop.evaluate_answers else ()
    return Stage(
        model=model,
        tokenizer=tokenizer,
        batches=drawn,
        validation={},
        prepare=lambda params, batch, **frozen: batch,
        objective=policy(model, config.policy, temperature=config.rollout.temperature),
        report=drawn.problems.report,
        prompt=partial(_question, tokenizer),
        start=workdir.saved(config.start) if config.start else None,
        frozen={"ref_params": reference} if reference else {},
        rewarded_by=identities(config.rollout.rewards),
        rollout=drawn.batch,
        filled=filled,
        samples=drawn.rows,
        probe=(lambda params, **frozen: drawn.probe(params, held_out)) if held_out else None,
    )


STAGES: dict[str, Callable[[RunConfig, Path], Stage]] = {
    "pretrain": pretrain,
    "sft": sft,
    "distill": distill,
    "reward": reward,
    "preference": preference,
    "rl": rl,
}


def _imitation(config: RunConfig, directory: Path) -> Stage:
    """What all stages share that learn to say what is written."""
    tokenizer = text.prepare(config.tokenizer, tokens.training_texts(config.data), directory=directory / "tokenizer")
    stores = tokens.prepare(config.data, tokenizer, directory=_cache(config, directory))
    model = build(config.model.with_vocabulary(tokenizer.vocab_size))
    read = _batches(config, stores, tokenizer)
    noise = {"dropout_key": config.model.dropout, "noise_key": config.objective.neftune_alpha}
    return Stage(
        model=model,
        tokenizer=tokenizer,
        **read,
        prepare=weighed,
        objective=next_token(model, config.objective),
        report={name: _report(name, store, read["batches"].reports) for name, store in stores.items()},
        prompt=tokenizer.opening,
        keys=tuple(name for name, rate in noise.items() if rate),
        prompts=_prompts((store.validation for store in stores.values()), config.loop.evaluate_answers),
        start=workdir.saved(config.start) if config.start else None,
    )


def _compared(config: RunConfig, directory: Path) -> Stage:
    """What the stages share that learn from preferences. ``ValueError`` where a source holds none."""
    others = [name for name, source in config.data.sources.items() if not source.is_preference]
    if others:
        raise ValueError(
            f"config.stage={config.stage!r} learns from preferences, but the sources {others} hold texts or "
            "conversations: set their format to 'preference'"
        )
    stage = _imitation(config, directory)
    return stage._replace(prompt=partial(_question, stage.tokenizer))


def _batches(config: RunConfig, stores: Mapping[str, tokens.Split], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a stage reads of the stores: ``batches`` to train on, and ``validation`` batches of each source."""
    loop = config.loop
    shape = dict(batch_size=loop.batch_size, micro_batches=loop.micro_batches, pad_id=tokenizer.pad_id)
    shape |= dict(process_index=jax.process_index(), process_count=jax.process_count())
    return {
        "batches": loader.train_batches(stores, config.data, **shape),
        "validation": loader.validation_by_source(stores, config.data, **shape),
    }


def _cache(config: RunConfig, directory: Path) -> Path:
    return Path(config.data.cache or directory / "tokens")


def _asked(ask: Callable, config: RunConfig, stage: Stage, frozen: workdir.Saved, directory: Path) -> dict:
    """The stage's stores with what a frozen model says beside their tokens."""
    cache = _cache(config, directory)
    return ask(
        tokens.prepare(config.data, stage.tokenizer, directory=cache),
        frozen.model,
        frozen.params,
        identity=frozen.identity,
        data=config.data,
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
        stop_ids=stage.tokenizer.stop_ids,
        seed=config.seed,
    )


def _divergence(config: RunConfig, stage: Stage, reference: Model) -> Callable:
    """A function (params, *, ref_params) -> the policy's divergence from the reference, on its own answers to held-out
    prompts, and their length.
    """
    ids = [prompt.prompt_ids for prompt in stage.prompts]
    sampling = Sampling(SamplerConfig(), config.loop.sample_tokens, min(32, len(ids)), config.seed)

    def probe(params: Tree, *, ref_params: Tree) -> dict[str, float]:
        sides = Loaded(stage.model, params, stage.tokenizer), Loaded(reference, ref_params, stage.tokenizer)
        found = sampling.answers(sides[0], ids)
        kl = divergence(*sides, ids, found, batch_size=sampling.batch_size)
        return {"kl": kl.kl, "sampled_tokens": fmean(len(answer.tokens) for answer in found)}

    return probe


def _question(tokenizer: Tokenizer, question: str) -> list[int]:
    """A user's first message."""
    return chat.prompt(chat.Conversation(({"role": "user", "content": question},)), tokenizer)


def limited(batches: Any, count: int) -> Iterator:
    """The first ``count`` of them; all where it is 0."""
    return itertools.islice(batches, count or None)
