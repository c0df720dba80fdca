"""The one log-probability primitive: every stage, from pretraining to reinforcement learning, scores tokens through it.

Logits live one chunk of positions at a time, forward and backward, so no array of shape [B, T, V] ever exists.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.einsum import einsum
from jaxllm.losses.supervised import cross_entropy


def token_logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """log softmax(logits)[token] in float32 from dense logits, under every mesh, a sharded vocabulary included."""
    return _scores(logits_BTV.astype(jnp.float32), tokens_BT)[0]


def chunked_token_logprobs(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    tokens_BT: jax.Array,
    *,
    chunk: int,
    temperature: float = 1.0,
    soft_cap: float = 0.0,
    operand_dtype: jnp.dtype | None = None,
    mask_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logp_BT, logz_BT, entropy_BT) of softmax(cap(hidden @ head) / temperature) in float32, ``chunk`` positions at a
    time.

    ``logp`` is the log-probability of ``tokens_BT``, ``logz`` the log-partition, ``entropy`` that of the distribution
    in nats. ``soft_cap`` c > 0 caps logits as c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2). Operands of
    the head's product are cast to ``operand_dtype`` (that of ``hidden_BTD``, unless told). The backward pass makes each
    chunk's logits again. What lies outside of ``mask_BT``, where one is given, has zeros, and hardly costs anything:
    the head sees the positions under the mask first, and no chunk without any.
    """
    T = hidden_BTD.shape[1]
    score = partial(_chunk_scores, temperature=temperature, soft_cap=soft_cap, operand_dtype=operand_dtype)
    score = jax.checkpoint(score, policy=jax.checkpoint_policies.nothing_saveable)
    if mask_BT is None:
        chunks = chunks_of(chunk, hidden_BTD, tokens_BT)
        return tuple(joined(x, T) for x in jax.lax.map(lambda part: score(part[0], head_DV, part[1]), chunks))

    def score_masked(part):
        part_hidden_BTD, part_tokens_BT, part_mask_BT = part
        nothing = (jnp.zeros_like(part_tokens_BT, jnp.float32),) * 3
        found = jax.lax.cond(
            jnp.any(part_mask_BT), lambda: score(part_hidden_BTD, head_DV, part_tokens_BT), lambda: nothing
        )
        return tuple(jnp.where(part_mask_BT, x, 0.0) for x in found)

    order_BT = jnp.argsort(~mask_BT, axis=1, stable=True)
    first_BTD = jnp.take_along_axis(hidden_BTD, order_BT[..., None], axis=1)
    first = (jnp.take_along_axis(x_BT, order_BT, axis=1) for x_BT in (tokens_BT, mask_BT))
    scores = jax.lax.map(score_masked, chunks_of(chunk, first_BTD, *first))
    back_BT = jnp.argsort(order_BT, axis=1)
    return tuple(jnp.take_along_axis(joined(x, T), back_BT, axis=1) for x in scores)


def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    tokens_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    chunk: int,
    z_coef: float = 0.0,
    soft_cap: float = 0.0,
    operand_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(loss, logp_BT): ``cross_entropy`` of ``chunked_token_logprobs``, for weights that are known before the forward
    pass.

    Then each chunk's gradient can be made while its logits exist, so the head is multiplied three times instead of
    four. ``logp_BT`` is for metrics and carries no gradient.
    """
    options = (chunk, z_coef, soft_cap, operand_dtype)
    loss, logp_BT = _cross_entropy(hidden_BTD, head_DV, tokens_BT, jax.lax.stop_gradient(weight_BT), options)
    return loss, jax.lax.stop_gradient(logp_BT)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BTD, head_DV, tokens_BT, weight_BT, options):
    chunk, z_coef, soft_cap, operand_dtype = options
    logp_BT, logz_BT, _ = chunked_token_logprobs(
        hidden_BTD, head_DV, tokens_BT, chunk=chunk, soft_cap=soft_cap, operand_dtype=operand_dtype
    )
    return cross_entropy(logp_BT, weight_BT, logz_BT=logz_BT, z_coef=z_coef), logp_BT


def _cross_entropy_forward(hidden_BTD, head_DV, tokens_BT, weight_BT, options):
    chunk, z_coef, soft_cap, operand_dtype = options
    score = partial(_chunk_scores, temperature=1.0, soft_cap=soft_cap, operand_dtype=operand_dtype)

    def part_loss(hidden_BTD, head_DV, tokens_BT, weight_BT):
        logp_BT, logz_BT, _ = score(hidden_BTD, head_DV, tokens_BT)
        return cross_entropy(logp_BT, weight_BT, logz_BT=logz_BT, z_coef=z_coef), logp_BT

    def step(total, part):
        part_hidden_BTD, part_tokens_BT, part_weight_BT = part
        gradients = jax.value_and_grad(part_loss, argnums=(0, 1), has_aux=True)
        (loss, logp_BT), (hidden_grad_BTD, head_grad_DV) = gradients(
            part_hidden_BTD, head_DV, part_tokens_BT, part_weight_BT
        )
        return jax.tree.map(jnp.add, total, (loss, head_grad_DV)), (logp_BT, hidden_grad_BTD)

    T = hidden_BTD.shape[1]
    zeros = (jnp.zeros((), jnp.float32), jnp.zeros_like(head_DV))
    (loss, head_grad_DV), (logp, hidden_grad) = jax.lax.scan(
        step, zeros, chunks_of(chunk, hidden_BTD, tokens_BT, weight_BT)
    )
    return (loss, joined(logp, T)), (joined(hidden_grad, T), head_grad_DV)


def _cross_entropy_backward(options, gradients, cotangents):
    loss_grad, _ = cotangents
    hidden_grad_BTD, head_grad_DV = (loss_grad.astype(gradient.dtype) * gradient for gradient in gradients)
    return hidden_grad_BTD, head_grad_DV, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def chunks_of(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [B, T, ...] as [T / chunk, B, chunk, ...], padded with zeros to whole chunks."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 position")

    def cut(x):
        B, T, *rest = x.shape
        length = min(chunk, T)
        x = jnp.pad(x, ((0, 0), (0, -T % length), *((0, 0) for _ in rest)))
        return jnp.moveaxis(x.reshape(B, -1, length, *rest), 1, 0)

    return tuple(map(cut, arrays))


def joined(chunks: jax.Array, T: int) -> jax.Array:
    """[T / chunk, B, chunk, ...] back as the first T positions of [B, T, ...]."""
    _, B, _, *rest = chunks.shape
    return jnp.moveaxis(chunks, 0, 1).reshape(B, -1, *rest)[:, :T]


def _chunk_scores(hidden_BTD, head_DV, tokens_BT, *, temperature, soft_cap, operand_dtype):
    # Widened before the product, not after it: the result is then a float32 sum, whatever the operands are.
    wide_BTD = hidden_BTD.astype(jnp.float32)
    logits_BTV = einsum("btd,dv->btv", wide_BTD, head_DV, operand_dtype or hidden_BTD.dtype)
    if soft_cap:
        logits_BTV = soft_cap * jnp.tanh(logits_BTV / soft_cap)
    return _scores(logits_BTV / temperature, tokens_BT)


def _scores(logits_BTV, tokens_BT):
    """(logp, logz, entropy). The target is picked by comparison: a gather along a sharded vocabulary is an error, and
    id -1 would wrap.
    """
    vocabulary_11V = jnp.arange(logits_BTV.shape[-1])[None, None, :]
    logz_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.sum(jnp.where(vocabulary_11V == tokens_BT[..., None], logits_BTV, 0.0), axis=-1)
    mean_BT = jnp.sum(jnp.exp(logits_BTV - logz_BT[..., None]) * logits_BTV, axis=-1)
    return target_BT - logz_BT, logz_BT, logz_BT - mean_BT
