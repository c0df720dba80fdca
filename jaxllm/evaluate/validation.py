"""The row of numbers that a validation during training writes: of all held-out data, of each source, of answers."""

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.evaluate.perplexity import likelihood, num_target_bytes
from jaxllm.metrics import Ratio
from jaxllm.tree import Tree

Row = dict[str, float]


def validation(
    evaluate: Callable,
    params: Tree,
    sources: Mapping[str, Callable[[], Iterable]],
    byte_lengths_V: np.ndarray,
    **frozen: Tree,
) -> Row:
    """The objective's metrics under ``params``, of all sources together and of each if several; what none counts is
    left out. Where ``nll`` is one of them, it is the loss, and perplexity and bits per byte stand beside it.

    ``evaluate`` is what ``evaluator`` returned; a source is a function that returns its batches anew. Names begin with
    ``validation_`` and end with the source's name after a slash, where they are of one alone.
    """
    if not sources:
        return {}
    found = {name: evaluate(params, batches(), **frozen) for name, batches in sources.items()}
    num_bytes = {
        name: _over_processes(sum(num_target_bytes(batch, byte_lengths_V) for batch in batches()))
        for name, batches in sources.items()
    }
    together = jax.tree.map(lambda *parts: sum(parts), *found.values())
    row = _row(together, sum(num_bytes.values()), "")
    if len(found) > 1:
        for name, measured in found.items():
            row |= _row(measured, num_bytes[name], f"/{name}")
    return row


def _row(measured: dict[str, Ratio], num_bytes: int, ending: str) -> Row:
    row = {name: float(ratio.value) for name, ratio in measured.items() if name != "nll" and ratio.count}
    if "nll" in measured:
        text = likelihood(measured["nll"], num_bytes)
        row |= {"loss": text["nats_per_token"], **{name: text[name] for name in ("perplexity", "bits_per_byte")}}
    return {f"validation_{name}{ending}": value for name, value in row.items()}


def _over_processes(count: int) -> int:
    """The sum of every process's ``count``."""
    return int(np.sum(multihost_utils.process_allgather(np.uint32(count)), dtype=np.uint64))
