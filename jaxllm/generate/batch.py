"""A batch of prompts sampled together, and one prompt sampled as a stream of text."""

import codecs
import collections
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.generate.programs import CHUNK
from jaxllm.generate.sampler import SamplerConfig
from jaxllm.generate.slots import Request, check, completions, looks
from jaxllm.model import Model
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree


class Completions(NamedTuple):
    """What was sampled after each prompt: exactly the ids that were drawn, the stop token included and the pad id
    behind it.

    ``logp_BT`` is the float32 log-probability under softmax(logits / temperature), before any filter: the policy that
    reinforcement learning differentiates, which its trainer can evaluate again. (At temperature 0 it is that of
    temperature 1.) It is 0 where masked. ``mask_BT`` is True for the tokens that were sampled, the stop token included.
    """

    tokens_BT: np.ndarray
    logp_BT: np.ndarray
    mask_BT: np.ndarray


def generate(
    model: Model,
    params: Tree,
    prompts_BT: np.ndarray,
    lengths_B: np.ndarray,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = SamplerConfig(),
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
) -> Completions:
    """Samples up to ``max_new_tokens`` after the first ``lengths_B`` tokens of each row.

    A row ends with the first of ``stop_ids``: a tokenizer has them. Whatever lies behind a prompt's length is ignored,
    and behind a row's end is ``pad_id``. What a row samples depends on its prompt, its number in the batch and the key
    alone. Compiles as ``completions`` does, of which this is one call with a slot for each row: under a mesh the batch
    need not divide. Raises ``ValueError`` for no rows, a prompt that is empty or longer than its row, an id outside of
    the vocabulary, ``max_new_tokens`` below 1.
    """
    _check(np.shape(prompts_BT), np.asarray(lengths_B))
    prompts_BT, lengths_B = np.asarray(prompts_BT), np.asarray(lengths_B)
    B = len(prompts_BT)
    rows = zip(prompts_BT.tolist(), lengths_B.tolist(), strict=True)
    queue = collections.deque(Request(row, ids[:length], max_new_tokens) for row, (ids, length) in enumerate(rows))
    how = dict(slots=B, length=int(lengths_B.max()) + max_new_tokens, sampler=sampler, stop_ids=stop_ids)
    made = (np.full((B, max_new_tokens), x, dtype) for x, dtype in ((pad_id, "int32"), (0, "float32"), (0, "bool")))
    batch = Completions(*made)
    for row, tokens, logp, _ in completions(model, params, queue, key, **how):
        end = len(tokens)
        batch.tokens_BT[row, :end], batch.logp_BT[row, :end], batch.mask_BT[row, :end] = tokens, logp, True
    return batch


def stream(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    prompt_T: np.ndarray,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig = SamplerConfig(),
    stop_ids: tuple[int, ...] | None = None,
    chunk: int = 8,
) -> Iterator[str]:
    """The text that ``generate`` samples after one prompt, in pieces of ``chunk`` tokens (32 at most), never cut inside
    a character.

    Joined, the pieces are the decoded completion without its stop token, one of the tokenizer's
    unless told. Raises as ``generate`` does, and ``ValueError`` for ``chunk`` below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token")
    request, length = Request(0, [int(token) for token in prompt_T], max_new_tokens), len(prompt_T) + max_new_tokens
    check(model, request, length)
    stop_ids = tokenizer.stop_ids if stop_ids is None else tuple(stop_ids)
    how = dict(slots=1, length=length, sampler=sampler, stop_ids=stop_ids, limit=min(chunk, CHUNK))
    text, sent = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
    for (sample,) in looks(model, params, collections.deque([request]), key, **how):
        new, sent = sample.tokens[sent:], len(sample.tokens)
        yield text.decode(b"".join(_spelled(tokenizer, token) for token in new if token not in stop_ids))
    yield text.decode(b"", final=True)


def _check(shape, lengths):
    if len(shape) != 2 or not shape[0]:
        raise ValueError(f"prompts_BT of shape {shape} must be rows of ids, at least one: [[1, 2, 3]] is one prompt")
    rows, width = shape
    if lengths.shape != (rows,) or lengths.min() < 1 or lengths.max() > width:
        raise ValueError(
            f"lengths_B={lengths.tolist()} must be {rows} numbers from 1 to {width}, the width of prompts_BT; "
            "give an empty prompt its <|bos|>, and cut a long one"
        )


def _spelled(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.token_bytes(token) or tokenizer.decode([token]).encode()
