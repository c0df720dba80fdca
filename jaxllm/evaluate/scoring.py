"""How surprised a model is by the answers of a data set: a number per record, to select by."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.model import Model
from jaxllm.text.chat import Conversation, Rendered, render
from jaxllm.text.special_tokens import PAD_ID
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree


def answer_nlls(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    sequence_length: int,
    batch_size: int = 16,
) -> Iterator[float]:
    """Nats per supervised token of each conversation, in order; NaN where no such token lies in the first
    ``sequence_length``. Neither the batch size nor the neighbours change a number.
    """
    score = jax.jit(partial(_nll, model))
    rendered = render(conversations, tokenizer)
    for start in range(0, len(rendered), batch_size):
        batch = rendered[start : start + batch_size]
        nll_B, count_B = score(params, *_padded(batch, batch_size, sequence_length))
        yield from (np.asarray(nll_B) / np.where(count_B > 0, count_B, np.nan))[: len(batch)].tolist()


def _nll(model, params, tokens_BT, targets_BT, mask_BT):
    logp_BT, _, _ = model.score(params, model.hidden(params, tokens_BT), targets_BT)
    return -jnp.sum(jnp.where(mask_BT, logp_BT, 0.0), axis=1), jnp.sum(mask_BT, axis=1)


def _padded(batch: Sequence[Rendered], rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens_BT, targets_BT, mask_BT) of a conversation per row: its pairs of tokens, padded behind."""
    tokens_BT, targets_BT = (np.full((rows, length), PAD_ID, np.int32) for _ in range(2))
    mask_BT = np.zeros((rows, length), bool)
    for row, (ids, supervised) in enumerate(batch):
        pairs = min(len(ids) - 1, length)
        tokens_BT[row, :pairs], targets_BT[row, :pairs] = ids[:pairs], ids[1 : pairs + 1]
        mask_BT[row, :pairs] = supervised[1 : pairs + 1]
    return tokens_BT, targets_BT, mask_BT
