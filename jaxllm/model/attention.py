"""Attention of queries over keys behind one function: every implementation takes the same arguments, and another kernel joins the table.

A query sees a key of its own segment whose position is not later than its own and, in a local layer, less than a window before it.
Softmax is in float32 whatever the operands are.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.model.single_query import single_query


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
    function = single_query if q_BTNH.shape[1] == 1 else IMPLEMENTATIONS[implementation]
    return function(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _einsum(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    """Plain products with operands in ``operand_dtype``, backward too; the backward pass makes the [B, N, T, S] weights again."""
    return _einsum_forward(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype)[0]


def _einsum_forward(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    q_BTKGH = _grouped(q_BTNH, k_BSKH.shape[2]).astype(operand_dtype)
    k_BSKH, v_BSKH = k_BSKH.astype(operand_dtype), v_BSKH.astype(operand_dtype)
    weights_BKGTS, _ = _weights(q_BTKGH, k_BSKH, visibility, scale, soft_cap)
    out_BTKGH = _wide("bkgts,bskh->btkgh", weights_BKGTS.astype(operand_dtype), v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype), (q_BTKGH, k_BSKH, v_BSKH, visibility)


def _einsum_backward(scale, soft_cap, operand_dtype, residuals, out_grad_BTNH):
    q_BTKGH, k_BSKH, v_BSKH, visibility = residuals
    dtype = out_grad_BTNH.dtype
    g_BTKGH = _grouped(out_grad_BTNH, k_BSKH.shape[2]).astype(operand_dtype)
    weights_BKGTS, slope_BKGTS = _weights(q_BTKGH, k_BSKH, visibility, scale, soft_cap)
    v_grad_BSKH = _over_queries(weights_BKGTS.astype(operand_dtype), g_BTKGH)
    grad_BKGTS = _wide("btkgh,bskh->bkgts", g_BTKGH, v_BSKH)
    mean_BKGT1 = jnp.sum(weights_BKGTS * grad_BKGTS, axis=-1, keepdims=True)
    grad_BKGTS = (weights_BKGTS * (grad_BKGTS - mean_BKGT1) * slope_BKGTS * scale).astype(operand_dtype)
    q_grad_BTNH = _wide("bkgts,bskh->btkgh", grad_BKGTS, k_BSKH).reshape(out_grad_BTNH.shape)
    k_grad_BSKH = _over_queries(grad_BKGTS, q_BTKGH)
    return q_grad_BTNH.astype(dtype), k_grad_BSKH.astype(dtype), v_grad_BSKH.astype(dtype), None


_einsum.defvjp(_einsum_forward, _einsum_backward)
_wide = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _grouped(x_BTNH, K):
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H)


def _weights(q_BTKGH, k_BSKH, visibility, scale, soft_cap):
    """(attention weights, slope of the soft cap at each score), float32."""
    scores_BKGTS, slope_BKGTS = _wide("btkgh,bskh->bkgts", q_BTKGH, k_BSKH) * scale, 1.0
    if soft_cap:
        capped_BKGTS = jnp.tanh(scores_BKGTS / soft_cap)
        scores_BKGTS, slope_BKGTS = soft_cap * capped_BKGTS, 1.0 - jnp.square(capped_BKGTS)
    # The lowest finite score and not -inf: a query that sees nothing gets even weights instead of NaN.
    scores_BKGTS = jnp.where(visibility.mask_BTS()[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores_BKGTS, axis=-1), slope_BKGTS


def _over_queries(a_BKGTS, b_BTKGH):
    """The sum over queries, [B, S, K, H]. Summed over halves of T as well as within them: XLA's CPU backend runs a product with two
    summed dimensions fast, and one over T alone slowly or, in bfloat16 and depending on layouts, not at all."""
    B, K, G, T, S = a_BKGTS.shape
    if T % 2:
        return _wide("bkgts,btkgh->bskh", a_BKGTS.astype(jnp.float32), b_BTKGH.astype(jnp.float32))
    a, b = a_BKGTS.reshape(B, K, G, 2, T // 2, S), b_BTKGH.reshape(B, 2, T // 2, K, G, -1)
    return _wide("bkgets,betkgh->bskh", a, b)


def _dot_product(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    """JAX's own ``dot_product_attention``; it has no soft cap."""
    if soft_cap:
        raise ValueError(
            f"model.attention='dot_product' has no soft cap (model.attention_soft_cap={soft_cap}); use 'einsum'"
        )
    q, k, v = (x.astype(operand_dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
    mask_B1TS = visibility.mask_BTS()[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, scale=scale).astype(q_BTNH.dtype)


def _per_sequence(q_BTNH, k_BSKH, v_BSKH, visibility, **options):
    """One sequence at a time, its scores made again in the backward pass: the scores stay in a CPU's cache."""

    @jax.checkpoint
    def one(row):
        row = jax.tree.map(lambda x: x[None], row)
        return _einsum(row[0], row[1], row[2], row[3]._replace(window=visibility.window), **options)[0]

    return jax.lax.map(one, (q_BTNH, k_BSKH, v_BSKH, visibility._replace(window=None)))


def _dot_product(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    """JAX's own ``dot_product_attention``; it has no soft cap."""
    if soft_cap:
        raise ValueError(
            f"model.attention='dot_product' has no soft cap (model.attention_soft_cap={soft_cap}); use 'einsum'"
        )
    q, k, v = (x.astype(operand_dtype) for x in (q_BTNH, k_BSKH, v_BSKH))
    mask_B1TS = visibility.mask_BTS()[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, scale=scale).astype(q_BTNH.dtype)


IMPLEMENTATIONS = {"einsum": _einsum, "dot_product": _dot_product}
