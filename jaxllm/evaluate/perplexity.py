"""Likelihood of text: nats per token, perplexity, and bits per byte, which compares across tokenizers."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.data.config import DataConfig
from jaxllm.data.loader import validation_batches
from jaxllm.data.sources import DocumentSource
from jaxllm.data.tokens import Split
from jaxllm.evaluate.rows import shown
from jaxllm.evaluate.scoring import token_logps
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


class Documents(NamedTuple):
    """Tokenised documents in memory: document i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray
    num_documents: int
    num_bytes: int


def of_files(
    model: Model, params: Tree, tokenizer: Tokenizer, *, path: str, field: str, sequence_length: int, batch_size: int
) -> dict[str, float]:
    """``likelihood`` of every document of the files together; arguments and errors as of ``by_document``."""
    how = dict(path=path, field=field, sequence_length=sequence_length, batch_size=batch_size)
    return together(by_document(model, params, tokenizer, **how))


def by_document(
    model: Model, params: Tree, tokenizer: Tokenizer, *, path: str, field: str, sequence_length: int, batch_size: int
) -> list[Read]:
    """Of every document of the files: each token and the document's end, once.

    A document is read in pieces of up to ``sequence_length`` tokens that do not see each other. Raises as
    ``DocumentSource`` does for what cannot be read.
    """
    texts = [document.text for document in DocumentSource(path, field).documents()]
    encoded = tokenizer.documents(texts)
    offsets = np.cumsum([0, *map(len, encoded)])
    # Nothing predicts a document's first id: its bytes do not count, none where a special token opens it.
    num_bytes = [
        len(text.encode()) - len(tokenizer.token_bytes(ids[0])) for text, ids in zip(texts, encoded, strict=True)
    ]
    stores = {"files": Split(None, Documents(np.concatenate(encoded), offsets, len(texts), sum(num_bytes)))}
    config = DataConfig(sequence_length=sequence_length)
    batches = validation_batches(stores, config, batch_size=batch_size, micro_batches=1, pad_id=tokenizer.pad_id)
    # Rows are a stream cut every so many pairs: in their order, its targets are those of one document after the other.
    nats = np.concatenate([_nats(model, params, batch) for batch in shown(batches, f"read {path}")])
    counts = [len(ids) - 1 for ids in encoded]
    each = np.split(nats, np.cumsum(counts)[:-1])
    sums = [float(part.sum(dtype=np.float64)) for part in each]
    return list(map(Read, texts, sums, counts, num_bytes))


def together(documents: Iterable[Read]) -> dict[str, float]:
    """``likelihood`` of all of them."""
    _, nats, tokens, num_bytes = zip(*documents, strict=True)
    return likelihood(Ratio(math.fsum(nats), sum(tokens)), sum(num_bytes))


def weighed(params: Tree, batch: dict, **frozen: Tree) -> dict:
    """The batch with ``weight_BT``: every unmasked token of all its micro-batches together counts the same."""
    return batch | {"weight_BT": token_weights(batch["mask_BT"])}


def _nats(model: Model, params: Tree, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Of each target of a loader's batch, in the order of its rows."""
    names = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")
    (logp_BT,) = jax.device_get(token_logps(model, params, *(batch[name][0] for name in names)))
    return -logp_BT[batch["mask_BT"][0]]
