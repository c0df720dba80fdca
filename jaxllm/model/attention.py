"""Attention of queries over keys behind one function: every implementation takes the same arguments, and another kernel joins the table.

A query sees a key of its own segment whose position is not later than its own and, in a local layer, less than a window before it.
Softmax is in float32 whatever the operands are.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.sharding import spec


class Visibility(NamedTuple):
    """Which keys a query may see. ``window`` is a scalar or None (no limit); segments are None where all tokens are of one segment."""

    query_positions_BT: jax.Array
    key_positions_BS: jax.Array
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    window: jax.Array | None = None

    def mask_BTS(self) -> jax.Array:
        """True where the query at T may see the key at S."""
        distance_BTS = self.query_positions_BT[:, :, None] - self.key_positions_BS[:, None, :]
        mask_BTS = distance_BTS >= 0
        if self.window is not None:
            mask_BTS &= distance_BTS < self.window
        if self.query_segments_BT is not None:
            mask_BTS &= self.query_segments_BT[:, :, None] == self.key_segments_BS[:, None, :]
        return mask_BTS


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    soft_cap: float,
    implementation: str,
    operand_dtype: jnp.dtype,
) -> jax.Array:
    """softmax(cap(scale * q . k) over the visible keys) . v, as [B, T, N, H] in the dtype of q.

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): query head n reads key-value head n // (N / K). ``soft_cap`` c > 0 caps
    scores as c tanh(score / c). ``implementation`` names a row of ``IMPLEMENTATIONS``; a single query has its own.
    """
    function = _single_query if q_BTNH.shape[1] == 1 else IMPLEMENTATIONS[implementation]
    function = partial(function, scale=scale, soft_cap=soft_cap, operand_dtype=operand_dtype)
    return _per_shard(function)(q_BTNH, k_BSKH, v_BSKH, visibility)


def _per_shard(function):
    """``function`` on each device's own sequences and heads: attention never mixes either, so no kernel needs to know of the mesh."""
    if spec("b") is None:
        return function
    return jax.shard_map(function, out_specs=spec("btnh"))


def _einsum(q_BTNH, k_BSKH, v_BSKH, visibility, *, scale, soft_cap, operand_dtype):
    """Plain matrix products: right everywhere, [B, N, T, S] scores in memory."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(operand_dtype)
    k_BSKH, v_BSKH = k_BSKH.astype(operand_dtype), v_BSKH.astype(operand_dtype)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if soft_cap:
        scores_BKGTS = soft_cap * jnp.tanh(scores_BKGTS / soft_cap)
    scores_BKGTS = jnp.where(visibility.mask_BTS()[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(operand_dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH, preferred_element_type=q_BTNH.dtype)
    return out_BTKGH.reshape(B, T, N, H)


def _single_query(q_BTNH, k_BSKH, v_BSKH, visibility, *, scale, soft_cap, operand_dtype):
    """A weighted sum without matrix products: for one query they are slow on a CPU (20 times in bfloat16) and bound by memory elsewhere.

    Operands are rounded as ``_einsum`` rounds them, so that generation and training agree.
    """
    B, _, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGH = _rounded(q_BTNH.reshape(B, K, N // K, H), operand_dtype)
    k_BKHS, v_BKSH = (_rounded(x, operand_dtype) for x in (k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)))
    scores_BKGS = jnp.sum(q_BKGH[..., None] * k_BKHS[:, :, None], axis=3) * scale
    if soft_cap:
        scores_BKGS = soft_cap * jnp.tanh(scores_BKGS / soft_cap)
    scores_BKGS = jnp.where(visibility.mask_BTS()[:, None], scores_BKGS, jnp.finfo(jnp.float32).min)
    weights_BKGS = _rounded(jax.nn.softmax(scores_BKGS, axis=-1), operand_dtype)
    out_BKGH = jnp.sum(weights_BKGS[..., None] * v_BKSH[:, :, None], axis=3)
    return out_BKGH.reshape(B, 1, N, H).astype(q_BTNH.dtype)


def _rounded(x, dtype):
    """``x`` in float32 with the precision of ``dtype``."""
    return jax.lax.reduce_precision(x.astype(jnp.float32), jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def _per_sequence(q_BTNH, k_BSKH, v_BSKH, visibility, **options):
    """One sequence at a time, its scores made again in the backward pass: the scores stay in a CPU's cache."""

    @jax.checkpoint
    def one(row):
        row = jax.tree.map(lambda x: x[None], row)
        return _einsum(row[0], row[1], row[2], row[3]._replace(window=visibility.window), **options)[0]

    return jax.lax.map(one, (q_BTNH, k_BSKH, v_BSKH, visibility._replace(window=None)))


def _dot_product(q_BTNH, k_BSKH, v_BSKH, visibility, *, scale, soft_cap, operand_dtype):
    """JAX's own ``dot_product_attention``; it has no soft cap."""
    if soft_cap:
        raise ValueError(
            f"model.attention='dot_product' has no soft cap (model.attention_soft_cap={soft_cap}); use 'einsum'"
        )
    q, k, v = (x.astype(operand_dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
    mask_B1TS = visibility.mask_BTS()[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, scale=scale).astype(q_BTNH.dtype)


IMPLEMENTATIONS = {"einsum": _einsum, "per_sequence": _per_sequence, "dot_product": _dot_product}
