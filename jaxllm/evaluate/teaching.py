"""A teacher asked once and for all: its likeliest next tokens at every place that a run reads, beside the tokens."""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxllm import sharding
from jaxllm.data.columns import AnnotatedStore, Part, annotated
from jaxllm.data.config import DataConfig
from jaxllm.data.loader import rows_by_side
from jaxllm.data.packing import Rows
from jaxllm.data.tokens import Split, TokenStore
from jaxllm.model import Model, parameter_rules
from jaxllm.text.special_tokens import PAD_ID
from jaxllm.train.objectives import ObjectiveConfig, likeliest
from jaxllm.tree import Tree

_FORMAT = 1  # raise it when the same teacher and the same rows would give other files
INPUTS = ("tokens_BT", "positions_BT", "segments_BT")


def taught(
    stores: Mapping[str, Split],
    teacher: Model,
    params: Callable[..., Tree],
    *,
    identity: str,
    data: DataConfig,
    objective: ObjectiveConfig,
    directory: Path,
    batch_size: int,
) -> dict[str, Split]:
    """The stores with ``teacher_ids_BTK`` and ``teacher_logp_BTJ`` of ``stored_distillation`` beside their tokens.

    What ``directory`` does not hold yet is asked of the teacher, ``batch_size`` rows at a time, on the mesh that is
    set. Only then ``params(shardings)`` are read; ``identity`` tells them from all others. Log-probabilities are
    float16: wrong by 2^-11 of themselves at most, by 0.002 nats of what is likelier than e^-8. Raises ``ValueError``
    for a ``top_k`` that is not below the vocabulary, and where several processes would have to ask.
    """
    say = likeliest(teacher, objective)
    ask = functools.cache(lambda: _asking(teacher, say, params))
    ids_dtype = "uint16" if teacher.config.vocab_size <= 1 << 16 else "uint32"
    kinds = {"teacher_ids_BTK": (ids_dtype, objective.top_k), "teacher_logp_BTJ": ("float16", objective.top_k + 1)}

    def beside(name: str, store: TokenStore, rows: Sequence[Rows]) -> TokenStore | AnnotatedStore:
        if not rows:
            return store
        reads = [data.packing_of(name), data.sources[name].balance == 1, data.sequence_length]
        content = [_FORMAT, identity, store.fingerprint, *reads, kinds, objective.temperature]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        parts = lambda: _answers(ask(), rows, batch_size, f"ask the teacher about {name}")  # noqa: E731
        return annotated(store, Path(directory) / f"{name}-teacher-{digest[:16]}", kinds, parts)

    rows = {name: rows_by_side(name, store, data, pad_id=PAD_ID) for name, store in stores.items()}
    return {name: Split(*map(partial(beside, name), store, rows[name])) for name, store in stores.items()}


def _asking(teacher: Model, say: Callable, params: Callable[..., Tree]) -> Callable[[dict], dict[str, np.ndarray]]:
    """A function: rows [B, T] on the host -> what the teacher says of them, [B, T, K], in float16 where it is real."""
    if jax.process_count() > 1:
        raise ValueError(
            "objective.store_teacher=True finds nothing stored, and a teacher is asked by one process: start the run "
            "on one first, with a data.cache that all can read"
        )
    on = jax.sharding.get_mesh()
    rules, abstract = parameter_rules(teacher.config), jax.eval_shape(teacher.init, jax.random.key(0))
    given = params(None if on.empty else sharding.parameter_shardings(rules, abstract, on))

    @jax.jit
    def answer(params, batch):
        said = say(params, jax.tree.map(lambda x: x[0], batch))
        # What no float16 holds would be minus infinity, and 0 times it is not a number.
        logp_BTJ = jnp.maximum(said["teacher_logp_BTJ"], jnp.finfo(jnp.float16).min)
        return said | {"teacher_logp_BTJ": logp_BTJ.astype(jnp.float16)}

    def ask(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch = {name: array[None] for name, array in batch.items()}
        return jax.device_get(answer(given, batch if on.empty else sharding.global_batch(batch, on)))

    return ask


def _answers(ask: Callable, rows: Sequence[Rows], batch_size: int, doing: str) -> Iterator[Part]:
    """The pieces of every row, and what the teacher says of them."""
    batches = [(some, first) for some in rows for first in range(0, len(some), batch_size)]
    shown = track(batches, doing, console=Console(stderr=True), disable=not sys.stderr.isatty())
    for some, first in shown:
        read = [some[row] for row in range(first, min(first + batch_size, len(some)))]
        filled = read + [some.blank()] * (batch_size - len(read))
        said = ask({name: np.stack([row[name] for row in filled]) for name in INPUTS})
        for line in range(len(read)):
            yield some.plan.pieces(first + line), {name: array[line] for name, array in said.items()}
