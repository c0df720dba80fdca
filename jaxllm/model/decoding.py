"""Generation with an explicit cache of keys and values: a tree passed in, extended in place, and handed on.

Both lie as [B, K, S, H], so that a single query's products read each head's memory in one piece.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.model import heads
from jaxllm.model.attention import Visibility, rounded
from jaxllm.model.config import DecoderConfig
from jaxllm.model.kinds import LayerKinds
from jaxllm.sharding import gathered, place, spec
from jaxllm.tree import Tree, map_named


def empty_cache(config: DecoderConfig, batch_size: int, length: int) -> Tree:
    """An empty cache for ``length`` positions: keys and values of each layer, and each row's filled positions.

    It has the dtype of the activations. (On a CPU, JAX 0.10.2 updates a bfloat16 cache by widening all of it, 100 times
    slower.)
    """
    shape = (batch_size, config.num_kv_heads, length, config.head_width)
    zeros = partial(jnp.zeros, shape, config.activation_dtype, out_sharding=spec("bksh"))
    layers = tuple({"key": zeros(), "value": zeros()} for _ in range(config.num_layers))
    return {"layers": layers, "length_B": jnp.zeros((batch_size,), jnp.int32, out_sharding=spec("b"))}


def resized(layers: Tree, rows_B: jax.Array | None, *, length: int) -> Tree:
    """A cache's layers with these of their rows (all, unless told) and room for ``length`` positions, copied once."""

    def copied(x_BKSH):
        if rows_B is not None:
            x_BKSH = x_BKSH.at[rows_B].get(out_sharding=spec("bksh"))
        return jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, length - x_BKSH.shape[2]), (0, 0)))

    return jax.tree.map(copied, layers)


def with_rows(layers: Tree, rows: Tree, sources_A: jax.Array, places_A: jax.Array, count: jax.Array) -> Tree:
    """The cache's layers with row ``places_A[a]`` begun as row ``sources_A[a]`` of ``rows`` (as long or shorter), for
    each a below ``count``.

    In place where ``layers`` is donated, one row after the other: what it costs is what it copies.
    """

    def write(old_BKSH, new_PKTH, sources_A, places_A, count):
        B, K, T, H = len(old_BKSH), *new_PKTH.shape[1:]
        first = 0 if spec("b") is None else B * jax.lax.axis_index(spec("b")[0])

        def copy(a, old_BKSH):
            place, zero = places_A[a] - first, jnp.int32(0)
            old_1KTH = jax.lax.dynamic_slice(old_BKSH, (place, zero, zero, zero), (1, K, T, H))
            new_1KTH = jax.lax.dynamic_slice(new_PKTH, (sources_A[a], zero, zero, zero), (1, K, T, H))
            # Each device writes its own rows, and for the others' what is there.
            new_1KTH = jnp.where((0 <= place) & (place < B), new_1KTH, old_1KTH)
            return jax.lax.dynamic_update_slice(old_BKSH, new_1KTH, (place, zero, zero, zero))

        return jax.lax.fori_loop(0, count, copy, old_BKSH)

    if spec("b") is not None:
        rows = jax.tree.map(lambda x: place(x, ".ksh"), rows)
        write = jax.shard_map(write, out_specs=spec("bksh"))
    return jax.tree.map(lambda old, new: write(old, new, sources_A, places_A, count), layers, rows)


def ready(config: DecoderConfig, params: Tree) -> Tree:
    """The parameters as ``extend`` reads them per token: layers apart, kernels in ``operand_dtype``, a head of their
    own, nothing cut over the devices that share a batch.

    What is ready already comes back as it is. Casting, cutting and gathering once, outside the loop over tokens, halves
    the memory read per token.
    """
    if isinstance(params["blocks"], tuple):
        return params

    def narrow(name, x):
        return gathered(x.astype(config.operand_dtype) if name.endswith("kernel") else x)

    said = {name: params[name] for name in ("embedding", "blocks", "final_norm")}  # and no reward or value
    whole = map_named(narrow, said | {"head": {"kernel": heads.head(config, params)}})
    layers = tuple(jax.tree.map(lambda x, layer=layer: x[layer], whole["blocks"]) for layer in range(config.num_layers))
    return whole | {"blocks": layers}


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
        layers.append({"key": k_BSKH.transpose(0, 2, 1, 3), "value": v_BSKH.transpose(0, 2, 1, 3)})
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)
    hidden_B1D = apply["final_norm"](params["final_norm"], last_B1D)
    own_head = dataclasses.replace(config, tied_head=False)
    logits_BV = heads.logits(own_head, params, hidden_B1D)[:, 0]
    return logits_BV, {"layers": tuple(layers), "length_B": cache["length_B"] + lengths_B}


def _append(operand_dtype, old, positions_BT, k_BTKH, v_BTKH):
    """The layer's cache with new keys and values at these positions, seen as (k_BSKH, v_BSKH)."""
    new = {"key": rounded(k_BTKH, operand_dtype), "value": rounded(v_BTKH, operand_dtype)}
    written = jax.tree.map(lambda old, new: _written(old, new, positions_BT), old, new)
    seen = tuple(written[name].transpose(0, 2, 1, 3) for name in ("key", "value"))
    # A product may not take its operand straight from the cache's layout: XLA's CPU backend has no such bfloat16
    # product.
    return seen if k_BTKH.shape[1] == 1 else jax.lax.optimization_barrier(seen)


def _written(old_BKSH, new_BTKH, positions_BT):
    """Each device writes its own rows and heads. What a short row's padding has behind the end is dropped."""

    def write(old_BKSH, new_BTKH, positions_BT):
        rows_B1 = jnp.arange(len(old_BKSH))[:, None]
        return old_BKSH.at[rows_B1, :, positions_BT].set(new_BTKH, mode="drop")

    sharded = spec("bksh") is not None
    return (jax.shard_map(write, out_specs=spec("bksh")) if sharded else write)(old_BKSH, new_BTKH, positions_BT)
