"""Losses of a policy's tokens in reinforcement learning, of a critic's values, and estimates of a KL divergence.

All are unreduced and keep positions apart, so a weight of 0 deletes any finite garbage, exactly. Advantages, returns,
``old_logp_BT`` and ``ref_logp_BT`` are constants whose producer has stopped the gradient: where the policy that learns
is still the one that sampled, pass ``stop_gradient(logp_BT)``, for the ratio of a thing to itself has no gradient.
"""

import jax
import jax.numpy as jnp

# Ratios of probabilities above e^20 are taken as e^20: no step of a policy is so large, and exp(89) is infinite.
LARGEST_LOG_RATIO = 20.0


def ppo_clip(
    logp_BT: jax.Array, old_logp_BT: jax.Array, advantages_BT: jax.Array, *, clip_low: float, clip_high: float
) -> jax.Array:
    """per_token_BT: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - old_logp).

    PPO (Schulman et al. 2017, arXiv:1707.06347, equation 7) clips alike on both sides; DAPO higher above (Yu et al.
    2025, arXiv:2503.14476, section 3.1). Raises ``ValueError`` where clip_low is not in (0, 1] or clip_high not
    positive.
    """
    return _clipped_surrogate(logp_BT - old_logp_BT, advantages_BT, clip_low, clip_high)


def gspo_clip(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantages_B: jax.Array,
    mask_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> jax.Array:
    """per_token_BT: -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean of logp - old_logp over the row's
    mask); masked positions get 0.

    Each token's s has the value of its sequence's and the gradient of its own log-probability, s_t = stop(s) p_t /
    stop(p_t): under ``sequence_weights`` that is the gradient of the loss of whole sequences (GSPO, Zheng et al. 2025,
    arXiv:2507.18071, section 4.3; equation 5 is the loss). Sequences' ratios move little: the paper clips at 3e-4 and
    4e-4. Raises ``ValueError`` as ``ppo_clip``.
    """
    logp_BT, old_logp_BT = (jnp.where(mask_BT, x_BT, 0.0) for x_BT in (logp_BT, old_logp_BT))
    length_B1 = jnp.sum(mask_BT, axis=1, keepdims=True, dtype=jnp.float32)
    mean_B1 = jnp.sum(logp_BT - old_logp_BT, axis=1, keepdims=True) / jnp.maximum(length_B1, 1.0)
    log_ratio_BT = jax.lax.stop_gradient(mean_B1) + (logp_BT - jax.lax.stop_gradient(logp_BT))
    advantages_BT = jnp.where(mask_BT, advantages_B[:, None], 0.0)
    return _clipped_surrogate(log_ratio_BT, advantages_BT, clip_low, clip_high)


def cispo(logp_BT: jax.Array, old_logp_BT: jax.Array, advantages_BT: jax.Array, *, clip_high: float) -> jax.Array:
    """per_token_BT: -stop(min(r, 1 + clip_high)) A logp, r = exp(logp - old_logp).

    REINFORCE with a truncated importance weight: unlike a clipped ratio, it takes the gradient of no token away
    (MiniMax-M1, Chen et al. 2025, arXiv:2506.13585, which leaves the lower side unclipped too). TRL's epsilon_high is
    1 + clip_high. Raises ``ValueError`` where clip_high is not positive.
    """
    _check_positive("clip_high", clip_high)
    weight_BT = jnp.minimum(_ratio(logp_BT - old_logp_BT), 1 + clip_high)
    return -jax.lax.stop_gradient(weight_BT) * advantages_BT * logp_BT


def value_clip(values_BT: jax.Array, old_values_BT: jax.Array, returns_BT: jax.Array, *, clip: float) -> jax.Array:
    """per_token_BT: max((v - R)^2, (old + clip(v - old, -clip, clip) - R)^2) / 2, in units of the return.

    Of PPO's reference code, not its paper (Engstrom et al. 2020, arXiv:2005.12729); ``clip`` is absolute, infinity for
    none. Raises ``ValueError`` where it is not positive.
    """
    _check_positive("clip", clip)
    near_BT = old_values_BT + jnp.clip(values_BT - old_values_BT, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values_BT - returns_BT), jnp.square(near_BT - returns_BT))


def kl_k1(logp_BT: jax.Array, ref_logp_BT: jax.Array) -> jax.Array:
    """per_token_BT: logp - ref_logp, whose mean over the policy's samples is KL(policy || reference).

    For a reward. As a loss it teaches nothing: the mean of its gradient is 0. This and the next two are Schulman's
    (2020, http://joschu.net/blog/kl-approx.html); of their gradients see Tang & Munos 2025, arXiv:2506.09477.
    """
    return logp_BT - ref_logp_BT


def kl_k2(logp_BT: jax.Array, ref_logp_BT: jax.Array) -> jax.Array:
    """per_token_BT: (logp - ref_logp)^2 / 2, near KL(policy || reference) where the two are near.

    As a loss on the policy's own samples, the mean of its gradient is exactly that of KL(policy || reference).
    """
    return 0.5 * jnp.square(logp_BT - ref_logp_BT)


def kl_k3(logp_BT: jax.Array, ref_logp_BT: jax.Array) -> jax.Array:
    """per_token_BT: exp(d) - 1 - d, d = ref_logp - logp: never negative, and its mean is KL(policy || reference).

    GRPO's (Shao et al. 2024, arXiv:2402.03300, equation 4). As a loss, the mean of its gradient is that of
    KL(reference || policy).
    """
    log_ratio_BT = ref_logp_BT - logp_BT
    return _growth(log_ratio_BT) - log_ratio_BT


def _clipped_surrogate(log_ratio_BT, advantages_BT, clip_low, clip_high):
    if not 0 < clip_low <= 1:
        raise ValueError(f"clip_low={clip_low} must be in (0, 1]: ratios are kept above 1 - clip_low; 1 clips none")
    _check_positive("clip_high", clip_high)
    ratio_BT = _ratio(log_ratio_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)


def _ratio(log_ratio):
    return 1 + _growth(log_ratio)


@jax.custom_jvp
def _growth(log_ratio):
    """exp(log_ratio) - 1, without loss of digits near 0, and bounded above together with its gradient.

    The gradient is written down because that of a clamp would be 0 past the bound, where it is needed most.
    """
    return jnp.expm1(jnp.minimum(log_ratio, LARGEST_LOG_RATIO))


_growth.defjvps(lambda tangent, growth, _: (1 + growth) * tangent)


def _check_positive(name, value):
    if value <= 0:
        raise ValueError(f"{name}={value} must be positive: at 0 nothing could move; infinity clips nothing")
