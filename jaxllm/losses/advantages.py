"""Advantages: how much better than expected a token or a completion was. They are constants to what learns from them,
so these functions, which make them, stop the gradient. All is float32 and made of the whole batch, before it is cut.
"""

import jax
import jax.numpy as jnp

# Added to a variance (of whitened values) and to a standard deviation (of a group's rewards), so that 0 / 0 is 0.
WHITEN_EPSILON, GROUP_EPSILON = 1e-8, 1e-6


def gae(
    rewards_BT: jax.Array, values_BT: jax.Array, mask_BT: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """(advantages_BT, returns_BT): A_t = d_t + gamma lam A_t+1, d_t = r_t + gamma V_t+1 - V_t; return = A + V.

    t + 1 is the next unmasked position, however far, so that padding on either side, or a tool's words in between, are
    skipped; past the last one A and V are 0. Masked positions get 0 in both, and a reward there is lost. Generalized
    advantage estimation (Schulman et al. 2015, arXiv:1506.02438, equation 16). Raises ``ValueError`` where gamma or lam
    is not in [0, 1].
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be in [0, 1]: it is what one step leaves of the future")
    rewards_BT, values_BT = (jnp.where(mask_BT, _float32(x_BT), 0.0) for x_BT in (rewards_BT, values_BT))

    def step(following, position):
        next_advantage_B, next_value_B = following
        reward_B, value_B, mask_B = position
        advantage_B = reward_B + gamma * next_value_B - value_B + gamma * lam * next_advantage_B
        here = jnp.where(mask_B, advantage_B, next_advantage_B), jnp.where(mask_B, value_B, next_value_B)
        return here, jnp.where(mask_B, advantage_B, 0.0)

    end_B = jnp.zeros_like(rewards_BT[:, 0])
    _, advantages_TB = jax.lax.scan(step, (end_B, end_B), (rewards_BT.T, values_BT.T, mask_BT.T), reverse=True)
    return jax.lax.stop_gradient((advantages_TB.T, advantages_TB.T + values_BT))


def whiten(x_BT: jax.Array, mask_BT: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """x_BT: (x - mean) / sqrt(variance + 1e-8) over the unmasked positions of all rows; the mean is added back where
    ``shift_mean`` is False.

    The variance is biased (over n), as in the code of Ziegler et al. 2019 (arXiv:1909.08593); TRL's is not. Masked
    positions, and all where fewer than two are unmasked, stay as they are.
    """
    x_BT = _float32(x_BT)
    count = jnp.sum(mask_BT, dtype=jnp.float32)

    def mean(y_BT):
        return jnp.sum(jnp.where(mask_BT, y_BT, 0.0)) / jnp.maximum(count, 1.0)

    center = mean(x_BT)
    centered_BT = jnp.where(mask_BT, x_BT - center, 0.0)
    white_BT = centered_BT * jax.lax.rsqrt(mean(jnp.square(centered_BT)) + WHITEN_EPSILON)
    white_BT = white_BT if shift_mean else white_BT + center
    return jax.lax.stop_gradient(jnp.where(mask_BT & (count > 1), white_BT, x_BT))


def group_advantages(rewards_PC: jax.Array, *, scale: str) -> jax.Array:
    """advantages_PC: (r - mean) / (std + 1e-6) over the completions of a prompt; r - mean where ``scale`` is "none".

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1.2) divides by the standard deviation, here the unbiased one
    (over C - 1), as in TRL and verl; Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.2) does not, lest easy and
    hard prompts weigh more. Equal rewards give exactly 0. A reward that is not finite is no reward: its advantage is 0
    and its group is the others. Raises ``ValueError`` for another ``scale`` or groups of one.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r} must be 'std' (GRPO) or 'none' (Dr. GRPO)")
    centered_PC, count_P1 = _centered(rewards_PC)
    if scale == "std":
        variance_P1 = jnp.sum(jnp.square(centered_PC), axis=1, keepdims=True) / jnp.maximum(count_P1 - 1, 1.0)
        centered_PC = centered_PC / (jnp.sqrt(variance_P1) + GROUP_EPSILON)
    return jax.lax.stop_gradient(centered_PC)


def leave_one_out_advantages(rewards_PC: jax.Array) -> jax.Array:
    """advantages_PC: r - mean of the prompt's other completions = C / (C - 1) (r - mean of all).

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740): a baseline that its own completion does not move leaves the gradient
    unbiased. Rewards that are equal or not finite, and errors, are as for ``group_advantages``.
    """
    centered_PC, count_P1 = _centered(rewards_PC)
    return jax.lax.stop_gradient(centered_PC * count_P1 / jnp.maximum(count_P1 - 1, 1.0))


def _centered(rewards_PC):
    """Finite rewards less their prompt's mean, 0 for the others, and how many are finite, as [P, 1]."""
    rewards_PC = _float32(rewards_PC)
    P, C = rewards_PC.shape
    if C < 2:
        raise ValueError(f"{C} completion per prompt has no others to be compared with; sample at least 2")
    finite_PC = jnp.isfinite(rewards_PC)
    count_P1 = jnp.sum(finite_PC, axis=1, keepdims=True, dtype=jnp.float32)
    # Counted from the best: the mean of C equal floats need not be that float, but the mean of zeros is 0.
    least = jnp.finfo(jnp.float32).min
    best_P1 = jnp.max(rewards_PC, axis=1, keepdims=True, where=finite_PC, initial=least)
    below_PC = jnp.where(finite_PC, rewards_PC - best_P1, 0.0)
    mean_P1 = jnp.sum(below_PC, axis=1, keepdims=True) / jnp.maximum(count_P1, 1.0)
    return jnp.where(finite_PC, below_PC - mean_P1, 0.0), count_P1


def _float32(x):
    """Rewards come from the host in any type."""
    return jnp.asarray(x, jnp.float32)
