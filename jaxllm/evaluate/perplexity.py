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
from jaxllm.losses import token_weights
from jaxllm.metrics import Ratio
from jaxllm.model import Model
from jaxllm.text.special_tokens import BOS_ID, EOS_ID, PAD_ID
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.train.objectives import ObjectiveConfig, next_token
from jaxllm.tree import Tree


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
        "perplexity": math.exp(min(nll.total / nll.count, 700.0)),
        "bits_per_byte": nll.total / math.log(2) / num_bytes,
        "tokens": int(nll.count),
        "bytes": int(num_bytes),
    }


def num_target_bytes(batch: dict[str, np.ndarray], byte_lengths_V: np.ndarray) -> int:
    """Bytes of UTF-8 that the unmasked targets of a loader's batch spell."""
    return int(byte_lengths_V[batch["targets_BT"]][batch["mask_BT"]].sum())


class Documents(NamedTuple):
    """Tokenised documents in memory: document i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray
    offsets: np.ndarray
    num_documents: int
    num_bytes: int


def of_files(
    model: Model, params: Tree, tokenizer: Tokenizer, *, path: str, field: str, sequence_length: int, batch_size: int
) -> dict[str, float]:
    """``likelihood`` of every document of the files: each token and each document's end, once.

    A document is read in pieces of ``sequence_length`` tokens that do not see each other. Raises as ``DocumentSource``
    does for what cannot be read.
    """
    texts = [document.text for document in DocumentSource(path, field).documents()]
    encoded = [np.concatenate([[BOS_ID], ids, [EOS_ID]]).astype(np.int32) for ids in tokenizer.encode_batch(texts)]
    num_bytes = sum(len(text.encode()) for text in texts)
    documents = Documents(np.concatenate(encoded), np.cumsum([0, *map(len, encoded)]), len(texts), num_bytes)
    config = DataConfig(sequence_length=sequence_length)
    stores = {"files": Split(None, documents)}
    batches = validation_batches(stores, config, batch_size=batch_size, micro_batches=1, pad_id=PAD_ID)
    evaluate = evaluator(next_token(model, ObjectiveConfig(z_coef=0.0)), weighed, lambda batch: batch)
    return likelihood(evaluate(params, batches)["nll"], documents.num_bytes)


def weighed(params: Tree, batch: dict, **frozen: Tree) -> dict:
    """The batch with ``weight_BT``: every unmasked token of all its micro-batches together counts the same."""
    return batch | {"weight_BT": token_weights(batch["mask_BT"])}
