"""The batches of reinforcement learning: problems are asked, answers sampled and rewarded, and several updates learn
from them. What was drawn is part of the run's position, so that a resumed run repeats it.
"""

import base64
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.problems import Problem, Problems, problems
from jaxllm.generate import SamplerConfig
from jaxllm.model import Model
from jaxllm.rl.config import RolloutConfig
from jaxllm.rl.layout import Batch, Sample, Shape, layout
from jaxllm.rl.report import Group, explained_variance, failures, measured, shown, undecided, warnings
from jaxllm.rl.rewarding import Rewarding
from jaxllm.rl.sampling import Limits, Sampled, sampled
from jaxllm.rl.tools import TOOLS, Tool
from jaxllm.sharding import place
from jaxllm.text import chat
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.train.policy import COLUMNS, GROUPED, WEIGHTS, PolicyConfig, adapted, assess, credit
from jaxllm.tree import Tree

POSITION = ("coefficient", "position", "too_long", "told", "table")  # all that a resumed run needs but the samples
PATIENCE = 100  # problems drawn for one whose prompt fits


class Drawn(NamedTuple):
    """A rollout: its samples, and of their tokens the columns [N, W] that an update learns from."""

    samples: list[Sample]
    columns: Batch


@dataclasses.dataclass
class Experience:
    """An iterator of batches as the loader is one, whose batches need the parameters: ``batch`` makes them."""

    model: Model
    tokenizer: Tokenizer
    problems: Problems
    rewarding: Rewarding
    config: RolloutConfig
    policy: PolicyConfig
    shape: Shape
    assess: Callable | None  # (params, batch [M, B, T], **frozen) -> columns [M, B, T], if any is needed
    place: Callable  # whole host batch -> global arrays, row by row
    seed: int
    drawn: Drawn | None = None
    told: dict[str, float] = dataclasses.field(default_factory=dict)
    coefficient: float = math.nan  # of the KL in the rewards
    position: int = 0  # problems drawn so far
    too_long: int = 0  # problems left out for the length of their prompts
    table: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finished: float = math.nan  # when the last rollout was

    def __post_init__(self):
        self.coefficient = self.policy.kl_reward
        self.credit = jax.jit(partial(credit, self.policy))
        self.warned: set[str] = set()

    # ---- as a loader ----

    @property
    def fingerprint(self) -> str:
        return self.problems.fingerprint

    @property
    def reports(self) -> dict:
        return {}

    def __next__(self) -> None:
        """Nothing: the rows of a step are sampled."""

    def close(self) -> None:
        self.rewarding.close()

    def get_state(self) -> dict[str, Any]:
        """What a later process needs for the updates that are left of this rollout; JSON-able."""
        state = {name: getattr(self, name) for name in POSITION}
        state["drawn"] = None
        if self.drawn is not None:
            samples = [[list(each.prompt), *map(_packed, each[1:])] for each in self.drawn.samples]
            columns = {name: _packed(values_NW) for name, values_NW in self.drawn.columns.items()}
            state["drawn"] = {"samples": samples, "columns": columns}
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what ``get_state`` returned."""
        for name in POSITION:
            setattr(self, name, state[name])
        self.drawn = None
        if drawn := state["drawn"]:
            samples = [Sample(tuple(prompt), *map(_unpacked, arrays)) for prompt, *arrays in drawn["samples"]]
            self.drawn = Drawn(samples, {name: _unpacked(packed) for name, packed in drawn["columns"].items()})

    @property
    def limits(self) -> Limits:
        """Of prompts and of what follows them."""
        return Limits(self.config.max_prompt_tokens, self.config.max_new_tokens, self.config.turns)

    @property
    def tools(self) -> dict[str, Tool]:
        """Those that a completion may call."""
        return {name: TOOLS[name] for name in self.config.tools}

    # ---- rollouts ----

    def batch(self, params: Tree, _: None, step: int, **frozen: Tree) -> tuple[Batch, dict[str, float]]:
        """The batch of a step, and the numbers of its rollout: a new one every ``policy.updates`` steps."""
        number, turn = divmod(step, self.policy.updates)
        if turn == 0:
            self.drawn, self.told = self._roll_out(params, number, frozen)
        batch = self._minibatch(number, turn)
        if turn == self.policy.updates - 1:
            self.drawn = None
        self.finished = time.perf_counter()
        return batch, self.told

    def probe(self, params: Tree, problems: Sequence[Problem]) -> dict[str, float]:
        """Answers to held-out problems and what they are worth, as means, and how many prompts were too long to be
        asked. Raises ``ValueError`` where all are.
        """
        asked = [problem for problem in problems if self._fits(problem)]
        if not asked:
            raise ValueError(
                f"no held-out problem of {len(problems)} has a prompt of at most {self.limits.prompt} tokens: raise "
                "rollout.max_prompt_tokens"
            )
        sampler = SamplerConfig(self.config.validation_temperature)
        told = measured(self._asked(params, asked, 1, jax.random.key(self.seed), sampler))
        return told | {"too_long": float(len(problems) - len(asked))}

    def rows(self) -> list[dict[str, Any]]:
        """The table of the last rollout: prompts, completions, rewards."""
        return self.table

    def _warn(self, told: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Says once each what is likely wrong, and why rewards failed."""
        for text in [*warnings(told), *failures(groups)]:
            if text not in self.warned and jax.process_index() == 0:
                print(f"warning: {text}", file=sys.stderr)
            self.warned.add(text)

    def _roll_out(self, params: Tree, number: int, frozen: Mapping[str, Tree]) -> tuple[Drawn, dict[str, float]]:
        jax.block_until_ready(params)
        began = time.perf_counter()
        waited = {} if math.isnan(self.finished) else {"update_seconds": began - self.finished}
        groups, drawn_again = self._decided(params)
        self.table = [row for group in groups[: self.config.shown] for row in shown(group)]
        answers = [answer for group in groups for answer in group.answers]
        ended = time.perf_counter()
        samples = [answer.sample for answer in answers]
        columns, told = self._credited(params, samples, np.stack([group.rewards for group in groups]), frozen)
        tokens = sum(int(sample.sampled.sum()) for sample in samples)
        seconds = {
            "reward_seconds": self.rewarding.waited,
            "rollout_seconds": ended - began - self.rewarding.waited,
            "assess_seconds": time.perf_counter() - ended,
        }
        told |= measured(groups) | seconds | waited | {"drawn_again": drawn_again, "too_long": self.too_long}
        if self.policy.advantage in GROUPED:
            told["undecided"] = undecided(groups)
        told["rollout_tokens_per_second"] = tokens / seconds["rollout_seconds"]
        self._warn(told, groups)
        return Drawn(samples, columns), told

    def _decided(self, params: Tree) -> tuple[list[Group], int]:
        """Groups of a rollout, and how many were drawn again: those that have nothing to teach are replaced by other
        problems', ``refill_rounds`` times at most (dynamic sampling, DAPO: Yu et al. 2025, arXiv:2503.14476,
        section 3.2).
        """
        rows = self.shape.micro_batches * self.shape.rows
        count = self.policy.minibatches * rows // self.config.completions
        sampler, found, spare = SamplerConfig(self.config.temperature), [], []
        for _ in range(self.config.refill_rounds + 1):
            key = jax.random.fold_in(jax.random.key(self.seed), self.position)
            groups = self._asked(params, self._next_problems(count - len(found)), self.config.completions, key, sampler)
            found += [group for group in groups if group.is_decided]
            spare += [group for group in groups if not group.is_decided]
            if len(found) == count:
                break
        missing = count - len(found)
        return found + spare[:missing], len(spare) - missing

    def _next_problems(self, count: int) -> list[Problem]:
        """So many whose prompts are not too long."""
        found = []
        for _ in range(PATIENCE * count):
            problem = self.problems.problem(self.position)
            self.position += 1
            fits = self._fits(problem)
            self.too_long += not fits
            found += [problem] * fits
            if len(found) == count:
                return found
        raise ValueError(
            f"of {PATIENCE * count} problems {len(found)} have prompts of at most {self.limits.prompt} tokens, and "
            f"{count} are needed: raise rollout.max_prompt_tokens"
        )

    def _fits(self, problem: Problem) -> bool:
        return len(self._ids(problem)) <= self.limits.prompt

    def _ids(self, problem: Problem) -> list[int]:
        """The prompt, which tells of the tools."""
        definitions = tuple(tool.definition for tool in self.tools.values())
        return chat.prompt(problem.prompt._replace(tools=definitions or problem.prompt.tools), self.tokenizer)

    def _asked(self, params: Tree, problems: Sequence[Problem], count: int, key, sampler) -> list[Group]:
        """Each problem with ``count`` answers; rewards are counted beside the sampling."""
        ids = [self._ids(problem) for problem in problems]
        prompts = [prompt for prompt in ids for _ in range(count)]
        # Always as many, whatever is left to be drawn again: another number would be compiled for.
        slots = self.config.slots or self.policy.minibatches * self.shape.micro_batches * self.shape.rows
        how = dict(limits=self.limits, slots=slots, sampler=sampler, tools=self.tools)
        found: list[Sampled | None] = [None] * len(prompts)
        self.rewarding.begin()
        for number, answer in sampled(self.model, params, self.tokenizer, prompts, key, **how):
            found[number] = answer
            self.rewarding.submit(number, problems[number // count], answer, self.limits.new)
        verdicts = self.rewarding.verdicts(problems, found)
        cuts = range(0, len(prompts), count)
        return [
            Group(problem, found[cut : cut + count], verdicts[cut : cut + count])
            for problem, cut in zip(problems, cuts, strict=True)
        ]

    def _credited(self, params, samples, rewards_PC, frozen) -> tuple[Batch, dict[str, float]]:
        """The columns of all samples, made once for all their updates, and what they tell."""
        width = self.limits.new
        padded = partial(_padded, width=width)
        given = np.repeat(np.isfinite(rewards_PC).reshape(-1, 1), width, axis=1)
        mask_NW = padded([sample.sampled for sample in samples]) & given
        columns = {"sampled_logp_BT": padded([sample.logp for sample in samples])}
        columns |= self._assessed(params, samples, frozen)
        zeros_NW = np.zeros(mask_NW.shape, np.float32)
        policy_NW = columns.get("old_logp_BT", columns["sampled_logp_BT"])
        log_ratio_NW = np.where(mask_NW, policy_NW - columns.get("ref_logp_BT", policy_NW), 0.0)
        values_NW = columns.get("value_BT", zeros_NW)
        advantages_NW, returns_NW = map(
            np.asarray, self.credit(self.coefficient, rewards_PC, mask_NW, log_ratio_NW, values_NW)
        )
        columns |= {"advantage_BT": advantages_NW, "mask_NW": mask_NW}
        told = {}
        if self.policy.has_values:
            columns["return_BT"] = returns_NW
            told["explained_variance"] = explained_variance(returns_NW[mask_NW], values_NW[mask_NW])
            told["value"] = float(np.mean(values_NW[mask_NW])) if mask_NW.any() else math.nan
        if "ref_logp_BT" in columns:
            told["kl"] = float(np.sum(log_ratio_NW, dtype=np.float64) / max(1, np.sum(mask_NW.any(axis=1))))
            told["kl_coefficient"] = self.coefficient
            if self.policy.kl_target:
                how = dict(target=self.policy.kl_target, horizon=self.policy.kl_horizon, count=len(samples))
                self.coefficient = adapted(self.coefficient, told["kl"], **how)
        return columns, told

    def _assessed(self, params: Tree, samples: Sequence[Sample], frozen: Mapping[str, Tree]) -> Batch:
        """What the trainer's policy, its critic and the reference say of the samples' tokens."""
        if self.assess is None:
            return {}
        size, parts = self.shape.micro_batches * self.shape.rows, []
        for start in range(0, len(samples), size):
            some = samples[start : start + size]
            laid = layout(some, self.shape)
            found = jax.device_get(self.assess(params, self.place(laid.batch), **frozen))
            read = partial(laid.read, lengths=_lengths(some), width=self.limits.new)
            parts.append({name: read(values_MBT) for name, values_MBT in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _minibatch(self, number: int, turn: int) -> Batch:
        """The rows of one update: a part of the samples, shuffled anew in each epoch."""
        samples, columns = self.drawn
        epoch, part = divmod(turn, self.policy.minibatches)
        order = np.arange(len(samples))
        if self.policy.minibatches > 1:
            order = np.random.default_rng([self.seed, number, epoch]).permutation(order)
        size = len(samples) // self.policy.minibatches
        chosen = np.sort(order[part * size : (part + 1) * size])
        some = [samples[index] for index in chosen]
        laid, mask_NW = layout(some, self.shape), columns["mask_NW"][chosen]
        own = {name: columns[name][chosen] for name in COLUMNS if name in columns}
        own["weight_BT"] = np.asarray(WEIGHTS[self.policy.weights](jnp.asarray(mask_NW)))
        batch = laid.batch | laid.lay(own, _lengths(some))
        batch["mask_BT"] = laid.lay({"mask_BT": mask_NW}, _lengths(some))["mask_BT"]
        return _shares(batch)


def assessment(columns: Callable) -> Callable:
    """``train.policy.assess`` of a whole batch [M, B, T], compiled; what it says is whole on every process."""

    @jax.jit
    def assess(params: Tree, batch: Batch, **frozen: Tree) -> Batch:
        def of_micro_batch(micro_batch: Batch) -> Batch:
            say = partial(columns, params, **frozen)
            shapes = jax.eval_shape(say, micro_batch)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes)
            return jax.lax.cond(jnp.any(micro_batch["mask_BT"]), say, lambda _: nothing, micro_batch)

        found = jax.lax.map(of_micro_batch, batch)
        return jax.tree.map(lambda x_MBT: place(x_MBT, "..."), found)

    return assess


def _lengths(samples: Sequence[Sample]) -> list[int]:
    return [len(sample.tokens) for sample in samples]


def _padded(rows: Sequence[np.ndarray], *, width: int) -> np.ndarray:
    padded_NW = np.zeros((len(rows), width), rows[0].dtype)
    for padded_W, row in zip(padded_NW, rows, strict=True):
        padded_W[: len(row)] = row
    return padded_NW


def _shares(batch: Batch) -> Batch:
    """This process's rows of each micro-batch, as the loader deals them."""
    return {name: array[:, jax.process_index() :: jax.process_count()] for name, array in batch.items()}


def _packed(array: np.ndarray) -> list:
    return [str(array.dtype), list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def _unpacked(packed: list) -> np.ndarray:
    dtype, shape, data = packed
    return np.frombuffer(base64.b64decode(data), dtype).reshape(shape)


def experience(
    config: RolloutConfig,
    policy: PolicyConfig,
    model: Model,
    reference: Model | None,
    tokenizer: Tokenizer,
    *,
    shape: Shape,
    place: Callable,
    held_out: float,
    seed: int,
) -> Experience:
    """Made of what the config says; ``place`` puts a whole batch on the devices. ``ValueError`` names what does not fit
    together.
    """
    for name in ("sources", "rewards"):
        if not getattr(config, name):
            raise ValueError(f"rollout.{name} is empty: name what is asked in sources, and what it is worth in rewards")
    size, longest = shape.micro_batches * shape.rows, config.max_prompt_tokens + config.max_new_tokens - 1
    if size * policy.minibatches % config.completions:
        raise ValueError(
            f"loop.batch_size={size} times policy.minibatches={policy.minibatches} is not a multiple of "
            f"rollout.completions={config.completions}, the completions of a prompt"
        )
    if policy.advantage in GROUPED and config.completions < 2:
        raise ValueError(
            f"policy.advantage={policy.advantage!r} compares the completions of a prompt, and rollout.completions="
            f"{config.completions}: set 2 or more"
        )
    if longest > shape.length:
        raise ValueError(
            f"rollout.max_prompt_tokens={config.max_prompt_tokens} and max_new_tokens={config.max_new_tokens} make "
            f"{longest} pairs of tokens, a row has data.sequence_length={shape.length}: raise it, or lower them"
        )
    asks = policy.updates > 1 or policy.has_values or reference is not None
    columns = assess(model, reference, policy, temperature=config.temperature)
    return Experience(
        model=model,
        tokenizer=tokenizer,
        problems=problems(config.sources, validation=held_out, seed=seed),
        rewarding=Rewarding(config.rewards, workers=config.workers, time_limit=config.time_limit),
        config=config,
        policy=policy,
        shape=shape,
        assess=assessment(columns) if asks else None,
        place=place,
        seed=seed,
    )
