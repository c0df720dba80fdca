"""The layers of a transformer as Flax NNX modules: parameters in float32, every product with a parameter through the
one ``einsum``.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxllm.einsum import einsum
from jaxllm.model import rope
from jaxllm.model.attention import Visibility, attend
from jaxllm.model.config import DecoderConfig
from jaxllm.sharding import place, spec

# (k_BTKH, v_BTKH) of the new tokens -> (k_BSKH, v_BSKH) to look at: the same in training, a cache with them in it in
# generation.
Keep = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale) over the last axes, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    ``offset`` is 0 with scales that start at 1 (Llama), or 1 with scales that start at 0 (Gemma).
    """

    def __init__(self, shape: tuple[int, ...], config: DecoderConfig):
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full(shape, 1.0 - config.norm_offset, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide, scale = x.astype(jnp.float32), self.scale[...]
        axes = tuple(range(x.ndim - scale.ndim, x.ndim))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=axes, keepdims=True) + self.eps)
        return (normed * jnp.expand_dims(self.offset + scale, range(x.ndim - scale.ndim))).astype(x.dtype)


class Projection(nnx.Module):
    """x . kernel + bias along the dimensions that ``equation`` names.

    The kernel starts as a normal of standard deviation ``gain`` / sqrt(inputs), cut at two deviations (LeCun et al.
    1998, "Efficient BackProp", section 4.6); the bias starts at 0.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        bias: bool,
        config: DecoderConfig,
        rngs: nnx.Rngs,
        gain: float = 1.0,
    ):
        _, letters, outputs = re.split(",|->", equation)
        lengths = dict(zip(letters, shape, strict=True))
        inputs = math.prod(length for letter, length in lengths.items() if letter not in outputs)
        self.equation, self.operand_dtype = equation, config.operand_dtype
        self.kernel = nnx.Param(truncated_normal(rngs.params(), shape, gain * inputs**-0.5))
        self.bias = nnx.Param(jnp.zeros([lengths[letter] for letter in outputs if letter in lengths])) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = checkpoint_name(einsum(self.equation, x, self.kernel[...], self.operand_dtype), "projection")
        return y if self.bias is None else y + jnp.expand_dims(self.bias[...].astype(y.dtype), (0, 1))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, optional query and key norms, and keys and values kept by the
    caller's rule.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_width
        self.config = config
        self.query = Projection("btd,dnh->btnh", (D, N, H), config.qkv_bias, config, rngs)
        self.key = Projection("btd,dkh->btkh", (D, K, H), config.qkv_bias, config, rngs)
        self.value = Projection("btd,dkh->btkh", (D, K, H), config.qkv_bias, config, rngs)
        self.output = Projection("btnh,nhd->btd", (N, H, D), config.output_bias, config, rngs, residual_gain(config))
        norm_shapes = {"none": None, "head": ((H,), (H,)), "all": ((N, H), (K, H))}[config.qk_norm]
        self.query_norm, self.key_norm = (
            (RMSNorm(shape, config) for shape in norm_shapes) if norm_shapes else (None, None)
        )

    def __call__(
        self, x_BTD: jax.Array, table: jax.Array, visibility: Visibility, keep: Keep
    ) -> tuple[jax.Array, tuple]:
        """(output_BTD, what ``keep(k, v)`` made of the new keys and values: those that the queries then look at)."""
        q_BTNH, k_BTKH, v_BTKH = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        k_BSKH, v_BSKH = keep(rope.rotate(k_BTKH, table), v_BTKH)
        attended_BTNH = attend(
            rope.rotate(q_BTNH, table),
            k_BSKH,
            v_BSKH,
            visibility,
            scale=self.config.attention_scale or self.config.head_width**-0.5,
            soft_cap=self.config.attention_soft_cap,
            implementation=self.config.attention,
            operand_dtype=self.config.operand_dtype,
        )
        return self.output(attended_BTNH), (k_BSKH, v_BSKH)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU or GeGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_width
        self.activation = config.activation
        self.gate = Projection("btd,df->btf", (D, F), config.mlp_bias, config, rngs)
        self.up = Projection("btd,df->btf", (D, F), config.mlp_bias, config, rngs)
        self.down = Projection("btf,fd->btd", (F, D), config.mlp_bias, config, rngs, residual_gain(config))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """x + attention(x), then x + mlp(x), each with a norm before (Llama), after (OLMo 2) or on both sides (Gemma 2)."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.dropout = config.dropout
        self.attention, self.mlp = Attention(config, rngs), MLP(config, rngs)
        pre, post = (
            (lambda: RMSNorm((config.width,), config)) if on else lambda: None
            for on in (config.pre_norm, config.post_norm)
        )
        self.attention_pre_norm, self.mlp_pre_norm = pre(), pre()
        self.attention_post_norm, self.mlp_post_norm = post(), post()

    def __call__(self, x_BTD, table, visibility, keep, dropout_key) -> tuple[jax.Array, tuple]:
        attention_key, mlp_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        y_BTD, kept = self.attention(_normed(self.attention_pre_norm, x_BTD), table, visibility, keep)
        x_BTD = x_BTD + dropout(_normed(self.attention_post_norm, y_BTD), self.dropout, attention_key)
        y_BTD = self.mlp(_normed(self.mlp_pre_norm, x_BTD))
        return x_BTD + dropout(_normed(self.mlp_post_norm, y_BTD), self.dropout, mlp_key), kept


class Embedding(nnx.Module):
    """A row per token id, times ``embedding_scale``. Rows start as normals of deviation 0.02 (GPT-2, Radford et al.
    2019, section 2.3's code).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.table = nnx.Param(truncated_normal(rngs.params(), (config.vocab_size, config.width), 0.02))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        table_VD = place(self.table[...], "vd")
        x_BTD = table_VD.at[tokens_BT].get(out_sharding=spec("btd")).astype(self.config.activation_dtype)
        return x_BTD * jnp.asarray(self.config.embedding_scale, x_BTD.dtype)


def _normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability ``rate``, scales the rest by 1 / (1 - rate); the identity without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0).astype(x.dtype)


def residual_gain(config: DecoderConfig) -> float:
    """1 / sqrt(2 L) for projections into the residual stream, so that its variance does not grow with depth (GPT-2,
    Radford et al. 2019, section 2.3).
    """
    return (2 * config.num_layers) ** -0.5


def truncated_normal(key: jax.Array, shape: tuple[int, ...], deviation: float) -> jax.Array:
    """Normal numbers cut at two deviations and scaled so that ``deviation`` is that of the result."""
    # 0.8796 is the standard deviation of a unit normal cut at -2 and 2.
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (deviation / 0.87962566)
