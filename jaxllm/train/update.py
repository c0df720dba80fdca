"""The one update: gradients summed over micro-batches, one optimizer step. The same for every stage and every mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm import tree


class TrainState(NamedTuple):
    """All that training changes. ``step`` counts optimizer updates, int32."""

    params: tree.Tree
    opt_state: Any
    step: jax.Array


def init_state(params: tree.Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def update(
    state: TrainState,
    batch: tree.Tree,
    *,
    loss: Callable,
    optimizer: optax.GradientTransformationExtraArgs,
    filled: jax.Array | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer update on a batch whose leaves lead with the micro-batch axis M.

    ``loss(params, micro_batch) -> (scalar, metrics)`` is summed over micro-batches, and so are its metrics and its
    float32 gradients: since the batch's weights are normalised over all of it, 1 and M micro-batches give the same
    update. Metrics gain ``loss`` and ``grad_norm`` (before clipping). Only the first ``filled`` micro-batches are
    computed, unless told all of them: a batch of ragged samples leaves the last ones empty, and compiles once.
    """
    gradients = jax.value_and_grad(loss, has_aux=True)

    def accumulate(number, total):
        micro_batch = jax.tree.map(partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False), batch)
        return jax.tree.map(jnp.add, total, gradients(state.params, micro_batch))

    count = len(jax.tree.leaves(batch)[0])
    shapes = jax.eval_shape(gradients, state.params, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), shapes)
    (value, metrics), grads = jax.lax.fori_loop(0, count if filled is None else filled, accumulate, zeros)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=value)
    params = optax.apply_updates(state.params, updates)
    metrics |= {"loss": value, "grad_norm": tree.global_norm(grads)}
    return TrainState(params, opt_state, state.step + 1), metrics
