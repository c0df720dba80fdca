"""Likelihood of held-out text: nats per token, perplexity, and bits per byte, which compares across tokenizers."""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.metrics import Ratio
from jaxllm.tree import Tree


def evaluator(objective: Callable, prepare: Callable, place: Callable) -> Callable[[Tree, Iterable], dict[str, Ratio]]:
    """A function (params, batches) -> the objective's metrics summed over all batches, each a host ``Ratio``.

    ``place`` puts a loader's batch on the devices, ``prepare`` weighs it there. Sums add exactly, so neither the batch size nor a padded
    last batch changes a result; the host waits once, at the end.
    """

    @jax.jit
    def summed(params, batch):
        measured = jax.lax.map(lambda micro_batch: objective(params, micro_batch)[1], prepare(batch))
        return jax.tree.map(jnp.sum, measured)

    def evaluate(params: Tree, batches: Iterable) -> dict[str, Ratio]:
        each = jax.device_get([summed(params, place(batch)) for batch in batches])
        return jax.tree.map(lambda *parts: float(np.sum(np.array(parts, np.float64))), *each)

    return evaluate


def likelihood(nll: Ratio, num_bytes: int) -> dict[str, float]:
    """nats per token, perplexity, bits per byte and their counts, from summed nats over tokens that spell ``num_bytes`` bytes of UTF-8."""
    return {
        "nats_per_token": nll.total / nll.count,
        "perplexity": math.exp(min(nll.total / nll.count, 700.0)),
        "bits_per_byte": nll.total / math.log(2) / num_bytes,
        "tokens": int(nll.count),
        "bytes": int(num_bytes),
    }


def target_bytes(batch: dict[str, np.ndarray], byte_lengths_V: np.ndarray) -> int:
    """Bytes of UTF-8 that the unmasked targets of a loader's batch spell."""
    return int(byte_lengths_V[batch["targets_BT"]][batch["mask_BT"]].sum())
