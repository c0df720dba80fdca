"""Objectives of preferences: what a model learns from answers that people or judges compared.

In a row the segments 2p - 1 and 2p are the two answers of pair p, which begin with the last token of their prompt. What
comes before that is read once, as segment -p, which both continue. An answer alone is segment 2p - 1, its whole prompt
in it. What does not depend on the parameters that are trained is made once for the whole batch, by ``weighed_pairs``,
``weighed_scores`` and ``referred``: a weight per pair, and log-probabilities under the reference.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.configure import nearest
from jaxllm.losses import bradley_terry, dpo, hinge, ipo, kto, orpo, robust_dpo, score_regression, simpo
from jaxllm.metrics import Ratio
from jaxllm.model import Model
from jaxllm.train.objectives import Batch, Objective, hidden_states
from jaxllm.tree import Tree

SHORTEST = 4  # no prompt with its answers has fewer pairs of tokens: a row has room for T / SHORTEST of them


class Loss(NamedTuple):
    """A loss of pairs of answers: ``pairs(config, chosen_B, rejected_B, ref_chosen_B, ref_rejected_B)``."""

    pairs: Callable
    has_reference: bool = True
    has_means: bool = False  # of an answer's mean log-probability, whatever the config says


LOSSES = {
    "dpo": Loss(lambda c, *logps: dpo(*logps, beta=c.beta, label_smoothing=c.label_smoothing)),
    "robust_dpo": Loss(lambda c, *logps: robust_dpo(*logps, beta=c.beta, label_smoothing=c.label_smoothing)),
    "ipo": Loss(lambda c, *logps: ipo(*logps, beta=c.beta)),
    "hinge": Loss(lambda c, *logps: hinge(*logps, beta=c.beta)),
    "orpo": Loss(lambda c, chosen, rejected, *_: orpo(chosen, rejected, weight=c.beta), False, True),
    "simpo": Loss(lambda c, chosen, rejected, *_: simpo(chosen, rejected, beta=c.beta, gamma=c.gamma), False, True),
}
KTO = "kto"  # of answers one by one


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """How a policy learns from preferences. ``configs/common.py`` explains each key beside its default."""

    loss: str
    beta: float
    label_smoothing: float
    gamma: float
    length_normalised: bool
    sft_weight: float
    desirable_weight: float
    undesirable_weight: float
    store_reference: bool

    def __post_init__(self):
        if self.loss not in (*LOSSES, KTO):
            raise ValueError(f"preference.loss={self.loss!r} is no loss{nearest(self.loss, (*LOSSES, KTO))}")
        if not self.beta > 0:
            raise ValueError(f"preference.beta={self.beta} must be positive; 0.1 is common")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"preference.label_smoothing={self.label_smoothing} must be in [0, 0.5)")
        for key in ("gamma", "sft_weight", "desirable_weight", "undesirable_weight"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"preference.{key}={getattr(self, key)} must not be negative")
        if self.loss == "orpo" and not self.sft_weight:
            raise ValueError(
                "preference.loss='orpo' with sft_weight=0 pushes answers apart and keeps neither: set sft_weight=1, "
                "the cross-entropy of the chosen one that its paper adds"
            )
        if self.store_reference and not self.has_reference:
            raise ValueError(f"preference.store_reference=True stores nothing: loss={self.loss!r} has no reference")

    @property
    def is_paired(self) -> bool:
        """Whether answers are compared with each other, and not learned one by one."""
        return self.loss != KTO

    @property
    def has_reference(self) -> bool:
        """Whether log-probabilities are compared with those of a reference."""
        return not self.is_paired or LOSSES[self.loss].has_reference


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How a reward model learns. ``configs/common.py`` explains each key beside its default."""

    pair_weight: float
    score_weight: float
    centering: float
    margin: float

    def __post_init__(self):
        for key in ("pair_weight", "score_weight", "centering", "margin"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"reward.{key}={getattr(self, key)} must not be negative")
        if not self.pair_weight + self.score_weight:
            raise ValueError("reward.pair_weight and reward.score_weight are both 0: nothing is learned; raise one")


class Answers(NamedTuple):
    """Of each answer of a row: log-probabilities summed over its tokens, and how many these are."""

    logp_BPC: jax.Array
    ref_logp_BPC: jax.Array
    count_BPC: jax.Array


def preference(model: Model, config: PreferenceConfig) -> Objective:
    """The objective of ``config.loss``, on pairs or on answers one by one."""
    return (paired if config.is_paired else unpaired)(model, config)


def paired(model: Model, config: PreferenceConfig) -> Objective:
    """The mean of a loss of pairs, and ``sft_weight`` times the chosen answers' mean negative log-probability per token
    (RPO, Pang et al. 2024, arXiv:2404.19733, equation 1; in ORPO it is the larger part).

    An answer's log-probability is the sum over its tokens; with ``length_normalised``, and in ORPO and SimPO, the mean.
    The batch holds ``weight_BP`` and, for a loss with a reference, ``ref_logp_BT``. Metrics are means over pairs:
    ``accuracy`` (ties are half), ``margin``, ``chosen_log_ratio`` and ``rejected_log_ratio`` in nats of an answer, or
    of a token where means are compared, against the reference where there is one; ``chosen_nll`` per token.
    """
    loss = LOSSES[config.loss]

    def objective(params: Tree, batch: Batch, **frozen: Tree):
        # The reference has spoken in `referred`; its parameters are not asked here.
        answers, weight_BP = _answers(model, params, batch), batch["weight_BP"]
        length_BPC = jnp.maximum(answers.count_BPC, 1.0)
        scale_BPC = length_BPC if loss.has_means or config.length_normalised else jnp.ones_like(length_BPC)
        logp_BPC, ref_logp_BPC = answers.logp_BPC / scale_BPC, answers.ref_logp_BPC / scale_BPC
        sides = (x_BPC[..., side] for x_BPC in (logp_BPC, ref_logp_BPC) for side in (0, 1))
        pair_loss_BP = jax.vmap(partial(loss.pairs, config), in_axes=1, out_axes=1)(*sides)
        nll_BP = -answers.logp_BPC[..., 0] / length_BPC[..., 0]
        per_pair_BP = pair_loss_BP + config.sft_weight * nll_BP
        chosen_BP, rejected_BP = (logp_BPC[..., side] - ref_logp_BPC[..., side] for side in (0, 1))
        measured = {
            "loss": per_pair_BP,
            "accuracy": wins(chosen_BP - rejected_BP),
            "margin": chosen_BP - rejected_BP,
            "chosen_log_ratio": chosen_BP,
            "rejected_log_ratio": rejected_BP,
            "chosen_nll": nll_BP,
        }
        metrics = {name: _mean(x_BP, weight_BP > 0) for name, x_BP in measured.items()}
        return _weighted(weight_BP, per_pair_BP), metrics

    return objective


def unpaired(model: Model, config: PreferenceConfig) -> Objective:
    """KTO's loss of answers that people liked (``score_BT`` 1) or not (0), ``losses.kto``.

    Each answer comes with a mismatched one, from which ``referred`` has made the batch's ``kl``. Metrics: ``accuracy``
    is the share of answers on their side of the kl, ``chosen_log_ratio`` and ``rejected_log_ratio`` are those of liked
    and of other answers.
    """

    def objective(params: Tree, batch: Batch, **frozen: Tree):
        answers, weight_BP = _answers(model, params, batch), batch["weight_BP"]
        ratio_BP = (answers.logp_BPC - answers.ref_logp_BPC)[..., 0]
        liked_BP = _at_end(batch, batch["score_BT"])[..., 0] > 0.5
        weights = dict(desirable_weight=config.desirable_weight, undesirable_weight=config.undesirable_weight)
        one = partial(kto, kl=batch["kl"], beta=config.beta, **weights)
        per_answer_BP = jax.vmap(one, in_axes=1, out_axes=1)(ratio_BP, liked_BP)
        nll_BP = -(answers.logp_BPC / jnp.maximum(answers.count_BPC, 1.0))[..., 0]
        per_answer_BP += config.sft_weight * jnp.where(liked_BP, nll_BP, 0.0)
        real_BP, gain_BP = weight_BP > 0, ratio_BP - jnp.maximum(batch["kl"], 0.0)
        metrics = {
            "loss": _mean(per_answer_BP, real_BP),
            "accuracy": _mean(wins(jnp.where(liked_BP, gain_BP, -gain_BP)), real_BP),
            "chosen_log_ratio": _mean(ratio_BP, real_BP & liked_BP),
            "rejected_log_ratio": _mean(ratio_BP, real_BP & ~liked_BP),
            "chosen_nll": _mean(nll_BP, real_BP & liked_BP),
            "mismatched_kl": Ratio(batch["kl"], jnp.ones(())),
        }
        return _weighted(weight_BP, per_answer_BP), metrics

    return objective


def reward(model: Model, config: RewardConfig) -> Objective:
    """``pair_weight`` times the Bradley-Terry loss of pairs and ``score_weight`` times the squared error of scores.

    An answer's reward is the scalar head's number at its last input token, which is the end of its turn. The batch
    holds ``weight_BP``, ``weight_BPC`` of the answers with a score, and ``margin_BT``, which ``config.margin`` scales.
    Metrics: ``accuracy`` over pairs, and over those whose chosen answer is the longer or the shorter one: a model that
    only counts tokens is right in all of the former and none of the latter; ``reward`` and ``reward_square`` over
    answers.
    """

    def objective(params: Tree, batch: Batch):
        rewards_BT = model.scalars(params, hidden_states(model, params, batch))
        rewards_BPC, scores_BPC = _at_end(batch, rewards_BT), _at_end(batch, batch["score_BT"])
        chosen_BP, rejected_BP = rewards_BPC[..., 0], rewards_BPC[..., 1]
        margin_BP = config.margin * _at_end(batch, batch["margin_BT"])[..., 0]
        pairs = jax.vmap(lambda c, r, m: bradley_terry(c, r, margin_B=m, centering=config.centering), 1, 1)
        pair_loss_BP = pairs(chosen_BP, rejected_BP, margin_BP)
        weight_BP, weight_BPC = batch["weight_BP"], batch["weight_BPC"]
        # What has no score is NaN: it is deleted, not multiplied by a weight of 0.
        known_BPC = jnp.where(weight_BPC > 0, scores_BPC, 0.0)
        errors = jax.vmap(jax.vmap(score_regression, 1, 1), 2, 2)
        score_loss_BPC = errors(rewards_BPC, known_BPC)
        paired_loss, scored_loss = _weighted(weight_BP, pair_loss_BP), _weighted(weight_BPC, score_loss_BPC)
        loss = config.pair_weight * paired_loss + config.score_weight * scored_loss
        count_BPC = per_answer(batch["mask_BT"], batch["segments_BT"])
        real_BP, longer_BP = weight_BP > 0, count_BPC[..., 0] - count_BPC[..., 1]
        won_BP = wins(chosen_BP - rejected_BP)
        metrics = {
            "accuracy": _mean(won_BP, real_BP),
            "accuracy_chosen_longer": _mean(won_BP, real_BP & (longer_BP > 0)),
            "accuracy_chosen_shorter": _mean(won_BP, real_BP & (longer_BP < 0)),
            "margin": _mean(chosen_BP - rejected_BP, real_BP),
            "pair_loss": _mean(pair_loss_BP, real_BP),
            "score_error": _mean(score_loss_BPC, weight_BPC > 0),
            "reward": _mean(rewards_BPC, count_BPC > 0),
            "reward_square": _mean(jnp.square(rewards_BPC), count_BPC > 0),
        }
        return loss, metrics

    return objective


def weighed_pairs(params: Tree, batch: Batch, *, both: bool = True) -> Batch:
    """The batch with ``weight_BP``: every pair of answers in all its micro-batches together counts the same.

    A pair is one where both answers have a target; where it need not be both, the first.
    """
    count = jax.vmap(per_answer)(batch["mask_BT"], batch["segments_BT"])
    real = jnp.all(count > 0, axis=-1) if both else count[..., 0] > 0
    return batch | {"weight_BP": real / jnp.maximum(jnp.sum(real, dtype=jnp.float32), 1.0)}


def weighed_scores(params: Tree, batch: Batch) -> Batch:
    """``weighed_pairs`` with ``weight_BPC`` too, over the answers that have a score."""
    count = jax.vmap(per_answer)(batch["mask_BT"], batch["segments_BT"])
    scored = (count > 0) & jnp.isfinite(jax.vmap(_at_end)(batch, batch["score_BT"]))
    weight = scored / jnp.maximum(jnp.sum(scored, dtype=jnp.float32), 1.0)
    return weighed_pairs(params, batch) | {"weight_BPC": weight}


def referred(model: Model, reference: Model, config: PreferenceConfig) -> Callable[..., Batch]:
    """A function (params, batch, *, ref_params) -> the batch with ``weight_BP`` and what the loss takes as given.

    That is ``ref_logp_BT``, the targets' log-probabilities under the reference, unless the batch holds them already;
    and for KTO ``kl``, the mean log-ratio of the mismatched answers in all micro-batches (Ethayarajh et al. 2024,
    arXiv:2402.01306, section 4.1): in a validation of each of its batches, whose size KTO's loss there depends on. No
    gradient reaches either.
    """
    say = ask_reference(reference)

    def prepare(params: Tree, batch: Batch, *, ref_params: Tree | None = None) -> Batch:
        batch = weighed_pairs(params, batch, both=config.is_paired)
        if config.has_reference and "ref_logp_BT" not in batch:
            batch = batch | jax.lax.map(partial(say, ref_params), batch)
        if config.is_paired:
            return batch
        total, count = jax.tree.map(jnp.sum, jax.lax.map(partial(_mismatched, model, params), batch))
        kl = jax.lax.stop_gradient(total / jnp.maximum(count, 1.0))
        return batch | {"kl": jnp.full(len(batch["mask_BT"]), kl)}

    return prepare


def ask_reference(reference: Model) -> Callable[[Tree, Batch], Batch]:
    """(ref_params, micro-batch) -> ``ref_logp_BT``, float32, of its targets."""

    def say(ref_params: Tree, batch: Batch) -> Batch:
        return {"ref_logp_BT": jax.lax.stop_gradient(_logp(reference, ref_params, batch))}

    return say


def per_answer(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """sum_BPC, float32: the sum over each answer's positions, segment 2p - 1 for C = 0 and 2p for C = 1."""
    P = max(1, x_BT.shape[1] // SHORTEST)
    number_1PC1 = jnp.arange(1, 2 * P + 1).reshape(1, P, 2, 1)
    within_BPCT = segments_BT[:, None, None, :] == number_1PC1
    return jnp.sum(jnp.where(within_BPCT, x_BT[:, None, None, :], 0), axis=-1, dtype=jnp.float32)


def wins(margin: jax.Array) -> jax.Array:
    """1 where the margin is positive, 1/2 where it is 0."""
    return 0.5 * (jnp.sign(margin) + 1)


def _answers(model: Model, params: Tree, batch: Batch) -> Answers:
    logp_BT, mask_BT = _logp(model, params, batch), batch["mask_BT"]
    total = partial(per_answer, segments_BT=batch["segments_BT"])
    ref_logp_BT = batch.get("ref_logp_BT", jnp.zeros_like(logp_BT))
    return Answers(*(total(jnp.where(mask_BT, x_BT, 0.0)) for x_BT in (logp_BT, ref_logp_BT)), total(mask_BT))


def _mismatched(model: Model, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-ratios of a micro-batch's mismatched answers, summed, and how many these are."""
    answers = _answers(model, params, batch)
    real_BP = answers.count_BPC[..., 1] > 0
    ratio_BP = (answers.logp_BPC - answers.ref_logp_BPC)[..., 1]
    return jnp.sum(jnp.where(real_BP, ratio_BP, 0.0)), jnp.sum(real_BP, dtype=jnp.float32)


def _at_end(batch: Batch, x_BT: jax.Array) -> jax.Array:
    """x_BPC: the number at each answer's last input; 0 where there is no answer."""
    segments_BT = batch["segments_BT"]
    next_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    return per_answer(jnp.where(segments_BT != next_BT, x_BT, 0.0), segments_BT)


def _logp(model: Model, params: Tree, batch: Batch) -> jax.Array:
    hidden_BTD = hidden_states(model, params, batch)
    return model.score(params, hidden_BTD, batch["targets_BT"], mask_BT=batch["mask_BT"])[0]


def _weighted(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Masked places are deleted, not multiplied by zero."""
    return jnp.sum(weight * jnp.where(weight > 0, x, 0.0))


def _mean(x: jax.Array, keep: jax.Array) -> Ratio:
    return Ratio(jnp.sum(jnp.where(keep, x, 0.0)), jnp.sum(keep, dtype=jnp.float32))
