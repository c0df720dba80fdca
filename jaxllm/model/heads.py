"""From hidden states to logits, and to one number per position: the language-model head and the scalar head."""

import jax
import jax.numpy as jnp

from jaxllm.einsum import einsum
from jaxllm.losses import chunked_cross_entropy, chunked_token_logprobs
from jaxllm.model.config import DecoderConfig
from jaxllm.sharding import place
from jaxllm.tree import Tree


def head(config: DecoderConfig, params: Tree) -> jax.Array:
    """head_DV, its shards gathered: the embedding's transpose where they are tied."""
    return place(params["embedding"]["table"].T if config.tied_head else params["head"]["kernel"], "dv")


def logits(config: DecoderConfig, params: Tree, hidden_BTD: jax.Array) -> jax.Array:
    """Dense float32 logits: for tests, sampling and small things; losses go through ``chunked_token_logprobs``."""
    logits_BTV = einsum("btd,dv->btv", hidden_BTD.astype(jnp.float32), head(config, params), config.operand_dtype)
    return config.logit_soft_cap * jnp.tanh(logits_BTV / config.logit_soft_cap) if config.logit_soft_cap else logits_BTV


def score(
    config: DecoderConfig,
    params: Tree,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    *,
    temperature: float = 1.0,
    mask_BT: jax.Array | None = None,
):
    """(logp_BT, logz_BT, entropy_BT) of ``tokens_BT`` under this model's head: ``chunked_token_logprobs`` as the config
    says.
    """
    return chunked_token_logprobs(
        hidden_BTD,
        head(config, params),
        tokens_BT,
        chunk=config.loss_chunk,
        temperature=temperature,
        soft_cap=config.logit_soft_cap,
        operand_dtype=config.operand_dtype,
        mask_BT=mask_BT,
    )


def empty_scalar_head(config: DecoderConfig) -> Tree:
    """The scalar head's parameters, all zeros: before training every reward and every value is 0."""
    return {"kernel": jnp.zeros(config.width), "bias": jnp.zeros(())}


def scalars(params: Tree, hidden_BTD: jax.Array) -> jax.Array:
    """scalar_BT, float32: the scalar head's number of each position."""
    own = params["scalar_head"]
    return jnp.einsum("btd,d->bt", hidden_BTD.astype(jnp.float32), own["kernel"]) + own["bias"]


def cross_entropy(config: DecoderConfig, params: Tree, hidden_BTD, tokens_BT, weight_BT, *, z_coef: float = 0.0):
    """(loss, logp_BT) of ``tokens_BT`` under this model's head: ``chunked_cross_entropy`` as the config says."""
    return chunked_cross_entropy(
        hidden_BTD,
        head(config, params),
        tokens_BT,
        weight_BT,
        chunk=config.loss_chunk,
        z_coef=z_coef,
        soft_cap=config.logit_soft_cap,
        operand_dtype=config.operand_dtype,
    )
