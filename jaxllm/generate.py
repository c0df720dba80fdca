"""Batched sampling: one ``while_loop`` that carries the cache of keys and values, stops when every row has stopped, and
never sorts the vocabulary.

What a row samples depends on its prompt, its number in the batch and the key alone, not on its neighbours.
"""

import codecs
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.model import Model, decoding
from jaxllm.sharding import data_parallelism, place, spec
from jaxllm.text.special_tokens import EOS_ID, PAD_ID
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How a token is chosen; the filters apply in this order, each to what the ones before it left."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token always
    top_k: int = 0  # keep the k likeliest tokens (and ties of the last); 0 keeps all
    top_p: float = 1.0  # keep the fewest likeliest tokens whose probabilities sum to at least this
    min_p: float = 0.0  # keep tokens at least this times as likely as the likeliest

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be at least 0 and finite; 0 is greedy")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1]; 0 keeps all tokens")


class Completions(NamedTuple):
    """What was sampled after each prompt: exactly the ids that were drawn, the stop token included and the pad id
    behind it.

    ``logp_BT`` is the float32 log-probability under softmax(logits / temperature), before any filter: the policy that
    reinforcement learning differentiates, which its trainer can evaluate again. (At temperature 0 it is that of
    temperature 1.) It is 0 where masked. ``mask_BT`` is True for the tokens that were sampled, the stop token included.
    """

    tokens_BT: jax.Array
    logp_BT: jax.Array
    mask_BT: jax.Array


class State(NamedTuple):
    """What the loop carries: generation between two tokens. ``steps`` columns of ``completions`` are sampled."""

    cache: Tree
    tokens_B: jax.Array
    done_B: jax.Array
    rows_B: jax.Array
    key: jax.Array
    steps: jax.Array
    completions: Completions


def generate(
    model: Model,
    params: Tree,
    prompts_BT: np.ndarray,
    lengths_B: np.ndarray,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = SamplerConfig(),
    stop_ids: tuple[int, ...] = (EOS_ID,),
    pad_id: int = PAD_ID,
) -> Completions:
    """Samples up to ``max_new_tokens`` after the first ``lengths_B`` tokens of each row, as NumPy arrays.

    A row ends with the first of ``stop_ids``, the batch when all rows have ended. Whatever lies behind a prompt's
    length is ignored. Compiles once for each batch size and pair of powers of two (16 or more) that the longest prompt
    and ``max_new_tokens`` are rounded up to. Under a mesh the batch need not divide. Raises ``ValueError`` for a prompt
    that is empty or longer than its row, an id outside of the vocabulary, ``max_new_tokens`` below 1.
    """
    B = len(prompts_BT)
    how = dict(sampler=sampler, stop_ids=tuple(stop_ids), pad_id=pad_id)
    prompts_BT, lengths_B = _padded(model, np.asarray(prompts_BT), np.asarray(lengths_B), max_new_tokens)
    weights = _ready(model, params)
    state = _start(model, weights, prompts_BT, lengths_B, key, new_length=_bucket(max_new_tokens), **how)
    state = _advance(model, weights, state, max_new_tokens, **how)
    # Whole on every device, so that each of several processes can read all rows.
    return Completions(*(np.asarray(place(x, ".."))[:B, :max_new_tokens] for x in state.completions))


def stream(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    prompt_T: np.ndarray,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = SamplerConfig(),
    stop_ids: tuple[int, ...] = (EOS_ID,),
    chunk: int = 8,
) -> Iterator[str]:
    """The text that ``generate`` samples after one prompt, in pieces of ``chunk`` tokens, never cut inside a character.

    Joined, the pieces are the decoded completion without its stop token. Raises as ``generate`` does.
    """
    how = dict(sampler=sampler, stop_ids=tuple(stop_ids), pad_id=PAD_ID)
    prompt, length = _padded(model, np.asarray(prompt_T)[None, :], np.array([len(prompt_T)]), max_new_tokens)
    weights = _ready(model, params)
    state = _start(model, weights, prompt, length, key, new_length=_bucket(max_new_tokens), **how)
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sent, done = 0, False
    while sent < max_new_tokens and not done:
        state = _advance(model, weights, state, min(sent + chunk, max_new_tokens), **how)
        new = np.asarray(state.completions.tokens_BT)[0, sent : int(state.steps)].tolist()
        sent, done = sent + len(new), bool(state.done_B[0])
        yield text.decode(b"".join(_spelled(tokenizer, token) for token in new if token not in stop_ids))
    yield text.decode(b"", final=True)


def start(model: Model, params: Tree, prompts_BT, lengths_B, key, *, new_length, sampler, stop_ids, pad_id) -> State:
    """The state with each row's first token sampled and room for ``new_length``. Rows of length 0 count as stopped."""
    B, T = prompts_BT.shape
    lengths_B = place(lengths_B, "b")
    logits_BV, cache = model.extend(params, model.cache(B, T), place(prompts_BT, "bt"), jnp.maximum(lengths_B, 1))
    cache = decoding.lengthened(cache, T + new_length)
    completions = Completions(*(jnp.full((B, new_length), x, out_sharding=spec("bt")) for x in (pad_id, 0.0, False)))
    state = State(cache, lengths_B, lengths_B == 0, place(jnp.arange(B), "b"), key, jnp.int32(0), completions)
    return _with_token(state, logits_BV, sampler, stop_ids, pad_id)


def advance(model: Model, params: Tree, state: State, limit, *, sampler, stop_ids, pad_id) -> State:
    """The state when each row has ``limit`` new tokens or has stopped: the one loop."""
    limit = jnp.minimum(limit, state.completions.tokens_BT.shape[1])

    def unfinished(state):
        return (state.steps < limit) & ~jnp.all(state.done_B)

    def one_token(state):
        logits_BV, cache = model.decode(params, state.cache, state.tokens_B)
        return _with_token(state._replace(cache=cache), logits_BV, sampler, stop_ids, pad_id)

    return jax.lax.while_loop(unfinished, one_token, state)


_HOW = ("model", "sampler", "stop_ids", "pad_id")
_ready = jax.jit(lambda model, params: decoding.ready(model.config, params), static_argnums=0)
_start = jax.jit(start, static_argnames=(*_HOW, "new_length"))
_advance = jax.jit(advance, static_argnames=_HOW, donate_argnames="state")


def _with_token(state, logits_BV, sampler, stop_ids, pad_id):
    """The state with one more token of each row that has not stopped."""
    tokens_B, logp_B = sample(logits_BV, state.rows_B, state.cache["length_B"], state.key, sampler=sampler)
    live_B = ~state.done_B
    tokens_B = jnp.where(live_B, tokens_B, pad_id)
    column = Completions(tokens_B, jnp.where(live_B, logp_B, 0.0), live_B)
    write = partial(jax.lax.dynamic_update_index_in_dim, index=state.steps, axis=1)
    return state._replace(
        tokens_B=tokens_B,
        done_B=state.done_B | jnp.isin(tokens_B, jnp.array(stop_ids, jnp.int32)),
        steps=state.steps + 1,
        completions=jax.tree.map(write, state.completions, column),
    )


def sample(logits_BV, rows_B, positions_B, key, *, sampler: SamplerConfig) -> tuple[jax.Array, jax.Array]:
    """(tokens_B, logp_B) from float32 logits; a row's randomness comes from its number, its position and the key."""
    function = partial(_sample, sampler=sampler)
    if spec("b") is not None:
        logits_BV = place(logits_BV, "b.")
        function = jax.shard_map(function, out_specs=(spec("b"), spec("b")))
    return function(logits_BV, rows_B, positions_B, key)


def _sample(logits_BV, rows_B, positions_B, key, *, sampler):
    logits_BV = logits_BV / (sampler.temperature or 1.0)
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=1, keepdims=True)
    weights_BV = jnp.exp(shifted_BV)
    if sampler.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=1)
    else:
        keys_B = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position))(
            rows_B, positions_B
        )
        tokens_B = jax.vmap(_draw)(likely(weights_BV, sampler), keys_B)
    shifted_B = jnp.take_along_axis(shifted_BV, tokens_B[:, None], axis=1)[:, 0]
    return tokens_B, shifted_B - jnp.log(jnp.sum(weights_BV, axis=1))


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


def _bucket(length: int) -> int:
    """The power of two, at least 16, that a length is rounded up to."""
    return max(16, 1 << (length - 1).bit_length())


def _padded(model, prompts, lengths, max_new_tokens):
    """The prompts, checked, in a bucket; with rows of length 0 up to a multiple of the mesh's data parallelism."""
    rows, width = prompts.shape
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if lengths.shape != (rows,) or lengths.min() < 1 or lengths.max() > width:
        raise ValueError(
            f"lengths_B={lengths.tolist()} must be {rows} numbers from 1 to {width}, the width of prompts_BT; "
            "give an empty prompt its <|bos|>, and cut a long one"
        )
    real = np.arange(width)[None, :] < lengths[:, None]
    lowest, highest = prompts[real].min(), prompts[real].max()
    if lowest < 0 or highest >= model.config.vocab_size:
        raise ValueError(
            f"prompts_BT has ids from {lowest} to {highest}, but model.vocab_size={model.config.vocab_size}; "
            "encode the prompts with the tokenizer that the model was trained with"
        )
    mesh, longest = jax.sharding.get_abstract_mesh(), int(lengths.max())
    pads = 0 if mesh.empty else -rows % data_parallelism(mesh)
    prompts = np.where(real, prompts, 0)[:, :longest].astype(np.int32)
    prompts = np.pad(prompts, ((0, pads), (0, _bucket(longest) - longest)))
    return prompts, np.pad(lengths, (0, pads)).astype(np.int32)


def _spelled(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token) or tokenizer.decode([token]).encode()
