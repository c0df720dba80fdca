"""How a token is drawn from float32 logits: never by a sort of the vocabulary.

What a row draws depends on its number, its position and the key, not on its neighbours.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.sharding import place, spec

LOWEST_TEMPERATURE = 1e-6  # that logits may be divided by, and stay finite


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How a token is chosen; the filters apply in this order, each to what the ones before it left."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token always
    top_k: int = 0  # keep the k likeliest tokens (and ties of the last); 0 keeps all
    top_p: float = 1.0  # keep the fewest likeliest tokens whose probabilities sum to at least this
    min_p: float = 0.0  # keep tokens at least this times as likely as the likeliest

    def __post_init__(self):
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be at least {LOWEST_TEMPERATURE} and finite, or 0 to be greedy"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1]; 0 keeps all tokens")


def sample(logits_BV, rows_B, positions_B, key, *, sampler: SamplerConfig) -> tuple[jax.Array, jax.Array]:
    """(tokens_B, logp_B) from float32 logits; a row's randomness comes from its number, its position and the key."""
    function = partial(_sample, sampler=sampler)
    if spec("b") is not None:
        logits_BV = place(logits_BV, "b.")
        function = jax.shard_map(function, out_specs=(spec("b"), spec("b")))
    return function(logits_BV, rows_B, positions_B, key)


def _sample(logits_BV, rows_B, positions_B, key, *, sampler):
    logits_BV = logits_BV / (sampler.temperature or 1.0)
    top_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
    weights_BV = jnp.exp(logits_BV - top_B1)
    if sampler.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=1)
    else:
        keys_B = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(
            rows_B, positions_B
        )
        tokens_B = jax.vmap(_draw)(likely(weights_BV, sampler), keys_B)
    own_B1 = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)
    return tokens_B, (own_B1 - top_B1)[:, 0] - jnp.log(jnp.sum(weights_BV, axis=1))


def likely(weights_BV: jax.Array, sampler: SamplerConfig) -> jax.Array:
    """``weights_BV`` (proportional to the probabilities, 1 for the likeliest token) with 0 for the tokens that the
    filters drop.
    """
    least_B = jnp.full_like(weights_BV[:, 0], sampler.min_p)
    if 0 < sampler.top_k < weights_BV.shape[1]:
        kth_B = _largest(lambda t_B: jnp.sum(weights_BV >= t_B[:, None], axis=1) >= sampler.top_k, least_B)
        weights_BV = jnp.where(weights_BV >= kth_B[:, None], weights_BV, 0.0)
    if sampler.top_p < 1:
        mass_B = sampler.top_p * _mass(weights_BV, jnp.zeros_like(least_B))
        least_B = jnp.maximum(least_B, _largest(lambda t_B: _mass(weights_BV, t_B) >= mass_B, least_B))
    return jnp.where(weights_BV >= least_B[:, None], weights_BV, 0.0)


def _mass(weights_BV, least_B):
    return jnp.sum(jnp.where(weights_BV >= least_B[:, None], weights_BV, 0.0), axis=1)


def _largest(enough, like_B):
    """The largest float32 t_B in [0, 1] for which ``enough(t_B)`` still holds: 30 halvings, since such floats order as
    their bits do.
    """

    def halve(step, bits_B):
        trial_B = bits_B | (1 << 29 - step)
        return jnp.where(enough(jax.lax.bitcast_convert_type(trial_B, jnp.float32)), trial_B, bits_B)

    bits_B = jax.lax.fori_loop(0, 30, halve, jnp.zeros_like(like_B, jnp.int32))
    return jax.lax.bitcast_convert_type(bits_B, jnp.float32)


def _draw(weights_V, key):
    """An index with probability proportional to its weight: a block by the blocks' sums, then a member of it.

    Two small draws instead of random numbers for all of V; a weight of 0 is never drawn.
    """
    V = len(weights_V)
    members = 1 << (V.bit_length() + 1) // 2
    blocks = jnp.pad(weights_V, (0, -V % members)).reshape(members, -1)
    block_key, member_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jnp.log(jnp.sum(blocks, axis=0)))
    member = jax.random.categorical(member_key, jnp.log(blocks[:, block]))
    return member * blocks.shape[1] + block
