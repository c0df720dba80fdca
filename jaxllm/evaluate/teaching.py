"""A frozen model asked once and for all about every place that a run reads: what it says lies beside the tokens."""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxllm import sharding
from jaxllm.data.columns import AnnotatedStore, Kinds, Part, annotated
from jaxllm.data.config import DataConfig
from jaxllm.data.loader import rows_by_side
from jaxllm.data.packing import Rows
from jaxllm.data.tokens import Split, TokenStore
from jaxllm.model import Model
from jaxllm.train.objectives import ObjectiveConfig, likeliest
from jaxllm.train.preferences import ask_reference
from jaxllm.tree import Tree

_FORMAT = 1  # raise it when the same teacher and the same rows would give other files
INPUTS = ("tokens_BT", "targets_BT", "positions_BT", "segments_BT", "parents_BT", "mask_BT")  # those that a row has


class Question(NamedTuple):
    """What a frozen model is asked: ``say(params, micro-batch)`` gives the columns ``kinds``, and ``name`` and
    ``decides`` tell it from other questions.
    """

    name: str
    say: Callable
    kinds: Kinds
    decides: tuple = ()


def taught(stores: Mapping[str, Split], teacher: Model, params: Callable[[], Tree], **how: Any) -> dict[str, Split]:
    """The stores with ``teacher_ids_BTK`` and ``teacher_logp_BTJ`` of ``stored_distillation`` beside their tokens.

    ``how`` is ``objective``, its config, and what ``asked`` takes. Log-probabilities are float16: wrong by 2^-11 of
    themselves at most, by 0.002 nats of what is likelier than e^-8. Raises ``ValueError`` for a ``top_k`` that is not
    below the vocabulary.
    """
    objective: ObjectiveConfig = how.pop("objective")
    ids_dtype = "uint16" if teacher.config.vocab_size <= 1 << 16 else "uint32"
    kinds = {"teacher_ids_BTK": (ids_dtype, objective.top_k), "teacher_logp_BTJ": ("float16", objective.top_k + 1)}
    say = likeliest(teacher, objective)

    def narrowed(params: Tree, batch: dict) -> dict:
        said = say(params, batch)
        # What no float16 holds would be minus infinity, and 0 times it is not a number.
        logp_BTJ = jnp.maximum(said["teacher_logp_BTJ"], jnp.finfo(jnp.float16).min)
        return said | {"teacher_logp_BTJ": logp_BTJ.astype(jnp.float16)}

    question = Question("teacher", narrowed, kinds, (objective.temperature,))
    return asked(stores, params, question, **how)


def referred(stores: Mapping[str, Split], reference: Model, params: Callable[[], Tree], **how: Any) -> dict:
    """The stores with ``ref_logp_BT`` beside their tokens, float32: the targets' log-probabilities under the reference.

    ``how`` is what ``asked`` takes.
    """
    question = Question("reference", ask_reference(reference), {"ref_logp_BT": ("float32", 0)})
    return asked(stores, params, question, **how)


def asked(
    stores: Mapping[str, Split],
    params: Callable[[], Tree],
    question: Question,
    *,
    identity: str,
    data: DataConfig,
    directory: Path,
    batch_size: int,
) -> dict[str, Split]:
    """The stores with the frozen model's answers to the question beside their tokens.

    What ``directory`` does not hold yet is asked, ``batch_size`` rows at a time, on the mesh that is set. Only then
    ``params()`` are read; ``identity`` tells them from all others. Raises ``ValueError`` where several
    processes would have to ask.
    """
    ask = functools.cache(lambda: _asking(question, params))

    def beside(name: str, store: TokenStore, rows: Sequence[Rows]) -> TokenStore | AnnotatedStore:
        if not rows:
            return store
        reads = [data.packing_of(name), data.sources[name].balance == 1, data.sequence_length]
        content = [_FORMAT, identity, store.fingerprint, *reads, question.kinds, *question.decides]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        parts = lambda: _answers(ask(), rows, batch_size, f"ask the {question.name} about {name}")  # noqa: E731
        return annotated(store, Path(directory) / f"{name}-{question.name}-{digest[:16]}", question.kinds, parts)

    # Which id lies where no token is changes no answer.
    rows = {name: rows_by_side(name, store, data, pad_id=0) for name, store in stores.items()}
    return {name: Split(*map(partial(beside, name), store, rows[name])) for name, store in stores.items()}


def _asking(question: Question, params: Callable[[], Tree]) -> Callable[[dict], dict[str, np.ndarray]]:
    """A function: rows [B, T] on the host -> what the model says of them."""
    if jax.process_count() > 1:
        raise ValueError(
            f"nothing is stored yet, and a {question.name} is asked by one process: start the run on one first, with a "
            "data.cache that all can read"
        )
    on = jax.sharding.get_mesh()
    given = params()
    answer = jax.jit(lambda params, batch: question.say(params, jax.tree.map(lambda x: x[0], batch)))

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
        said = ask({name: np.stack([row[name] for row in filled]) for name in INPUTS if name in filled[0]})
        for line in range(len(read)):
            yield some.plan.pieces(first + line), {name: array[line] for name, array in said.items()}
