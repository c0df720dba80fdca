"""Attention of one query per sequence over a cache: weighted sums, laid out so that a CPU reads the cache once at the speed of its memory."""

import jax
import jax.numpy as jnp


def single_query(q_B1NH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    """What ``attention.attend`` says, for T = 1.

    Sums of products instead of matrix products, which for a single query are no faster on accelerators, where memory is the limit, and
    slow on a CPU (10 times in bfloat16). The query and the weights are rounded to ``operand_dtype`` as a product's operands
    are, and the cache holds rounded keys and values, so that generation and training agree.
    """
    B, _, N, H = q_B1NH.shape
    K = k_BSKH.shape[2]
    q_BKGH = rounded(q_B1NH.reshape(B, K, N // K, H).astype(jnp.float32), operand_dtype)
    # The transposes undo those of the cache: keys are summed over H with S innermost, values over S with H innermost.
    k_BKHS, v_BKSH = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
    # Each query of a group by itself: one dimension more in the sum, even of size 1, costs a CPU its vector instructions.
    groups = range(N // K)
    scores_BKGS = scale * jnp.stack([jnp.sum(q_BKGH[:, :, g, :, None] * k_BKHS, axis=2) for g in groups], axis=2)
    if soft_cap:
        scores_BKGS = soft_cap * jnp.tanh(scores_BKGS / soft_cap)
    scores_BKGS = jnp.where(visibility.mask_BTS()[:, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = rounded(jax.nn.softmax(scores_BKGS, axis=-1), operand_dtype)
    # Without the barrier XLA may make the weights again for each of the H columns that they multiply.
    weights_BKGS = jax.lax.optimization_barrier(weights_BKGS)
    out_BKGH = jnp.stack([jnp.sum(weights_BKGS[:, :, g, :, None] * v_BKSH, axis=2) for g in groups], axis=2)
    return out_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x`` with no more precision than ``dtype`` has, in its own dtype. (A cast there and back XLA would leave out.)"""
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
