"""Objectives: (params, batch) -> (loss, metrics), what a stage minimises on one micro-batch.

A batch's ``weight_BT`` is normalised over the whole global batch, so losses and metrics of micro-batches just add.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.metrics import Ratio
from jaxllm.model import Model
from jaxllm.tree import Tree

Batch = dict[str, jax.Array]
Objective = Callable[[Tree, Batch], tuple[jax.Array, dict[str, Ratio]]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Coefficients of the objectives' terms."""

    z_coef: float

    def __post_init__(self):
        if self.z_coef < 0:
            raise ValueError(f"objective.z_coef={self.z_coef} must not be negative")


def next_token(model: Model, config: ObjectiveConfig) -> Objective:
    """Cross-entropy of each next token with the z-loss: pretraining, and every stage that imitates text.

    The batch holds ``tokens_BT``, ``targets_BT``, ``positions_BT``, ``segments_BT``, ``mask_BT`` and ``weight_BT``;
    with a ``dropout_key`` dropout is on. The metric ``nll`` is in nats per unmasked token, whatever the weights.
    """

    def objective(params: Tree, batch: Batch):
        hidden_BTD = model.hidden(
            params,
            batch["tokens_BT"],
            positions_BT=batch["positions_BT"],
            segments_BT=batch["segments_BT"],
            dropout_key=batch.get("dropout_key"),
        )
        targets_BT, mask_BT = batch["targets_BT"], batch["mask_BT"]
        loss, logp_BT = model.cross_entropy(params, hidden_BTD, targets_BT, batch["weight_BT"], z_coef=config.z_coef)
        nll = Ratio(-jnp.sum(jnp.where(mask_BT, logp_BT, 0.0)), jnp.sum(mask_BT, dtype=jnp.float32))
        return loss, {"nll": nll}

    return objective
