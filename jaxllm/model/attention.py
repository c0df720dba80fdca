"""Attention of queries over keys behind one function: implementations take the same arguments, kernels join a table.

A query sees a key of its own segment, or of the one that this continues, whose position is not later than its own and,
in a local layer, less than a window before it. Softmax is in float32 whatever the operands are.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.sharding import place

# The lowest finite score and not -inf: a query that sees nothing gets even weights instead of NaN.
LOWEST = jnp.finfo(jnp.float32).min
# A row that attends to itself is cut into at most so many blocks of at least so many positions.
MOST_BLOCKS, SMALLEST_BLOCK = 4, 128


class Visibility(NamedTuple):
    """Which keys a query may see. ``window`` is a scalar or None (no limit); segments are None if there is only one.

    As many keys as queries are those of the same row, in order: documents lie along it by their positions, each behind
    the one that it continues. So no query sees a key that lies behind it.
    ``query_parents_BT`` names the segment that a query's own continues, or its own; None if none continues another.
    """

    query_positions_BT: jax.Array
    key_positions_BS: jax.Array
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    window: jax.Array | None = None
    query_parents_BT: jax.Array | None = None

    def mask_BTS(self) -> jax.Array:
        """True where the query at T may see the key at S."""
        distance_BTS = _whole(self.query_positions_BT)[:, :, None] - _whole(self.key_positions_BS)[:, None, :]
        mask_BTS = distance_BTS >= 0
        if self.window is not None:
            mask_BTS &= distance_BTS < self.window
        if self.query_segments_BT is not None:
            key_segments_BS = _whole(self.key_segments_BS)
            related_BTS = _whole(self.query_segments_BT)[:, :, None] == key_segments_BS[:, None, :]
            if self.query_parents_BT is not None:
                related_BTS |= _whole(self.query_parents_BT)[:, :, None] == key_segments_BS[:, None, :]
            mask_BTS &= related_BTS
        return mask_BTS


def _whole(x: jax.Array) -> jax.Array:
    """``x`` itself, made once. XLA's CPU backend would cut it from its batch again for every score that it is compared
    for; it repeats no remainder, which counts as costly.
    """
    return jax.lax.rem(x, jnp.int32(2**31 - 1))


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

    Grouped queries (Ainslie et al. 2023, arXiv:2305.13245): query head n reads key-value head n // (N / K).
    ``soft_cap`` c > 0 caps scores as c tanh(score / c). ``implementation`` names a row of ``IMPLEMENTATIONS``; a single
    query has its own.
    """
    function = _single_query if q_BTNH.shape[1] == 1 else IMPLEMENTATIONS[implementation]
    return function(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _einsum(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    """Plain products with operands in ``operand_dtype``, backward too; nothing of [T, S] is kept between the passes.

    A row that attends to itself does so block by block, and no block looks behind its end. The backward pass makes the
    weights again from the logarithm of each query's sum (FlashAttention, Dao et al. 2022, arXiv:2205.14135, section
    3.1), with keys before queries: so every product sums over the last letter of its first operand, and XLA's CPU
    backend copies no scores to multiply them.
    """
    return _einsum_forward(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype)[0]


def _einsum_forward(q_BTNH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    q_BKGTH = _grouped(q_BTNH, k_BSKH.shape[2]).astype(operand_dtype)
    k_BKSH, v_BKSH = (x.astype(operand_dtype).transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    mask_BTS = visibility.mask_BTS()
    parts = []
    for start, end, keys_end in _blocks(*mask_BTS.shape[1:]):
        seen = k_BKSH[:, :, :keys_end], v_BKSH[:, :, :keys_end], mask_BTS[:, start:end, :keys_end]
        parts.append(_attended(q_BKGTH[:, :, :, start:end], *seen, scale, soft_cap))
    out_BKGTH, logz_BKGT = (jnp.concatenate(x, axis=3) for x in zip(*parts, strict=True))
    out_BTNH = _ungrouped(out_BKGTH, q_BTNH)
    return out_BTNH, (q_BKGTH, k_BKSH, v_BKSH, visibility, out_BTNH, logz_BKGT)


def _einsum_backward(scale, soft_cap, operand_dtype, residuals, out_grad_BTNH):
    q_BKGTH, k_BKSH, v_BKSH, visibility, out_BTNH, logz_BKGT = residuals
    # The mean over keys of the weights' gradient, under the weights.
    mean_BTN = jnp.sum(out_grad_BTNH.astype(jnp.float32) * out_BTNH, axis=-1)
    mean_BKGT = _grouped(mean_BTN[..., None], k_BKSH.shape[1])[..., 0]
    g_BKGTH = _grouped(out_grad_BTNH, k_BKSH.shape[1]).astype(operand_dtype)
    mask_BST = visibility.mask_BTS().swapaxes(1, 2)
    parts = []
    for start, _, keys_end in _blocks(*mask_BST.shape[:0:-1]):
        seeing = (x[:, :, :, start:] for x in (q_BKGTH, g_BKGTH, logz_BKGT, mean_BKGT))
        seen = (x[:, :, start:keys_end] for x in (k_BKSH, v_BKSH))
        parts.append(_attended_backward(*seeing, *seen, mask_BST[:, start:keys_end, start:], scale, soft_cap))
    q_grads, k_grads, v_grads = zip(*parts, strict=True)
    T = mask_BST.shape[2]
    q_grad_BKHGT = sum(jnp.pad(x, ((0, 0),) * 4 + ((T - x.shape[4], 0),)) for x in q_grads)
    k_grad_BSKH, v_grad_BSKH = (
        place(jnp.concatenate(x, axis=2).transpose(0, 2, 1, 3).astype(out_grad_BTNH.dtype), "bskh")
        for x in (k_grads, v_grads)
    )
    return _ungrouped(q_grad_BKHGT.transpose(0, 1, 3, 4, 2), out_grad_BTNH), k_grad_BSKH, v_grad_BSKH, None


_einsum.defvjp(_einsum_forward, _einsum_backward)
_wide = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _blocks(T: int, S: int) -> list[tuple[int, int, int]]:
    """(start, end, end of the keys that it may see) of each block of queries: one, where the keys are of elsewhere."""
    size = max(SMALLEST_BLOCK, -(-T // MOST_BLOCKS)) if T == S else T
    ends = ((start, min(start + size, T)) for start in range(0, T, size))
    return [(start, end, S - T + end) for start, end in ends]


def _attended(q_BKGTH, k_BKSH, v_BKSH, mask_BTS, scale, soft_cap):
    """(attention's result, the logarithm of the sum of each query's exponentiated scores)."""
    scores_BKGTS, _ = _capped(scale * _wide("bkgth,bksh->bkgts", q_BKGTH, k_BKSH), soft_cap)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, LOWEST)
    top_BKGT = jnp.max(scores_BKGTS, axis=-1)
    weights_BKGTS = jnp.exp(scores_BKGTS - top_BKGT[..., None])
    sum_BKGT = jnp.sum(weights_BKGTS, axis=-1)
    out_BKGTH = _wide("bkgts,bksh->bkgth", weights_BKGTS.astype(v_BKSH.dtype), v_BKSH) / sum_BKGT[..., None]
    return out_BKGTH, top_BKGT + jnp.log(sum_BKGT)


def _attended_backward(q_BKGTH, g_BKGTH, logz_BKGT, mean_BKGT, k_BKSH, v_BKSH, mask_BST, scale, soft_cap):
    """The gradients of queries as [B, K, H, G, T], of keys and of values, for the result's gradient ``g_BKGTH``.

    A query that sees nothing would have weights of 1; in its own row each sees itself.
    """
    scores_BKSGT, slope = _capped(scale * _wide("bksh,bkgth->bksgt", k_BKSH, q_BKGTH), soft_cap)
    scores_BKSGT = jnp.where(mask_BST[:, None, :, None], scores_BKSGT, LOWEST)
    weights_BKSGT = jnp.exp(scores_BKSGT - logz_BKGT[:, :, None])
    v_grad_BKSH = _wide("bksgt,bkgth->bksh", weights_BKSGT.astype(g_BKGTH.dtype), g_BKGTH)
    grad_BKSGT = _wide("bksh,bkgth->bksgt", v_BKSH, g_BKGTH) - mean_BKGT[:, :, None]
    # Scaled afterwards, where there is less to multiply.
    grad_BKSGT = (weights_BKSGT * grad_BKSGT * slope).astype(q_BKGTH.dtype)
    k_grad_BKSH = scale * _wide("bksgt,bkgth->bksh", grad_BKSGT, q_BKGTH)
    # Without the barrier XLA folds the transpose into a product that its CPU backend lacks in bfloat16.
    k_BKHS = jax.lax.optimization_barrier(k_BKSH.swapaxes(2, 3))
    return scale * _wide("bkhs,bksgt->bkhgt", k_BKHS, grad_BKSGT), k_grad_BKSH, v_grad_BKSH


def _grouped(x_BTNH, K):
    """As [B, K, G, T, H]. A single head's axis loses its place on the mesh in a reshape."""
    B, T, N, H = x_BTNH.shape
    return place(x_BTNH.reshape(B, T, K, N // K, H), "btkgh").transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTH, like_BTNH):
    return place(x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(like_BTNH.shape), "btnh").astype(like_BTNH.dtype)


def _capped(scores, soft_cap):
    """(capped scores, slope of the cap at each)."""
    if not soft_cap:
        return scores, 1.0
    capped = jnp.tanh(scores / soft_cap)
    return soft_cap * capped, 1.0 - jnp.square(capped)


def _single_query(q_B1NH, k_BSKH, v_BSKH, visibility, scale, soft_cap, operand_dtype):
    """One query over a cache, whose products are as wide as the cache: where that is float32, they are memory-bound
    sums that a CPU runs 5 times faster than in bfloat16. The query and the weights are rounded to ``operand_dtype``,
    as the keys and values in a cache are, so that generation and training agree.
    """
    q_BKGH = rounded(_grouped(q_B1NH, k_BSKH.shape[2])[:, :, :, 0], operand_dtype).astype(k_BSKH.dtype)
    scores_BKGS, _ = _capped(scale * _wide("bkgh,bskh->bkgs", q_BKGH, k_BSKH), soft_cap)
    scores_BKGS = jnp.where(visibility.mask_BTS()[:, None], scores_BKGS, LOWEST)
    weights_BKGS = rounded(jax.nn.softmax(scores_BKGS, axis=-1), operand_dtype).astype(v_BSKH.dtype)
    return _ungrouped(_wide("bkgs,bskh->bkgh", weights_BKGS, v_BSKH)[:, :, :, None], q_B1NH)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``x`` with no more precision than ``dtype`` has. (XLA may leave out a cast there and back.)"""
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


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
