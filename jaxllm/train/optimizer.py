"""Optimizers as chains of optax transformations, and the schedules, masks and guards around them."""

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm import tree

SCHEDULES = ("cosine", "linear", "wsd", "constant")
SPIKE_HISTORY = 128
_MATRICES = "^(critic/)?blocks/.*kernel$"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """``configs/common.py`` explains each key beside its default."""

    name: str
    learning_rate: float
    schedule: str
    warmup: int
    warmup_unit: str
    final_fraction: float
    decay_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decay_mask: str
    freeze_mask: str
    clip_norm: float
    spike_deviations: float
    ema_decay: float

    def __post_init__(self):
        for key, choices in (("name", tuple(SCALINGS)), ("schedule", SCHEDULES), ("warmup_unit", ("steps", "tokens"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"optimizer.{key}={getattr(self, key)!r} must be one of {choices}")
        for key in ("learning_rate", "warmup", "eps", "weight_decay", "clip_norm", "spike_deviations"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must not be negative")
        for key in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must be in [0, 1)")
        for key in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"optimizer.{key}={getattr(self, key)} must be in [0, 1]")
        for key, pattern in self.masks.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"optimizer.{key}={pattern!r} is no regular expression: {error}") from error

    @property
    def masks(self) -> dict[str, str]:
        """The regular expressions that choose parameters, by their keys."""
        return {"decay_mask": self.decay_mask, "freeze_mask": self.freeze_mask}


def schedule(config: OptimizerConfig, *, steps: int, tokens_per_step: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of the update that takes ``step`` to ``step + 1``: linear warm-up to the peak, then the named decay
    over what is left.

    The first update has a rate above 0 and the last one ``final_fraction`` of the peak. ``"wsd"`` stays at the peak and
    decays linearly over the last ``decay_fraction`` of the steps (Hu et al. 2024, arXiv:2404.06395, section 4.1).
    """
    warmup = config.warmup if config.warmup_unit == "steps" else math.ceil(config.warmup / tokens_per_step)
    if warmup and warmup >= steps:
        raise ValueError(f"optimizer.warmup of {warmup} steps leaves nothing of loop.steps={steps}; lower it")
    final = config.final_fraction
    stay = max(warmup, round(steps * (1 - config.decay_fraction))) if config.schedule == "wsd" else warmup
    decays = {
        "cosine": lambda progress: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "linear": lambda progress: 1 - (1 - final) * progress,
        "wsd": lambda progress: 1 - (1 - final) * progress,
        "constant": lambda progress: jnp.ones_like(progress),
    }

    def rate(step):
        done = jnp.asarray(step, jnp.float32) + 1
        progress = jnp.clip((done - stay) / max(steps - stay, 1), 0, 1)
        return config.learning_rate * jnp.minimum(done / max(warmup, 1), 1) * decays[config.schedule](progress)

    return rate


def optimizer(config: OptimizerConfig, rate: Callable, rules: tuple) -> optax.GradientTransformationExtraArgs:
    """The chain: clip, scale, decay, learning rate; around it the freezing, the average of the parameters and the spike
    guard.

    ``rules`` are the model's (pattern, letters) rows: Muon reads from them which axes of a stacked kernel are the
    matrix. ``init`` raises ``ValueError`` for a mask that matches none of its parameters.
    """
    steps = (
        clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        SCALINGS[config.name](config, rules),
        optax.add_decayed_weights(config.weight_decay, partial(tree.mask, config.decay_mask)),
        optax.scale_by_learning_rate(rate),
    )
    chain = optax.chain(*steps)
    if config.freeze_mask:
        labels = partial(
            tree.map_named, lambda name, _: "frozen" if tree.matches(config.freeze_mask, name) else "trained"
        )
        chain = optax.partition({"trained": chain, "frozen": optax.set_to_zero()}, labels)
    if config.ema_decay:
        chain = optax.chain(chain, average_parameters(config.ema_decay))
    if config.spike_deviations:
        chain = skip_spikes(chain, deviations=config.spike_deviations)
    return _with_masks_that_match(config.masks, optax.with_extra_args_support(chain))


def _with_masks_that_match(masks, inner):
    def init(params):
        names = tree.names(params)
        for key, pattern in masks.items():
            if pattern and not any(tree.matches(pattern, name) for name in names):
                raise ValueError(f"optimizer.{key}={pattern!r} matches no parameter: they are {', '.join(names)}")
        return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, inner.update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Scales gradients whose norm, over all of them, is above ``limit`` down to it (Pascanu et al. 2013,
    arXiv:1211.5063, algorithm 1).

    One factor for all, which XLA multiplies by in passing: optax's quotients are written out first, a copy of all
    gradients.
    """

    def update(updates, params=None):
        factor = jnp.minimum(1.0, limit / tree.global_norm(updates))
        return jax.tree.map(lambda x: x * factor, updates)

    return optax.stateless(update)


def _adamw(config, rules):
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def _adafactor(config, rules):
    """Shazeer & Stern 2018, arXiv:1804.04235, with a given learning rate in place of the relative one."""
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _muon(config, rules):
    """Jordan et al. 2024 on the kernels of blocks, AdamW on all else; updates are scaled to AdamW's size by 0.2
    sqrt(larger side) (Liu et al. 2025, arXiv:2502.16982, section 2.2), so that both take one learning rate.
    """
    axes = partial(_matrix_axes, rules)
    matrices = optax.chain(
        _placed_automatically(optax.contrib.scale_by_muon(weight_dimension_numbers=axes)),
        optax.stateless(lambda updates, _: _like_adam(updates, axes(updates))),
    )
    labels = partial(tree.map_named, lambda name, _: "matrix" if tree.matches(_MATRICES, name) else "other")
    return optax.partition({"matrix": matrices, "other": _adamw(config, rules)}, labels)


def _placed_automatically(inner):
    """``inner`` under a mesh too: its products sum over sharded axes, which an explicit mesh leaves to the caller;
    results lie as the gradients lay.
    """

    def update(updates, state, params=None):
        if jax.sharding.get_abstract_mesh().empty:
            return inner.update(updates, state, params)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(inner.update, out_sharding=specs)(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


SCALINGS = {"adamw": _adamw, "muon": _muon, "adafactor": _adafactor}


def _matrix_axes(rules, params):
    """Which axes of each stacked kernel are a matrix's inputs and outputs: the width ``d`` stands alone on one side."""

    def axes(letters):
        rest = tuple(axis for axis, letter in enumerate(letters) if letter not in "ld")
        width = (letters.index("d"),)
        return optax.contrib.MuonDimensionNumbers(*((width, rest) if width < rest else (rest, width)))

    return jax.tree.map(axes, tree.match(rules, params))


def _like_adam(updates, axes):
    def scaled(update, dims):
        sides = [math.prod(update.shape[axis] for axis in side) for side in dims]
        return update * (0.2 * math.sqrt(max(sides)))

    return jax.tree.map(scaled, updates, axes)


class SpikeState(NamedTuple):
    inner: Any
    history: jax.Array  # [2, SPIKE_HISTORY] of the newest finite losses and gradient norms, each up to its bar
    recorded: jax.Array
    skipped: jax.Array


def skip_spikes(inner: optax.GradientTransformation, *, deviations: float) -> optax.GradientTransformationExtraArgs:
    """Skips, on the device, the updates whose loss or gradient norm is more than so many deviations above its recent
    mean.

    "Recent" is the last 128 updates whose loss and norm are finite, and none is skipped before there are 128 (OLMo 2,
    arXiv:2501.00656, section 3.1, has the idea). Skipped ones are among them, as high as they were allowed to be: so a
    level that lasts is taken for what it is in the end, and a single spike does not hide the next. A skipped update
    changes nothing but this history and ``skipped``. ``update`` takes the loss as ``value``.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return SpikeState(inner.init(params), jnp.zeros((2, SPIKE_HISTORY)), zero, zero)

    def update(updates, state, params=None, *, value, **extra):
        now = jnp.stack([value, tree.global_norm(updates)])
        full, finite = state.recorded >= SPIKE_HISTORY, jnp.all(jnp.isfinite(now))
        bar = jnp.mean(state.history, axis=1) + deviations * jnp.std(state.history, axis=1)
        spike = full & ~jnp.all(now <= bar)  # what is not a number is not below the bar either
        lowered = jnp.where(full, jnp.minimum(now, bar), now)
        history = state.history.at[:, state.recorded % SPIKE_HISTORY].set(lowered)
        history = jnp.where(finite, history, state.history)

        def skip(updates):
            return jax.tree.map(jnp.zeros_like, updates), state.inner

        def accept(updates):
            return inner.update(updates, state.inner, params, value=value, **extra)

        updates, inner_state = jax.lax.cond(spike, skip, accept, updates)
        return updates, SpikeState(inner_state, history, state.recorded + finite, state.skipped + spike)

    return optax.GradientTransformationExtraArgs(init, update)


class AverageState(NamedTuple):
    average: tree.Tree


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps average = decay * average + (1 - decay) * parameters after each update; last in the chain, it changes no
    update.
    """

    def update(updates, state, params):
        average = jax.tree.map(lambda a, p, u: decay * a + (1 - decay) * (p + u), state.average, params, updates)
        return updates, AverageState(average)

    return optax.GradientTransformation(lambda params: AverageState(jax.tree.map(jnp.copy, params)), update)


def find_state(kind: type, opt_state: Any) -> Any:
    """The state of this kind (``SpikeState``, ``AverageState``) within the optimizer's state, or None."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return next((node for node in nodes if isinstance(node, kind)), None)
