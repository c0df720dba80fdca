"""Generation with an explicit cache of keys and values: a tree that is passed in, extended in place under ``jax.jit``, and handed on.

The cache has one layout, [B, K, H, S] for keys and [B, K, S, H] for values: the long axis S of the scores and the width H of the result lie
innermost, which is how a single query reads them at the speed of memory.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.model import heads
from jaxllm.model.attention import Visibility
from jaxllm.model.config import DecoderConfig
from jaxllm.model.kinds import LayerKinds
from jaxllm.model.single_query import rounded
from jaxllm.sharding import spec
from jaxllm.tree import Tree, map_named


def empty_cache(config: DecoderConfig, batch_size: int, length: int) -> Tree:
    """An empty cache for ``length`` positions: each layer's keys [B, K, H, S] and values [B, K, S, H], and how many positions each row has filled.

    It has the dtype of the activations. (On a CPU, JAX 0.10.2 updates a bfloat16 cache by widening all of it, 100 times slower.)
    """
    B, S, K, H = batch_size, length, config.num_kv_heads, config.head_width
    zeros = partial(jnp.zeros, dtype=config.activation_dtype)
    layers = tuple(
        {
            "key": zeros((B, K, H, S), out_sharding=spec("bkhs")),
            "value": zeros((B, K, S, H), out_sharding=spec("bksh")),
        }
        for _ in range(config.num_layers)
    )
    return {"layers": layers, "length_B": jnp.zeros((B,), jnp.int32, out_sharding=spec("b"))}


def lengthened(cache: Tree, length: int) -> Tree:
    """The cache with room for ``length`` positions, copied once."""
    S = cache["layers"][0]["key"].shape[3]
    layers = tuple(
        {
            "key": jnp.pad(layer["key"], ((0, 0), (0, 0), (0, 0), (0, length - S))),
            "value": jnp.pad(layer["value"], ((0, 0), (0, 0), (0, length - S), (0, 0))),
        }
        for layer in cache["layers"]
    )
    return cache | {"layers": layers}


def ready(config: DecoderConfig, params: Tree) -> Tree:
    """The parameters as ``extend`` reads them at every token: layers apart, kernels in ``operand_dtype``, a head of their own.

    What is ready already comes back as it is. Casting and cutting once, outside the loop over tokens, halves the memory read per token.
    """
    if isinstance(params["blocks"], tuple):
        return params
    narrow = partial(map_named, lambda name, x: x.astype(config.operand_dtype) if name.endswith("kernel") else x)
    blocks = narrow(params["blocks"])
    layers = tuple(jax.tree.map(lambda x, layer=layer: x[layer], blocks) for layer in range(config.num_layers))
    return params | {"blocks": layers, "head": narrow({"kernel": heads.head(config, params)})}


def extend(config, apply, params, cache, tokens_BT, lengths_B):
    """Appends to each row its first ``lengths_B`` tokens; (float32 logits_BV after the last of them, the cache with them in it).

    ``params`` may be ``ready``. Rows may have any lengths: what lies behind a row's length is overwritten by its next tokens before
    anything may look at it. The caller sees to it that no row outgrows the cache.
    """
    params = ready(config, params)
    B, T = tokens_BT.shape
    S = cache["layers"][0]["key"].shape[3]
    if T > S:
        raise ValueError(f"{T} tokens do not fit a cache for {S} positions; make it with a length of at least {T}")
    positions_BT = cache["length_B"][:, None] + jnp.arange(T)[None, :]
    x_BTD = apply["embedding"](params["embedding"], tokens_BT)
    visibility = Visibility(positions_BT, jnp.zeros_like(positions_BT[:, :1]) + jnp.arange(S)[None, :])
    kinds = LayerKinds(config, positions_BT)
    layers = []
    for layer, old in enumerate(cache["layers"]):
        table, window = kinds.of(None if kinds.index_L is None else kinds.index_L[layer])
        keep = partial(_append, config.operand_dtype, old, cache["length_B"])
        x_BTD, (k_BSKH, v_BSKH) = apply["blocks"](
            params["blocks"][layer], x_BTD, table, visibility._replace(window=window), keep, None
        )
        layers.append({"key": k_BSKH.transpose(0, 2, 3, 1), "value": v_BSKH.transpose(0, 2, 1, 3)})
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    hidden_B1D = apply["final_norm"](params["final_norm"], last_B1D)
    own_head = dataclasses.replace(config, tied_head=False)
    logits_BV = heads.logits(own_head, params, hidden_B1D)[:, 0]
    return logits_BV, {"layers": tuple(layers), "length_B": cache["length_B"] + lengths_B}


def _append(operand_dtype, old, start_B, k_BTKH, v_BTKH):
    """The layer's cache with new keys and values from ``start_B`` on, seen as (k_BSKH, v_BSKH)."""
    k_BTKH, v_BTKH = rounded(k_BTKH, operand_dtype), rounded(v_BTKH, operand_dtype)
    key_BKHS = _per_shard(_write_keys, "bkhs")(old["key"], k_BTKH, start_B)
    value_BKSH = _per_shard(_write_values, "bksh")(old["value"], v_BTKH, start_B)
    seen = key_BKHS.transpose(0, 3, 1, 2), value_BKSH.transpose(0, 2, 1, 3)
    # A product may not take its operand straight from the cache's layout: XLA's CPU backend has no such bfloat16 product.
    return seen if k_BTKH.shape[1] == 1 else jax.lax.optimization_barrier(seen)


@jax.vmap
def _write_keys(key_KHS, k_TKH, start):
    return jax.lax.dynamic_update_slice(key_KHS, k_TKH.transpose(1, 2, 0).astype(key_KHS.dtype), (0, 0, start))


@jax.vmap
def _write_values(value_KSH, v_TKH, start):
    return jax.lax.dynamic_update_slice(value_KSH, v_TKH.transpose(1, 0, 2).astype(value_KSH.dtype), (0, start, 0))


def _per_shard(function, letters):
    """``function`` on each device's own rows and heads."""
    return function if spec("b") is None else jax.shard_map(function, out_specs=spec(letters))
