"""The one log-probability primitive: every stage, from pretraining to reinforcement learning, scores tokens through it.

Logits live one chunk of positions at a time, forward and backward, so no array of shape [B, T, V] ever exists.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.einsum import einsum


def token_logprobs(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """log softmax(logits)[token], in float32, from dense logits; works under every mesh, a sharded vocabulary included."""
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logp_BT, logz_BT, entropy_BT) of softmax(cap(hidden @ head) / temperature) in float32, ``chunk`` positions at a time.

    ``logp`` is the log-probability of ``tokens_BT``, ``logz`` the log-partition, ``entropy`` that of the distribution in nats.
    ``soft_cap`` c > 0 caps logits as c tanh(logits / c) (Gemma 2, arXiv:2408.00118, section 2). Operands of the
    head's product are cast to ``operand_dtype`` (that of ``hidden_BTD``, unless told). The backward pass makes each chunk's logits again.
    """
    B, T, D = hidden_BTD.shape
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 position")
    chunk = min(chunk, T)
    pad = -T % chunk
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0)))
    tokens_BT = jnp.pad(tokens_BT, ((0, 0), (0, pad)))
    inputs = (_split(hidden_BTD, chunk), _split(tokens_BT, chunk))

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def scores(hidden_BTD, head_DV, tokens_BT):
        logits_BTV = einsum("btd,dv->btv", hidden_BTD, head_DV, operand_dtype or hidden_BTD.dtype).astype(jnp.float32)
        if soft_cap:
            logits_BTV = soft_cap * jnp.tanh(logits_BTV / soft_cap)
        return _scores(logits_BTV / temperature, tokens_BT)

    chunks = jax.lax.map(lambda chunk: scores(chunk[0], head_DV, chunk[1]), inputs)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, T + pad)[:, :T] for x in chunks)


def _split(x, chunk):
    """[B, T, ...] -> [T / chunk, B, chunk, ...]."""
    B, T, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, T // chunk, chunk, *rest), 1, 0)


def _scores(logits_BTV, tokens_BT):
    """(logp, logz, entropy). The target is picked by comparison: a gather along a sharded vocabulary is an error, and id -1 would wrap."""
    vocabulary_11V = jnp.arange(logits_BTV.shape[-1])[None, None, :]
    logz_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.sum(jnp.where(vocabulary_11V == tokens_BT[..., None], logits_BTV, 0.0), axis=-1)
    mean_BT = jnp.sum(jnp.exp(logits_BTV - logz_BT[..., None]) * logits_BTV, axis=-1)
    return target_BT - logz_BT, logz_BT, logz_BT - mean_BT
