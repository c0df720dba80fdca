"""Generation with an explicit cache of keys and values: a tree passed in, extended in place, and handed on.

Keys lie in ``key_blocks`` and values as [B, K, S, H]: innermost is what a single query's scores (S) and result (H) run
over, so that it reads them at the speed of memory.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.model import heads
from jaxllm.model.attention import Visibility
from jaxllm.model.config import DecoderConfig
from jaxllm.model.kinds import LayerKinds
from jaxllm.model.single_query import KEY_BLOCK, from_key_blocks, key_blocks, per_shard, rounded
from jaxllm.sharding import spec
from jaxllm.tree import Tree, map_named


def empty_cache(config: DecoderConfig, batch_size: int, length: int) -> Tree:
    """An empty cache for at least ``length`` positions: keys and values of each layer, and each row's filled positions.

    It has the dtype of the activations. (On a CPU, JAX 0.10.2 updates a bfloat16 cache by widening all of it, 100 times
    slower.)
    """
    B, S, K, H = batch_size, _whole_blocks(length), config.num_kv_heads, config.head_width
    zeros = partial(jnp.zeros, dtype=config.activation_dtype)
    layers = tuple(
        {
            "key": zeros((B, K, S // KEY_BLOCK, H, KEY_BLOCK), out_sharding=spec("bk.h.")),
            "value": zeros((B, K, S, H), out_sharding=spec("bksh")),
        }
        for _ in range(config.num_layers)
    )
    return {"layers": layers, "length_B": jnp.zeros((B,), jnp.int32, out_sharding=spec("b"))}


def lengthened(cache: Tree, length: int) -> Tree:
    """The cache with room for at least ``length`` positions, copied once."""
    more = _whole_blocks(length) - cache["layers"][0]["value"].shape[2]
    none = (0, 0)
    layers = tuple(
        {
            "key": jnp.pad(layer["key"], (none, none, (0, more // KEY_BLOCK), none, none)),
            "value": jnp.pad(layer["value"], (none, none, (0, more), none)),
        }
        for layer in cache["layers"]
    )
    return cache | {"layers": layers}


def ready(config: DecoderConfig, params: Tree) -> Tree:
    """The parameters as ``extend`` reads them per token: layers apart, kernels in ``operand_dtype``, a head of their
    own.

    What is ready already comes back as it is. Casting and cutting once, outside the loop over tokens, halves the memory
    read per token.
    """
    if isinstance(params["blocks"], tuple):
        return params
    narrow = partial(map_named, lambda name, x: x.astype(config.operand_dtype) if name.endswith("kernel") else x)
    blocks = narrow(params["blocks"])
    layers = tuple(jax.tree.map(lambda x, layer=layer: x[layer], blocks) for layer in range(config.num_layers))
    return params | {"blocks": layers, "head": narrow({"kernel": heads.head(config, params)})}


def extend(config, apply, params, cache, tokens_BT, lengths_B):
    """Appends to each row its first ``lengths_B`` tokens; (float32 logits_BV after the last of them, the new cache).

    ``params`` may be ``ready``. Rows may have any lengths: what lies behind a row's length is overwritten by its next
    tokens before anything may look at it. The caller sees to it that no row outgrows the cache.
    """
    params = ready(config, params)
    B, T = tokens_BT.shape
    S = cache["layers"][0]["value"].shape[2]
    if T > S:
        raise ValueError(f"{T} tokens do not fit a cache for {S} positions; make it with a length of at least {T}")
    positions_BT = cache["length_B"][:, None] + jnp.arange(T)[None, :]
    x_BTD = apply["embedding"](params["embedding"], tokens_BT)
    visibility = Visibility(positions_BT, jnp.zeros_like(positions_BT[:, :1]) + jnp.arange(S)[None, :])
    kinds = LayerKinds(config, positions_BT)
    layers = []
    for layer, old in enumerate(cache["layers"]):
        table, window = kinds.of(None if kinds.index_L is None else kinds.index_L[layer])
        keep = partial(_append, config.operand_dtype, old, positions_BT)
        x_BTD, (k_BSKH, v_BSKH) = apply["blocks"](
            params["blocks"][layer], x_BTD, table, visibility._replace(window=window), keep, None
        )
        layers.append({"key": key_blocks(k_BSKH), "value": v_BSKH.transpose(0, 2, 1, 3)})
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    hidden_B1D = apply["final_norm"](params["final_norm"], last_B1D)
    own_head = dataclasses.replace(config, tied_head=False)
    logits_BV = heads.logits(own_head, params, hidden_B1D)[:, 0]
    return logits_BV, {"layers": tuple(layers), "length_B": cache["length_B"] + lengths_B}


def _append(operand_dtype, old, positions_BT, k_BTKH, v_BTKH):
    """The layer's cache with new keys and values at these positions, seen as (k_BSKH, v_BSKH)."""
    k_BTKH, v_BTKH = rounded(k_BTKH, operand_dtype), rounded(v_BTKH, operand_dtype)
    keys = per_shard(_write_keys, "bk.h.")(old["key"], k_BTKH, positions_BT)
    value_BKSH = per_shard(_write_values, "bksh")(old["value"], v_BTKH, positions_BT)
    seen = from_key_blocks(keys), value_BKSH.transpose(0, 2, 1, 3)
    # A product may not take its operand straight from the cache's layout: XLA's CPU backend has no such bfloat16
    # product.
    return seen if k_BTKH.shape[1] == 1 else jax.lax.optimization_barrier(seen)


# What a short row's padding has behind the end of the cache is dropped.
def _write_keys(keys, k_BTKH, positions_BT):
    rows_B1 = jnp.arange(len(keys))[:, None]
    return keys.at[rows_B1, :, positions_BT // KEY_BLOCK, :, positions_BT % KEY_BLOCK].set(k_BTKH, mode="drop")


def _write_values(value_BKSH, v_BTKH, positions_BT):
    rows_B1 = jnp.arange(len(value_BKSH))[:, None]
    return value_BKSH.at[rows_B1, :, positions_BT].set(v_BTKH, mode="drop")


def _whole_blocks(length: int) -> int:
    return -(-length // KEY_BLOCK) * KEY_BLOCK
