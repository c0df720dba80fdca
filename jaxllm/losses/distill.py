"""Divergences between a student's next-token distribution and its teacher's, who is a constant and gets no gradient.

Both sets of logits live one chunk of positions at a time, forward and backward, so no array of shape [B, T, V] ever
exists.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.einsum import einsum
from jaxllm.losses.logprobs import chunks_of, joined


def generalized_jsd(
    student_logits_BTV: jax.Array, teacher_logits_BTV: jax.Array, *, beta: float, temperature: float = 1.0
) -> jax.Array:
    """per_token_BT: beta KL(p || m) + (1 - beta) KL(q || m) in nats, m = beta p + (1 - beta) q, with p the teacher's
    and q the student's softmax(logits / temperature); KL(p || q) at beta 0 (forward), KL(q || p) at beta 1 (reverse).

    GKD (Agarwal et al. 2023, arXiv:2306.13649, section 2), as in TRL. The ends are cases of their own: the formula
    itself tends to beta KL(p || q) and (1 - beta) KL(q || p) there, so near an end beta scales the gradient as well.
    There is no factor temperature^2 (Hinton et al. 2015, arXiv:1503.02531, section 2): whoever mixes this with a
    cross-entropy multiplies by it. Raises ``ValueError`` where beta is not in [0, 1].
    """
    student_logp_BTV, teacher_logp_BTV = (
        jax.nn.log_softmax(logits_BTV.astype(jnp.float32) / temperature, axis=-1)
        for logits_BTV in (student_logits_BTV, jax.lax.stop_gradient(teacher_logits_BTV))
    )
    return _divergence(student_logp_BTV, teacher_logp_BTV, beta)


def top_k_jsd(
    student_logits_BTV: jax.Array,
    teacher_ids_BTK: jax.Array,
    teacher_logp_BTJ: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
) -> jax.Array:
    """per_token_BT: ``generalized_jsd`` over J = K + 1 outcomes, the teacher's K tokens and any other token.

    ``teacher_ids_BTK`` are distinct; ``teacher_logp_BTJ`` are log-probabilities of the teacher at this same
    ``temperature``, of all other tokens together the last: from the K alone, rounded as what is stored is, a small rest
    would be lost. Joining outcomes never raises a divergence, so this is a lower bound of the whole one, and equal to
    it for K = V - 1. Raises ``ValueError`` for a larger K.
    """
    K, V = teacher_ids_BTK.shape[-1], student_logits_BTV.shape[-1]
    if K >= V:
        raise ValueError(f"the teacher's {K} tokens leave none of a vocabulary of {V}; give generalized_jsd its logits")
    student_logp_BTV = jax.nn.log_softmax(student_logits_BTV.astype(jnp.float32) / temperature, axis=-1)
    teacher_logp_BTJ = jax.lax.stop_gradient(teacher_logp_BTJ).astype(jnp.float32)
    return _divergence(_bucketed(student_logp_BTV, teacher_ids_BTK.astype(jnp.int32)), teacher_logp_BTJ, beta)


def chunked_generalized_jsd(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    teacher_hidden_BTE: jax.Array,
    teacher_head_EV: jax.Array,
    *,
    beta: float,
    chunk: int,
    temperature: float = 1.0,
    soft_cap: float = 0.0,
    teacher_soft_cap: float = 0.0,
    operand_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """per_token_BT: ``generalized_jsd`` of the logits cap(hidden @ head), ``chunk`` positions at a time.

    Widths may differ, the vocabulary is one. The other options are those of ``chunked_token_logprobs``. The backward
    pass makes each chunk's logits again.
    """

    def part(hidden_BTD, teacher_hidden_BTE):
        student_logits_BTV = _logits(hidden_BTD, head_DV, soft_cap, operand_dtype)
        teacher_logits_BTV = _logits(teacher_hidden_BTE, teacher_head_EV, teacher_soft_cap, operand_dtype)
        return generalized_jsd(student_logits_BTV, teacher_logits_BTV, beta=beta, temperature=temperature)

    return _in_chunks(part, chunk, hidden_BTD, teacher_hidden_BTE)


def chunked_top_k(
    hidden_BTE: jax.Array,
    head_EV: jax.Array,
    *,
    k: int,
    chunk: int,
    temperature: float = 1.0,
    soft_cap: float = 0.0,
    operand_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(ids_BTK, logp_BTJ): what ``top_k_jsd`` takes of a teacher, whose ``k`` likeliest tokens these are, best first.

    Log-probabilities are float32, of softmax(cap(hidden @ head) / temperature), made ``chunk`` positions at a time.
    """

    def part(hidden_BTE):
        logits_BTV = _logits(hidden_BTE, head_EV, soft_cap, operand_dtype)
        _, ids_BTK = jax.lax.top_k(_whole(logits_BTV), k)
        return ids_BTK, _bucketed(jax.nn.log_softmax(logits_BTV / temperature, axis=-1), ids_BTK)

    return _in_chunks(part, chunk, hidden_BTE)


def chunked_top_k_jsd(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    teacher_ids_BTK: jax.Array,
    teacher_logp_BTJ: jax.Array,
    *,
    beta: float,
    chunk: int,
    temperature: float = 1.0,
    soft_cap: float = 0.0,
    operand_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """per_token_BT: ``top_k_jsd`` of the logits cap(hidden @ head), as ``chunked_generalized_jsd`` makes them."""

    def part(hidden_BTD, teacher_ids_BTK, teacher_logp_BTJ):
        student_logits_BTV = _logits(hidden_BTD, head_DV, soft_cap, operand_dtype)
        return top_k_jsd(student_logits_BTV, teacher_ids_BTK, teacher_logp_BTJ, beta=beta, temperature=temperature)

    return _in_chunks(part, chunk, hidden_BTD, teacher_ids_BTK, teacher_logp_BTJ)


def _in_chunks(part, chunk, *arrays):
    """``part(*arrays)`` per token, ``chunk`` positions at a time; nothing of a chunk is kept for the backward pass."""
    part = jax.checkpoint(part, policy=jax.checkpoint_policies.nothing_saveable)
    per_token = jax.lax.map(lambda parts: part(*parts), chunks_of(chunk, *arrays))
    return jax.tree.map(lambda chunks: joined(chunks, arrays[0].shape[1]), per_token)


def _logits(hidden_BTD, head_DV, soft_cap, operand_dtype):
    logits_BTV = einsum("btd,dv->btv", hidden_BTD.astype(jnp.float32), head_DV, operand_dtype or hidden_BTD.dtype)
    return soft_cap * jnp.tanh(logits_BTV / soft_cap) if soft_cap else logits_BTV


def _whole(logits_BTV):
    """With the vocabulary in one piece: a sort along a sharded one is an error."""
    *axes, of_vocabulary = jax.typeof(logits_BTV).sharding.spec
    return jax.reshard(logits_BTV, jax.P(*axes, None)) if of_vocabulary else logits_BTV


def _divergence(student_logp, teacher_logp, beta):
    """Of normalised log-probabilities along the last axis."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be in [0, 1]: 0 is the forward KL divergence, 1 the reverse one")
    if beta == 0:
        return _kl(teacher_logp, student_logp)
    if beta == 1:
        return _kl(student_logp, teacher_logp)
    mixture_logp = jnp.logaddexp(teacher_logp + math.log(beta), student_logp + math.log1p(-beta))
    return beta * _kl(teacher_logp, mixture_logp) + (1 - beta) * _kl(student_logp, mixture_logp)


def _kl(p_logp, q_logp):
    return jnp.sum(jnp.exp(p_logp) * (p_logp - q_logp), axis=-1)


def _bucketed(logp_BTV, ids_BTK):
    """Log-probabilities of the K tokens, and of all others together as the last of J = K + 1.

    Tokens are picked by comparison, one of the K at a time: a gather along a sharded vocabulary is an error.
    """
    vocabulary_11V = jnp.arange(logp_BTV.shape[-1])[None, None, :]

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def pick(others_BTV, ids_BT):
        is_picked_BTV = vocabulary_11V == ids_BT[..., None]
        logp_BT = jnp.sum(jnp.where(is_picked_BTV, logp_BTV, 0.0), axis=-1)
        return others_BTV & ~is_picked_BTV, logp_BT

    others_BTV, logp = jax.lax.scan(pick, jnp.full_like(logp_BTV, True, bool), jnp.moveaxis(ids_BTK, -1, 0))
    rest_BT = jax.nn.logsumexp(jnp.where(others_BTV, logp_BTV, -jnp.inf), axis=-1)
    return jnp.concatenate([jnp.moveaxis(logp, 0, -1), rest_BT[..., None]], axis=-1)
