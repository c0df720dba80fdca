"""Prompts to samples to batches: the trainer learns from exactly the ids that were sampled."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxllm.evaluate.answers import answers
from jaxllm.generate import SamplerConfig
from jaxllm.model import Model
from jaxllm.tree import Tree

Batch = dict[str, np.ndarray]
Ids = Sequence[int]


def rows(prompts: Sequence[Ids], completions: Sequence[Ids], *, length: int, micro_batches: int) -> Batch:
    """A batch [M, B / M, T] as the loader gives it, each row a prompt and its completion, whose tokens are the targets.

    Raises ``ValueError`` where the two are longer than a row of ``length`` pairs.
    """
    B = len(prompts)
    batch = {
        "tokens_BT": np.zeros((B, length), np.int32),
        "targets_BT": np.zeros((B, length), np.int32),
        "positions_BT": np.zeros((B, length), np.int32),
        "segments_BT": np.zeros((B, length), np.int32),
        "mask_BT": np.zeros((B, length), bool),
    }
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = np.array([*prompt, *completion], np.int32)
        pairs = len(ids) - 1
        if pairs > length:
            raise ValueError(f"a sample has {pairs} pairs of tokens, a row {length}: raise data.sequence_length")
        batch["tokens_BT"][row, :pairs], batch["targets_BT"][row, :pairs] = ids[:-1], ids[1:]
        batch["positions_BT"][row, :pairs], batch["segments_BT"][row, :pairs] = np.arange(pairs), 1
        batch["mask_BT"][row, len(prompt) - 1 : pairs] = True
    return {name: array.reshape(micro_batches, -1, length) for name, array in batch.items()}


def on_policy(
    model: Model,
    prompts: Sequence[Ids],
    *,
    fraction: float,
    batch_size: int,
    micro_batches: int,
    length: int,
    max_new_tokens: int,
    sampler: SamplerConfig,
    stop_ids: tuple[int, ...],
    seed: int,
) -> Callable[..., tuple[Batch, dict]]:
    """A function (params, batch, step) -> (the batch, nothing to log); at a ``fraction`` of the steps the batch is one
    of the model's own answers.

    Which steps, which prompts and what is sampled follow from the seed and the step, so that a resumed run repeats
    them (GKD, Agarwal et al. 2023, arXiv:2306.13649, algorithm 1). Prompts that leave no room for an answer are not
    asked; ``ValueError`` where none does.
    """
    asked = [prompt for prompt in prompts if len(prompt) + max_new_tokens <= length]
    if not asked:
        raise ValueError(
            f"no prompt leaves room for {max_new_tokens} tokens in a row of {length}: lower loop.sample_tokens, or "
            "raise data.sequence_length"
        )

    def rollout(params: Tree, batch: Batch, step: int, **frozen: Tree) -> tuple[Batch, dict]:
        draw = np.random.default_rng([seed, step])
        if draw.random() >= fraction:
            return batch, {}
        chosen = [asked[number] for number in draw.integers(len(asked), size=batch_size)]
        key = jax.random.fold_in(jax.random.key(seed), step)
        how = dict(max_new_tokens=max_new_tokens, sampler=sampler, stop_ids=stop_ids, batch_size=batch_size)
        completions = [answer.tokens for answer in answers(model, params, chosen, key, **how)]
        whole = rows(chosen, completions, length=length, micro_batches=micro_batches)
        return {name: _share(array) for name, array in whole.items()}, {}

    return rollout


def _share(array: np.ndarray) -> np.ndarray:
    """This process's rows of each micro-batch, as the loader deals them."""
    return array[:, jax.process_index() :: jax.process_count()]
