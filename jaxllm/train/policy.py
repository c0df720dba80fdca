"""Objectives of reinforcement learning: what a policy learns from completions that it sampled and that were rewarded.

An algorithm is four choices, each a table here: advantages, the level of the ratio, the surrogate, the weights.
``credit`` makes the first of rewards, once per rollout; the objective sees them as columns of its batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.configure import nearest
from jaxllm.losses import (
    cispo,
    constant_weights,
    gae,
    group_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    leave_one_out_advantages,
    ppo_clip,
    sequence_weights,
    token_weights,
    value_clip,
    whiten,
)
from jaxllm.metrics import Ratio
from jaxllm.model import Model
from jaxllm.train.objectives import Batch, Objective, hidden_states
from jaxllm.tree import Tree

# rewards_PC -> advantages_PC, the same for all tokens of a completion; the other two are made token by token.
OF_COMPLETIONS = {
    "group": partial(group_advantages, scale="std"),
    "group_mean": partial(group_advantages, scale="none"),
    "leave_one_out": leave_one_out_advantages,
    "batch": lambda rewards_PC: group_advantages(rewards_PC.reshape(1, -1), scale="none").reshape(rewards_PC.shape),
}
GROUPED = ("group", "group_mean", "leave_one_out")  # compare the completions of a prompt with each other
GAE, TOKEN = "gae", "token"
ADVANTAGES = (*OF_COMPLETIONS, GAE, TOKEN)
# A sequence's ratio is that of its geometric mean per token, as `losses.gspo_clip` has it.
RATIOS = {
    "token": lambda log_ratio_BT, batch: log_ratio_BT,
    "sequence": lambda log_ratio_BT, batch: _with_gradient_of(log_ratio_BT, _segment_mean(log_ratio_BT, batch)),
}
# (config, log_ratio_BT, advantages_BT) -> per_token_BT, the old log-probability taken as 0.
SURROGATES = {
    "clip": lambda c, x_BT, a_BT: ppo_clip(
        x_BT, jnp.zeros_like(x_BT), a_BT, clip_low=c.clip_low, clip_high=c.clip_high
    ),
    "cispo": lambda c, x_BT, a_BT: cispo(x_BT, jnp.zeros_like(x_BT), a_BT, clip_high=c.clip_high),
    "reinforce": lambda c, x_BT, a_BT: -a_BT * x_BT,
}
# mask_NW of an update's completions -> weight_NW
WEIGHTS = {
    "sequence": lambda mask_NW: sequence_weights(mask_NW),
    "token": lambda mask_NW: token_weights(mask_NW),
    "constant": lambda mask_NW: constant_weights(mask_NW, length=mask_NW.shape[1]),
}
# What a batch tells of its tokens, one number each.
COLUMNS = (
    *("weight_BT", "advantage_BT", "sampled_logp_BT"),  # always
    *("old_logp_BT", "ref_logp_BT", "value_BT", "return_BT"),  # where the objective needs them
)
KLS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How a policy learns from rewards. ``configs/common.py`` explains each key beside its default."""

    advantage: str
    ratio: str
    surrogate: str
    weights: str
    clip_low: float
    clip_high: float
    importance_cap: float
    kl: str
    kl_loss: float
    kl_reward: float
    kl_target: float
    kl_horizon: int
    entropy: float
    whiten: bool
    gamma: float
    lam: float
    value_weight: float
    value_clip: float
    epochs: int
    minibatches: int

    def __post_init__(self):
        tables = {"advantage": ADVANTAGES, "ratio": RATIOS, "surrogate": SURROGATES, "weights": WEIGHTS, "kl": KLS}
        for key, known in tables.items():
            if getattr(self, key) not in known:
                raise ValueError(f"policy.{key}={getattr(self, key)!r} is unknown{nearest(getattr(self, key), known)}")
        for key in ("importance_cap", "kl_loss", "kl_reward", "kl_target", "entropy", "value_weight", "value_clip"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"policy.{key}={getattr(self, key)} must not be negative")
        for key in ("epochs", "minibatches", "kl_horizon"):
            if getattr(self, key) < 1:
                raise ValueError(f"policy.{key}={getattr(self, key)} must be at least 1")
        for key in ("gamma", "lam"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"policy.{key}={getattr(self, key)} must be in [0, 1]")
        if not 0 < self.clip_low <= 1 or not self.clip_high > 0:
            raise ValueError(
                f"policy.clip_low={self.clip_low} must be in (0, 1] and clip_high={self.clip_high} positive: the ratio "
                "is kept between 1 - clip_low and 1 + clip_high"
            )
        if self.kl_target and not self.kl_reward:
            raise ValueError(f"policy.kl_target={self.kl_target} adapts kl_reward=0: give a coefficient to begin with")
        if self.kl == "k1" and self.kl_loss:
            raise ValueError(
                f"policy.kl='k1' with kl_loss={self.kl_loss} teaches nothing, its gradient is 0 in the mean: take 'k2' "
                "or 'k3', or give the coefficient to kl_reward"
            )
        if self.surrogate == "reinforce" and self.epochs > 1:
            raise ValueError(
                f"policy.epochs={self.epochs} learns from an older policy's samples again, and surrogate='reinforce' "
                "has no ratio to tell: set epochs=1, or surrogate='clip'"
            )

    @property
    def updates(self) -> int:
        """Optimizer updates from one rollout."""
        return self.epochs * self.minibatches

    @property
    def has_values(self) -> bool:
        """Whether a critic is learned."""
        return self.advantage == GAE

    @property
    def has_reference(self) -> bool:
        """Whether the loss or the rewards know a reference."""
        return self.kl_loss > 0 or self.kl_reward > 0


def policy(model: Model, config: PolicyConfig, *, temperature: float = 1.0) -> Objective:
    """The weighted sum over sampled tokens of the surrogate, the KL to the reference, the entropy and the value loss.

    The batch holds ``weight_BT``, ``advantage_BT`` and ``sampled_logp_BT``, the sampler's own log-probabilities at this
    ``temperature``; ``old_logp_BT``, the trainer's under the parameters that sampled, where several updates learn from
    one rollout; ``ref_logp_BT`` where there is a reference, ``value_BT`` and ``return_BT`` where there is a critic.
    Each token counts min(``importance_cap``, old / sampled probability) times: the two differ where sampler and
    trainer round differently (truncated importance sampling, Ionides 2008; Yao et al. 2025); a cap of 0 corrects
    nothing. ``rollout_train_logp_diff`` is the mean of their absolute difference in nats.
    """

    def objective(params: Tree, batch: Batch, **frozen: Tree):
        mask_BT = batch["mask_BT"]
        hidden_BTD = hidden_states(model, params, batch)
        how = dict(temperature=temperature, mask_BT=mask_BT)
        logp_BT, _, entropy_BT = model.score(params, hidden_BTD, batch["targets_BT"], **how)
        # What lies outside of the mask is deleted here, once: below only weights of 0 meet it.
        given = {name: jnp.where(mask_BT, batch[name], 0.0) for name in COLUMNS if name in batch}
        advantage_BT, weight_BT = given["advantage_BT"], given["weight_BT"]
        old_logp_BT = given.get("old_logp_BT", jax.lax.stop_gradient(logp_BT))
        log_ratio_BT = RATIOS[config.ratio](logp_BT - old_logp_BT, batch)
        mismatch_BT = old_logp_BT - given["sampled_logp_BT"]
        per_token_BT = SURROGATES[config.surrogate](config, log_ratio_BT, advantage_BT)
        if config.importance_cap:
            per_token_BT *= jnp.minimum(jnp.exp(mismatch_BT), config.importance_cap)
        measured = {"entropy": entropy_BT, "rollout_train_logp_diff": jnp.abs(mismatch_BT)}
        measured |= _clipped(config, log_ratio_BT, advantage_BT)
        if "ref_logp_BT" in given:
            kl_BT = KLS[config.kl](logp_BT, given["ref_logp_BT"])
            per_token_BT += config.kl_loss * kl_BT
            measured["kl_per_token"] = kl_BT
        per_token_BT -= config.entropy * entropy_BT
        if config.has_values:
            values_BT, clip = _values(model, params, batch, hidden_BTD), config.value_clip or float("inf")
            value_loss_BT = value_clip(values_BT, given["value_BT"], given["return_BT"], clip=clip)
            per_token_BT += config.value_weight * value_loss_BT
            measured["value_loss"] = value_loss_BT
        loss = jnp.sum(weight_BT * per_token_BT)
        return loss, {name: _mean(x_BT, mask_BT) for name, x_BT in measured.items()}

    return objective


def assess(model: Model, reference: Model | None, config: PolicyConfig, *, temperature: float = 1.0) -> Callable:
    """A function (params, micro-batch, *, ref_params) -> the columns that the objective takes as given, made before the
    first update from a rollout.

    They are ``old_logp_BT`` if there are several updates, ``value_BT`` with a critic, ``ref_logp_BT`` with a reference.
    """
    has_policy = config.updates > 1 or config.has_values

    def columns(params: Tree, batch: Batch, *, ref_params: Tree | None = None) -> Batch:
        targets_BT, how = batch["targets_BT"], dict(temperature=temperature, mask_BT=batch["mask_BT"])
        found = {}
        if has_policy:
            hidden_BTD = hidden_states(model, params, batch)
            found["old_logp_BT"] = model.score(params, hidden_BTD, targets_BT, **how)[0]
        if config.has_values:
            found["value_BT"] = jnp.where(batch["mask_BT"], _values(model, params, batch, hidden_BTD), 0.0)
        if reference is not None:
            hidden_BTD = hidden_states(reference, ref_params, batch)
            found["ref_logp_BT"] = reference.score(ref_params, hidden_BTD, targets_BT, **how)[0]
        return found

    return columns


def credit(
    config: PolicyConfig,
    coefficient: jax.Array,
    rewards_PC: jax.Array,
    mask_NW: jax.Array,
    log_ratio_NW: jax.Array,
    values_NW: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(advantages_NW, returns_NW) of completions n = p C + c, their sampled tokens under ``mask_NW``.

    A completion's reward is given at its last sampled token, less ``coefficient`` times ``log_ratio_NW``, the policy's
    log-probability less the reference's, at every one (Ziegler et al. 2019, arXiv:1909.08593, equation 2). That is k1
    whatever ``config.kl`` says: as a reward, only its gradient is that of the KL divergence. A completion whose reward
    is not finite has none: the caller masks it, and its advantage is 0.
    """
    C = rewards_PC.shape[1]
    later_NW = jnp.cumsum(mask_NW[:, ::-1], axis=1)[:, ::-1]
    is_last_NW = mask_NW & (later_NW == 1)
    token_rewards_NW = jnp.where(is_last_NW, rewards_PC.reshape(-1, 1), 0.0) - coefficient * log_ratio_NW
    token_rewards_NW = jnp.where(mask_NW, token_rewards_NW, 0.0)
    returns_NW = jnp.zeros_like(token_rewards_NW)
    if config.advantage == GAE:
        found = gae(token_rewards_NW, values_NW, mask_NW, gamma=config.gamma, lam=config.lam)
        advantages_NW, returns_NW = found
    elif config.advantage == TOKEN:
        advantages_NW = token_rewards_NW
    else:
        whole_PC = jnp.sum(token_rewards_NW, axis=1).reshape(-1, C)
        whole_PC = jnp.where(jnp.isfinite(rewards_PC), whole_PC, jnp.nan)
        advantages_NW = jnp.where(mask_NW, OF_COMPLETIONS[config.advantage](whole_PC).reshape(-1, 1), 0.0)
    advantages_NW = whiten(advantages_NW, mask_NW) if config.whiten else advantages_NW
    return jnp.where(mask_NW, advantages_NW, 0.0), returns_NW


def adapted(coefficient: float, kl: float, *, target: float, horizon: int, count: int) -> float:
    """The coefficient of the KL after ``count`` completions that were ``kl`` nats from the reference.

    c (1 + clip(kl / target - 1, -0.2, 0.2) count / horizon) (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * count / horizon)


def _values(model: Model, params: Tree, batch: Batch, hidden_BTD: jax.Array) -> jax.Array:
    """value_BT: of the policy's hidden states, or of those of a critic with parameters of its own."""
    if model.config.critic:
        params = params["critic"]
        hidden_BTD = hidden_states(model, params, batch)
    return model.scalars(params, hidden_BTD)


def _clipped(config: PolicyConfig, log_ratio_BT: jax.Array, advantage_BT: jax.Array) -> dict[str, jax.Array]:
    """The ratio, and where the surrogate holds it back: too high for a good token, too low for a bad one."""
    ratio_BT = jnp.exp(log_ratio_BT)
    high_BT, low_BT = ratio_BT > 1 + config.clip_high, ratio_BT < 1 - config.clip_low
    if config.surrogate == "clip":
        high_BT, low_BT = high_BT & (advantage_BT > 0), low_BT & (advantage_BT < 0)
    found = {"ratio": ratio_BT, "clipped_high": high_BT}
    return found | ({"clipped_low": low_BT} if config.surrogate == "clip" else {})


def _segment_mean(x_BT: jax.Array, batch: Batch) -> jax.Array:
    """mean_BT: of x over the unmasked tokens of the same segment."""
    segments_BT, mask_BT = batch["segments_BT"], batch["mask_BT"]
    same_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & mask_BT[:, None, :]
    total_BT = jnp.sum(jnp.where(same_BTS, x_BT[:, None, :], 0.0), axis=-1)
    return total_BT / jnp.maximum(jnp.sum(same_BTS, axis=-1, dtype=jnp.float32), 1.0)


def _with_gradient_of(x_BT: jax.Array, value_BT: jax.Array) -> jax.Array:
    """``value_BT`` with the gradient of ``x_BT``."""
    return jax.lax.stop_gradient(value_BT) + x_BT - jax.lax.stop_gradient(x_BT)


def _mean(x_BT: jax.Array, mask_BT: jax.Array) -> Ratio:
    return Ratio(jnp.sum(jnp.where(mask_BT, x_BT, 0.0)), jnp.sum(mask_BT, dtype=jnp.float32))
