"""Weights that normalise a batch, and the cross-entropy that they weigh.

Normalisation is data: a batch's ``weight_BT`` is made once over the global batch (any leading micro-batch axes
included) and sums to 1, so every loss is ``sum(weight_BT * per_token_BT)`` and micro-batches, hosts and devices just
add.
"""

import jax
import jax.numpy as jnp


def token_weights(mask_BT: jax.Array) -> jax.Array:
    """w = mask / sum(mask): every unmasked token counts the same (the mean over tokens).

    Works on [..., B, T] and sums to 1 over all axes; an all-masked batch gets all zeros, not NaN.
    """
    return mask_BT / jnp.maximum(jnp.sum(mask_BT, dtype=jnp.float32), 1.0)


def sequence_weights(mask_BT: jax.Array) -> jax.Array:
    """w = mask / (tokens of the row) / (rows that have any): every sequence counts the same (the mean of sequence
    means).

    Works on [..., B, T] and sums to 1 over all axes; empty rows get zeros and do not count.
    """
    lengths = jnp.sum(mask_BT, axis=-1, keepdims=True, dtype=jnp.float32)
    rows = jnp.sum(lengths > 0, dtype=jnp.float32)
    return mask_BT / jnp.maximum(lengths, 1.0) / jnp.maximum(rows, 1.0)


def constant_weights(mask_BT: jax.Array, *, length: int) -> jax.Array:
    """w = mask / (length * rows): each row's sum over a constant length (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783,
    section 3.2).

    The weights of full rows sum to 1; shorter rows weigh less in all, so that no token's weight depends on its row's
    length.
    """
    rows = mask_BT.size // mask_BT.shape[-1]
    return mask_BT / jnp.float32(length * rows)


def cross_entropy(
    logp_BT: jax.Array, weight_BT: jax.Array, *, logz_BT: jax.Array | None = None, z_coef: float = 0.0
) -> jax.Array:
    """sum of weight * (-logp + z_coef * logz^2), a scalar.

    The z-loss keeps log-partition values near 0 (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5); ``logz_BT``
    is needed where ``z_coef`` is not 0 (``ValueError``).
    """
    if z_coef and logz_BT is None:
        raise ValueError(
            f"z_coef={z_coef} needs logz_BT, which chunked_token_logprobs returns beside the log-probabilities"
        )
    # Masked positions are deleted before the arithmetic, not multiplied by zero after it: what stands there may be
    # anything, infinities included, and would reach the gradient as 0 * inf.
    logp_BT, logz_BT = (x if x is None else jnp.where(weight_BT > 0, x, 0.0) for x in (logp_BT, logz_BT))
    per_token_BT = z_coef * jnp.square(logz_BT) - logp_BT if z_coef else -logp_BT
    return jnp.sum(weight_BT * per_token_BT)
