"""What generation compiles: prompts read into a cache, rows moved between caches, and the one ``while_loop`` that
carries a cache and samples a token of every slot, with no word to the host in between.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.generate.sampler import SamplerConfig, sample
from jaxllm.model import Model, decoding
from jaxllm.sharding import place, spec
from jaxllm.tree import Tree

# Tokens of each slot between two looks of the host, at most. A look takes a tenth of a small model's token on a CPU.
CHUNK = 32


class Turn(NamedTuple):
    """Where each slot stands: its last token, which is not in the cache, how many are, how many it may still sample
    (0 or less where it is idle), and the number that its randomness is drawn by.
    """

    tokens_B: jax.Array
    lengths_B: jax.Array
    left_B: jax.Array
    numbers_B: jax.Array


class Drawn(NamedTuple):
    """What a run of the loop sampled, ``CHUNK`` columns; real where ``mask_BT`` is."""

    tokens_BT: jax.Array
    logp_BT: jax.Array
    mask_BT: jax.Array


class State(NamedTuple):
    """What the loop carries; ``steps`` columns are drawn."""

    cache: Tree
    tokens_B: jax.Array
    left_B: jax.Array
    steps: jax.Array
    drawn: Drawn


def prefill(model: Model, params: Tree, tokens_BT: jax.Array) -> Tree:
    """The layers of a cache that holds these tokens. What a row's padding leaves behind its end is junk."""
    tokens_BT = place(tokens_BT, "bt")
    _, cache = model.extend(params, model.cache(*tokens_BT.shape), tokens_BT, jnp.ones_like(tokens_BT[:, 0]))
    return cache["layers"]


def advance(
    model: Model,
    params: Tree,
    layers: Tree,
    turn: Turn,
    key: jax.Array,
    limit: jax.Array,
    pause: jax.Array,
    *,
    sampler: SamplerConfig,
    stop_ids: tuple[int, ...],
) -> tuple[Tree, Drawn]:
    """(the cache's layers, what was drawn) when ``limit`` tokens are, or as soon as ``pause`` slots or fewer go on.

    A slot ends with the first of ``stop_ids``, or when it has none left. Its first product is that of the last token
    of its prompt, so that every token is sampled here.
    """
    turn = Turn(*(place(jnp.asarray(x), "b") for x in turn))
    shape, limit = (len(turn.tokens_B), CHUNK), jnp.minimum(limit, CHUNK)
    drawn = Drawn(*(jnp.full(shape, x, out_sharding=spec("bt")) for x in (0, 0.0, False)))
    state = State({"layers": layers, "length_B": turn.lengths_B}, turn.tokens_B, turn.left_B, jnp.int32(0), drawn)

    def unfinished(state):
        return (state.steps < limit) & (jnp.sum(state.left_B > 0) > pause)

    def one_token(state):
        live_B = state.left_B > 0
        logits_BV, cache = model.decode(params, state.cache, state.tokens_B)
        tokens_B, logp_B = sample(logits_BV, turn.numbers_B, cache["length_B"], key, sampler=sampler)
        # An idle slot stays where it is, and its next guest overwrites what it leaves there.
        cache["length_B"] = jnp.where(live_B, cache["length_B"], state.cache["length_B"])
        left_B = jnp.where(jnp.isin(tokens_B, jnp.array(stop_ids, jnp.int32)), 0, state.left_B - 1)
        write = partial(jax.lax.dynamic_update_index_in_dim, index=state.steps, axis=1)
        drawn = jax.tree.map(write, state.drawn, Drawn(tokens_B, logp_B, live_B))
        return State(cache, tokens_B, left_B, state.steps + 1, drawn)

    state = jax.lax.while_loop(unfinished, one_token, state)
    return state.cache["layers"], state.drawn


ready = jax.jit(lambda model, params: decoding.ready(model.config, params), static_argnums=0)
empty = jax.jit(lambda model, *shape: model.cache(*shape)["layers"], static_argnums=(0, 1, 2))
prefilled = jax.jit(prefill, static_argnames="model")
with_rows = jax.jit(decoding.with_rows, donate_argnames="layers")
resized = jax.jit(decoding.resized, static_argnames="length")
advanced = jax.jit(advance, static_argnames=("model", "sampler", "stop_ids"), donate_argnames="layers")
