"""What reward models say of answers: the mean of an ensemble, each member on its own scale, and its spread."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import checkpoint, workdir
from jaxllm.configure import section
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.examples import TRAIN, VALIDATION, labelled, resolved
from jaxllm.data.units import Unit
from jaxllm.evaluate.ranking import Bin, calibration, calibration_error, win_rate, won
from jaxllm.evaluate.rows import by_length
from jaxllm.model import Model
from jaxllm.sharding import place
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.tree import Tree

BATCH_SIZE = 32


class Scores(NamedTuple):
    """mean: of the members, in standard deviations of a member's rewards of held-out answers. spread: their standard
    deviation, 0 of a single one.
    """

    mean: np.ndarray
    spread: np.ndarray


class Scale(NamedTuple):
    """Mean and standard deviation of a reward model's rewards of held-out answers, kept with its checkpoint."""

    mean: float
    deviation: float


def load(directories: Sequence[str | os.PathLike], *, step: int | None = None) -> Callable[..., Scores]:
    """A function (prompts, answers) -> ``Scores`` of the newest checkpoints of these runs of the stage "reward".

    Prompts are conversations that the assistant is to go on with, answers texts. Raises ``ValueError`` for a run whose
    model has no scalar head, or whose checkpoint was saved without a validation.
    """
    members = [_member(directory, step) for directory in directories]
    if not members:
        raise ValueError("no reward model is named: give the directory of a run of the stage 'reward', or several")

    def score(prompts: Sequence[Conversation], answers: Sequence[str]) -> Scores:
        each = np.array([member(prompts, answers) for member in members])
        return Scores(each.mean(axis=0), each.std(axis=0))

    return score


def accuracy(
    directories: Sequence[str | os.PathLike], *, path: str = "", step: int | None = None
) -> tuple[dict[str, Any], list[Bin]]:
    """(report, calibration) of reward models, as one where they are several, on the pairs of a file or, unless told, on
    those that the first run holds out.

    The report has the accuracy with its 95 % interval, also over the pairs whose chosen answer is the longer or the
    shorter one, beside two judges that read nothing: the longer answer wins, or a coin decides.
    A pair's margin is in nats of log-odds, the same scale in every member: their mean decides, whatever the scales of
    their rewards. ``calibration_error`` is the mean distance of what it is sure of from how often it is right,
    ``spread`` the mean deviation of the members' margins. Raises as ``load`` and the sources do, and ``ValueError``
    where there is no pair.
    """
    pairs = _pairs(workdir.config(directories[0]), path)
    each = []
    for directory in directories:
        saved = workdir.saved(directory, step=step)
        _require_scalar_head(directory, saved)
        documents = [document for pair in pairs for document in pair.conversations]
        rendered = chat.render(documents, saved.tokenizer, turns="last")
        ids = [each.trimmed().tokens for each in rendered]
        found = rewards(saved.model, saved.params(), ids).reshape(-1, 2)
        each.append(found[:, 0] - found[:, 1])
    margins, spread = np.mean(each, axis=0), np.std(each, axis=0)
    longer = np.array([_characters(pair.first) - _characters(pair.second) for pair in pairs])
    bins = calibration(margins)
    parts = {"accuracy": np.ones(len(pairs), bool), "chosen_longer": longer > 0, "chosen_shorter": longer < 0}
    report = {name: win_rate(won(margins[kept]))._asdict() for name, kept in parts.items() if kept.any()}
    baselines = {"longer_wins": win_rate(won(longer))._asdict(), "random": 0.5}
    sure = {"calibration_error": calibration_error(bins), "spread": float(spread.mean())}
    return {"pairs": len(pairs), **report, **baselines, **sure}, bins


def rewards(model: Model, params: Tree, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """The scalar head's number at the last token of each sequence of ids, float32; no neighbour changes it.

    Compiles once for each power of two that a longest sequence of a batch is rounded up to.
    """
    found = np.empty(len(sequences), np.float32)
    for rows in by_length(sequences, BATCH_SIZE):
        scalars = _last_scalars(model, params, rows.tokens_BT, rows.lengths_B)
        found[rows.numbers] = scalars[: len(rows.numbers)]
    return found


def scale(directory: str | os.PathLike, *, step: int | None = None) -> Scale:
    """Of the rewards that a run's checkpoint gave in the validation it was saved with; ``ValueError`` without one."""
    measured = checkpoint.read_metrics(os.path.join(directory, "checkpoints"), step=step)
    if "validation_reward" not in measured:
        raise ValueError(
            f"the checkpoint in {directory} was saved without a validation, so the scale of its rewards is unknown: "
            "let the run go on to its next one, or name the step of one that was validated"
        )
    mean, square = measured["validation_reward"], measured["validation_reward_square"]
    return Scale(mean, math.sqrt(max(square - mean**2, 0.0)) or 1.0)


def _pairs(config: Mapping[str, Any], path: str) -> list[Unit]:
    if path:
        data = DataConfig({"pairs": SourceConfig(path, format="preference", packing="best_fit_whole")}, validation=0.0)
    else:
        data = section(DataConfig, config["data"], path="config.data")
    examples = (each for source in data.sources.values() for each in labelled(resolved(source), data))
    side = TRAIN if path else VALIDATION
    found = [example.content for label, example in examples if label == side]
    pairs = [unit for unit in found if isinstance(unit, Unit) and unit.second and unit.comparable]
    if not pairs:
        raise ValueError(f"{path or 'what the run holds out'} has no pair of answers to compare: give --files")
    return pairs


def _characters(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(message["content"] or "") for message in messages)


def _require_scalar_head(directory: str | os.PathLike, saved: workdir.Saved) -> None:
    if not saved.model.config.scalar_head:
        raise ValueError(f"{directory} is no reward model: its network has no scalar head; train one, stage 'reward'")


def _member(directory: str | os.PathLike, step: int | None) -> Callable[[Sequence, Sequence], np.ndarray]:
    saved = workdir.saved(directory, step=step)
    _require_scalar_head(directory, saved)
    own, params = scale(directory, step=step), saved.params()

    def score(prompts: Sequence[Conversation], answers: Sequence[str]) -> np.ndarray:
        pairs = zip(prompts, answers, strict=True)
        tokenizer = saved.tokenizer
        ids = [[*chat.prompt(prompt, tokenizer, start=answer), tokenizer.end_id] for prompt, answer in pairs]
        return (rewards(saved.model, params, ids) - own.mean) / own.deviation

    return score


@partial(jax.jit, static_argnums=0)
def _last_scalars(model: Model, params: Tree, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    tokens_BT, lengths_B = place(tokens_BT, "bt"), place(lengths_B, "b")
    scalar_BT = model.scalars(params, model.hidden(params, tokens_BT))
    last_B = jnp.take_along_axis(scalar_BT, lengths_B[:, None] - 1, axis=1)[:, 0]
    return place(last_B, ".")  # whole on each of several processes
