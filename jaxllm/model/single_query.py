"""Attention of one query per sequence over a cache: weighted sums that a CPU runs at the speed of its memory."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.sharding import spec

KEY_BLOCK = 64


def single_query(q_B1NH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    """What ``attention.attend`` says, for T = 1.

    Sums of products instead of matrix products, which for a single query are no faster on accelerators, where memory is
    the limit, and slow on a CPU (10 times in bfloat16). The query and the weights are rounded to ``operand_dtype`` as a
    product's operands are, and the cache holds rounded keys and values, so that generation and training agree.
    """
    options = dict(scale=scale, soft_cap=soft_cap, operand_dtype=operand_dtype)
    return per_shard(partial(_single_query, **options), "btnh")(q_B1NH, k_BSKH, v_BSKH, visibility)


def _single_query(q_B1NH, k_BSKH, v_BSKH, visibility, *, scale, soft_cap, operand_dtype):
    B, _, N, H = q_B1NH.shape
    K = k_BSKH.shape[2]
    q_BKGH = rounded(q_B1NH.reshape(B, K, N // K, H).astype(jnp.float32), operand_dtype)
    keys, v_BKSH = key_blocks(k_BSKH), v_BSKH.transpose(0, 2, 1, 3)
    # Each query of a group by itself: one dimension more in the sum, even of size 1, costs a CPU its vector
    # instructions.
    groups = range(N // K)
    scores = jnp.stack([jnp.sum(q_BKGH[:, :, g, None, :, None] * keys, axis=3) for g in groups], axis=2)
    scores_BKGS = scale * scores.reshape(B, K, N // K, -1)
    if soft_cap:
        scores_BKGS = soft_cap * jnp.tanh(scores_BKGS / soft_cap)
    scores_BKGS = jnp.where(visibility.mask_BTS()[:, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = rounded(jax.nn.softmax(scores_BKGS, axis=-1), operand_dtype)
    # Without the barrier XLA may make the weights again for each of the H columns that they multiply.
    weights_BKGS = jax.lax.optimization_barrier(weights_BKGS)
    out_BKGH = jnp.stack([jnp.sum(weights_BKGS[:, :, g, :, None] * v_BKSH, axis=2) for g in groups], axis=2)
    return out_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)


def key_blocks(k_BSKH: jax.Array) -> jax.Array:
    """Keys as the cache holds them, [B, K, S / 64, H, 64]: a score sums over H, so positions lie innermost, and blocks
    of them in one piece, which a CPU reads twice as fast as rows of S positions.
    """
    B, S, K, H = k_BSKH.shape
    return k_BSKH.reshape(B, S // KEY_BLOCK, KEY_BLOCK, K, H).transpose(0, 3, 1, 4, 2)


def from_key_blocks(blocks: jax.Array) -> jax.Array:
    """k_BSKH of ``key_blocks``; XLA leaves out the two together."""
    B, K, _, H, _ = blocks.shape
    return blocks.transpose(0, 2, 4, 1, 3).reshape(B, -1, K, H)


def per_shard(function: Callable, letters: str) -> Callable:
    """``function`` on each device's own rows and heads, its result of these letters; as it is where no mesh is set."""
    return function if spec(letters) is None else jax.shard_map(function, out_specs=spec(letters))


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x`` with no more precision than ``dtype`` has. (XLA may leave out a cast there and back.)"""
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
