"""Likelihood of text: nats per token, perplexity, and bits per byte, which compares across tokenizers."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.sources import DocumentSource
from jaxllm.evaluate.scoring import Span, span_logps
from jaxllm.losses import token_weights
from jaxllm.metrics import Ratio
from jaxllm.model import Model
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

LARGEST_EXPONENT = 700.0  # of what a float can hold


def evaluator(objective: Callable, prepare: Callable, place: Callable) -> Callable[..., dict[str, Ratio]]:
    """A function (params, batches, **frozen) -> the objective's metrics summed over all batches, each a host ``Ratio``.

    ``frozen`` are further arguments of the objective, such as a teacher's parameters. ``place`` puts a loader's batch
    on the devices, ``prepare`` weighs it there. Sums add exactly, so neither the batch size nor a padded last batch
    changes a result; the host waits once, at the end.
    """

    @jax.jit
    def summed(params, batch, frozen):
        given = prepare(params, batch, **frozen)
        measured = jax.lax.map(lambda micro_batch: objective(params, micro_batch, **frozen)[1], given)
        return jax.tree.map(jnp.sum, measured)

    def evaluate(params: Tree, batches: Iterable, **frozen: Tree) -> dict[str, Ratio]:
        each = jax.device_get([summed(params, place(batch), frozen) for batch in batches])
        return jax.tree.map(lambda *parts: float(np.sum(np.array(parts, np.float64))), *each)

    return evaluate


def likelihood(nll: Ratio, num_bytes: int) -> dict[str, float]:
    """nats per token, perplexity, bits per byte and counts, from nats summed over tokens of ``num_bytes`` bytes."""
    return {
        "nats_per_token": nll.total / nll.count,
        "perplexity": math.exp(min(nll.total / nll.count, LARGEST_EXPONENT)),
        "bits_per_byte": nll.total / math.log(2) / num_bytes if num_bytes else math.nan,
        "tokens": int(nll.count),
        "bytes": int(num_bytes),
    }


def num_target_bytes(batch: dict[str, np.ndarray], byte_lengths_V: np.ndarray) -> int:
    """Bytes of UTF-8 that the unmasked targets of a loader's batch spell."""
    return int(byte_lengths_V[batch["targets_BT"]][batch["mask_BT"]].sum())


class Read(NamedTuple):
    """A document that was read: nats of its ``tokens`` targets, which stand for ``num_bytes`` bytes."""

    text: str
    nats: float
    tokens: int
    num_bytes: int


def by_document(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    *,
    path: str,
    field: str,
    sequence_length: int,
    batch_size: int,
    count: int = 0,
) -> list[Read]:
    """Of every document of the files, or of the first ``count``: each token and the document's end, once.

    A document is read from its beginning in pieces of ``sequence_length`` tokens that do not see each other: no number
    depends on its neighbours. Raises as ``DocumentSource`` does for what cannot be read, and ``ValueError`` where there
    is no token to predict.
    """
    texts = [document.text for document in islice(DocumentSource(path, field).documents(), count or None)]
    encoded = tokenizer.documents(texts)
    # Nothing predicts a document's first id: its bytes do not count, none where a special token opens it.
    num_bytes = [
        len(text.encode()) - len(tokenizer.token_bytes(ids[0])) for text, ids in zip(texts, encoded, strict=True)
    ]
    counts = [len(ids) - 1 for ids in encoded]
    if not any(counts):
        raise ValueError(f"{path} holds no token to predict: give documents that are not empty")
    nats = _nats(model, params, encoded, length=sequence_length, batch_size=batch_size, doing=f"read {path}")
    return list(map(Read, texts, nats, counts, num_bytes))


def together(documents: Iterable[Read]) -> dict[str, float]:
    """``likelihood`` of all of them."""
    _, nats, tokens, num_bytes = zip(*documents, strict=True)
    return likelihood(Ratio(math.fsum(nats), sum(tokens)), sum(num_bytes))


def weighed(params: Tree, batch: dict, **frozen: Tree) -> dict:
    """The batch with ``weight_BT``: every unmasked token of all its micro-batches together counts the same."""
    return batch | {"weight_BT": token_weights(batch["mask_BT"])}


def _nats(model: Model, params: Tree, encoded: Sequence[list[int]], *, length: int, **how: Any) -> list[float]:
    """Of each document, read in pieces of ``length`` tokens."""
    starts = [(number, start) for number, ids in enumerate(encoded) for start in range(0, len(ids) - 1, length)]
    pieces = [Span(encoded[number][start : start + length + 1], 1) for number, start in starts]
    logps = span_logps(model, params, pieces, length=length, **how)
    return np.bincount([number for number, _ in starts], -logps, len(encoded)).tolist()
