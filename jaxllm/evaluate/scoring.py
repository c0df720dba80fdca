"""How likely a model finds what is given to it: the answers of a data set, and parts of texts after what precedes them.

Every number goes through the one log-probability primitive. No batch size and no neighbour changes it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.evaluate.rows import packed, shown
from jaxllm.losses.logprobs import chunks_of, joined
from jaxllm.model import Model, heads
from jaxllm.text.chat import Conversation, Rendered, render
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree


class Span(NamedTuple):
    """Ids of which those from ``start`` on are scored, each after all before it; ``start`` is 1 or more.

    cut: how many ids were dropped at its left, where it was longer than what a model reads.
    """

    ids: list[int]
    start: int
    cut: int = 0

    def within(self, length: int) -> "Span":
        """The span with no more than ``length`` ids before its last one, the first ones dropped.

        Raises ``ValueError`` where what is scored does not fit.
        """
        cut = max(0, len(self.ids) - length - 1)
        if self.start - cut < 1:
            scored = len(self.ids) - self.start
            raise ValueError(f"{scored} tokens to score are more than {length} that are read: raise --sequence_length")
        return Span(self.ids[cut:], self.start - cut, cut)


class Spoken(NamedTuple):
    """Of each span the sum of log-probabilities (float64), and whether each of its tokens is the likeliest."""

    logps: np.ndarray
    greedy: np.ndarray


def text_span(tokenizer: Tokenizer, context: str, continuation: str) -> Span:
    """The ids of a document's beginning, of which the continuation is scored.

    Blanks at the end of the context begin the continuation, and the continuation is what the ids of both together have
    more than those of the context alone: as EleutherAI's lm-eval reads pairs. A document begins with ``bos_ids``;
    where there are none and no context, with the end of another. Raises ``ValueError`` where nothing is left to score.
    """
    bare = context.rstrip()
    before, whole = tokenizer.encode(bare), tokenizer.encode(context + continuation)
    scored = whole[len(before) :]
    if not scored:
        raise ValueError(f"the continuation {continuation!r:.40} has no token of its own after {context[-20:]!r}")
    opening = [*tokenizer.bos_ids, *before] or [tokenizer.eos_id]
    return Span([*opening, *scored], len(opening))


def span_logps(
    model: Model, params: Tree, spans: Sequence[Span], *, length: int, batch_size: int, doing: str = "score"
) -> np.ndarray:
    """[n] float64: the log-probabilities of each span's tokens, summed; several spans share a row of ``length``."""
    found = np.zeros(len(spans))
    for number, (logp_T,) in _over(token_logps, model, params, spans, length, batch_size, doing):
        found[number] = logp_T.sum(dtype=np.float64)
    return found


def spoken(
    model: Model, params: Tree, spans: Sequence[Span], *, length: int, batch_size: int, doing: str = "score"
) -> Spoken:
    """`span_logps`, and whether greedy decoding would write each span."""
    found = Spoken(np.zeros(len(spans)), np.zeros(len(spans), bool))
    for number, (logp_T, best_T) in _over(_logps_and_best, model, params, spans, length, batch_size, doing):
        found.logps[number] = logp_T.sum(dtype=np.float64)
        found.greedy[number] = np.array_equal(best_T, spans[number].ids[spans[number].start :])
    return found


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


def _over(program, model, params, spans, length, batch_size, doing) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of a span, what the program says of each of its scored tokens)."""
    rows = list(packed([span.ids for span in spans], batch_size, length=length))
    for batch in shown(rows, doing):
        said = jax.device_get(program(model, params, *batch[1:]))
        for number, row, start in batch.places:
            ids, first, _ = spans[number]
            yield number, [x_BT[row, start + first - 1 : start + len(ids) - 1] for x_BT in said]


@partial(jax.jit, static_argnums=0)
def token_logps(model, params, tokens_BT, targets_BT, positions_BT, segments_BT):
    """(logp_BT,) of the targets of packed rows."""
    hidden_BTD = model.hidden(params, tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)
    return (model.score(params, hidden_BTD, targets_BT)[0],)


@partial(jax.jit, static_argnums=0)
def _logps_and_best(model, params, tokens_BT, targets_BT, positions_BT, segments_BT):
    hidden_BTD = model.hidden(params, tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)

    def best(hidden_BTD):
        return jnp.argmax(heads.logits(model.config, params, hidden_BTD), axis=-1)

    chunks = jax.lax.map(best, chunks_of(model.config.loss_chunk, hidden_BTD)[0])
    return model.score(params, hidden_BTD, targets_BT)[0], joined(chunks, tokens_BT.shape[1])


def _nll(model, params, tokens_BT, targets_BT, mask_BT):
    logp_BT, _, _ = model.score(params, model.hidden(params, tokens_BT), targets_BT)
    return -jnp.sum(jnp.where(mask_BT, logp_BT, 0.0), axis=1), jnp.sum(mask_BT, axis=1)


def _padded(batch: Sequence[Rendered], rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens_BT, targets_BT, mask_BT) of a conversation per row: its pairs of tokens, padded behind."""
    tokens_BT, targets_BT = (np.zeros((rows, length), np.int32) for _ in range(2))
    mask_BT = np.zeros((rows, length), bool)
    for row, (ids, supervised) in enumerate(batch):
        pairs = min(len(ids) - 1, length)
        tokens_BT[row, :pairs], targets_BT[row, :pairs] = ids[:pairs], ids[1 : pairs + 1]
        mask_BT[row, :pairs] = supervised[1 : pairs + 1]
    return tokens_BT, targets_BT, mask_BT
