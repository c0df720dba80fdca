"""Objectives: (params, batch) -> (loss, metrics), what a stage minimises on one micro-batch.

A batch's ``weight_BT`` is normalised over the whole global batch, so losses and metrics of micro-batches just add.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.losses import chunked_generalized_jsd, chunked_top_k_jsd
from jaxllm.metrics import Ratio
from jaxllm.model import Model, heads
from jaxllm.sharding import place, spec
from jaxllm.tree import Tree

Batch = dict[str, jax.Array]
# (params, batch) -> (loss, metrics); one with a teacher takes teacher_params by name as well.
Objective = Callable[..., tuple[jax.Array, dict[str, Ratio]]]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Coefficients of the objectives' terms. ``configs/common.py`` explains each beside its default."""

    z_coef: float
    neftune_alpha: float = 0.0
    beta: float = 0.0
    temperature: float = 1.0
    hard_weight: float = 0.5
    student_fraction: float = 0.0

    def __post_init__(self):
        for key in ("z_coef", "neftune_alpha"):
            if getattr(self, key) < 0:
                raise ValueError(f"objective.{key}={getattr(self, key)} must not be negative")
        shares = {
            "beta": "forward KL, 1 reverse",
            "hard_weight": "the teacher alone, 1 the data",
            "student_fraction": "the data's answers, 1 the student's own",
        }
        for key, ends in shares.items():
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"objective.{key}={getattr(self, key)} must be in [0, 1]: 0 is {ends}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"objective.temperature={self.temperature} must be positive and finite")


def next_token(model: Model, config: ObjectiveConfig) -> Objective:
    """Cross-entropy of each next token with the z-loss: pretraining, and every stage that imitates text.

    The batch holds ``tokens_BT``, ``targets_BT``, ``positions_BT``, ``segments_BT``, ``mask_BT`` and ``weight_BT``;
    with a ``dropout_key`` dropout is on, and with a ``noise_key`` NEFTune noise: training has them, evaluation has not.
    The metric ``nll`` is in nats per unmasked token, whatever the weights.
    """

    def objective(params: Tree, batch: Batch):
        hidden_BTD = _hidden(model, params, batch, config.neftune_alpha)
        targets_BT, weight_BT = batch["targets_BT"], batch["weight_BT"]
        loss, logp_BT = model.cross_entropy(params, hidden_BTD, targets_BT, weight_BT, z_coef=config.z_coef)
        return loss, {"nll": _mean(-logp_BT, batch["mask_BT"])}

    return objective


def distillation(model: Model, teacher: Model, config: ObjectiveConfig) -> Objective:
    """h * cross-entropy + (1 - h) * t^2 * generalized JSD from the teacher, h = ``hard_weight``, t = ``temperature``.

    The factor t^2 keeps the gradient's size whatever the temperature (Hinton et al. 2015, arXiv:1503.02531, section 2).
    The batch is that of ``next_token``, and who wrote its text is open: the data, the teacher, or the student itself
    (on-policy, GKD: Agarwal et al. 2023, arXiv:2306.13649). ``teacher_params`` are an argument of their own, outside of
    what is differentiated. The metric ``jsd`` is in nats per unmasked token, at this temperature. Raises ``ValueError``
    where the vocabularies differ.
    """
    sizes = model.config.vocab_size, teacher.config.vocab_size
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the student has a vocabulary of {sizes[0]} ids, its teacher one of {sizes[1]}: distillation of logits "
            "needs one tokenizer; use the teacher's, or let it write the data (experiments/distill_data.py)"
        )

    def objective(params: Tree, batch: Batch, *, teacher_params: Tree):
        hidden_BTD = _hidden(model, params, batch, config.neftune_alpha)
        jsd_BT = chunked_generalized_jsd(
            hidden_BTD,
            _head(model, params),
            _hidden(teacher, teacher_params, batch | {"dropout_key": None}, 0.0),
            _head(teacher, teacher_params),
            teacher_soft_cap=teacher.config.logit_soft_cap,
            **_comparison(model, config),
        )
        return _mixed(model, config, params, batch, hidden_BTD, jsd_BT)

    return objective


def stored_distillation(model: Model, config: ObjectiveConfig) -> Objective:
    """``distillation`` from a teacher's likeliest K tokens, which the batch holds: ``teacher_ids_BTK``, distinct, and
    ``teacher_logp_BTK``, their log-probabilities at ``temperature``.

    A bound of it from below: all other tokens are one outcome (``losses.top_k_jsd``).
    """

    def objective(params: Tree, batch: Batch):
        hidden_BTD = _hidden(model, params, batch, config.neftune_alpha)
        stored = batch["teacher_ids_BTK"], batch["teacher_logp_BTK"]
        jsd_BT = chunked_top_k_jsd(hidden_BTD, _head(model, params), *stored, **_comparison(model, config))
        return _mixed(model, config, params, batch, hidden_BTD, jsd_BT)

    return objective


def embedding_noise(key: jax.Array, segments_BT: jax.Array, *, width: int, alpha: float) -> jax.Array:
    """noise_BTD: uniform in +-alpha / sqrt(L D), L the length of the token's own document, D = ``width``.

    NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1), where L is the length of the sequence: in a packed row
    that of its segment, so that packing changes no document's noise.
    """
    length_BT = jnp.sum(segments_BT[:, :, None] == segments_BT[:, None, :], axis=-1)
    noise_BTD = jax.random.uniform(key, (*segments_BT.shape, width), minval=-1.0, out_sharding=spec("btd"))
    return noise_BTD * (alpha / jnp.sqrt(length_BT * width))[..., None]


def _hidden(model: Model, params: Tree, batch: Batch, neftune_alpha: float) -> jax.Array:
    """The model's hidden states of a batch, with the noise that its keys ask for."""
    noise_key, segments_BT, noise_BTD = batch.get("noise_key"), batch["segments_BT"], None
    if noise_key is not None and neftune_alpha > 0:
        noise_BTD = embedding_noise(noise_key, segments_BT, width=model.config.width, alpha=neftune_alpha)
    return model.hidden(
        params,
        batch["tokens_BT"],
        positions_BT=batch["positions_BT"],
        segments_BT=segments_BT,
        dropout_key=batch.get("dropout_key"),
        embedding_noise_BTD=noise_BTD,
    )


def _comparison(model: Model, config: ObjectiveConfig) -> dict:
    """How a student's distributions are made and compared with a teacher's."""
    return dict(
        beta=config.beta,
        temperature=config.temperature,
        chunk=model.config.loss_chunk,
        soft_cap=model.config.logit_soft_cap,
        operand_dtype=model.config.operand_dtype,
    )


def _mixed(model, config, params, batch, hidden_BTD, jsd_BT):
    """(loss, metrics) of the cross-entropy with the data and the divergence from the teacher."""
    targets_BT, weight_BT, mask_BT = batch["targets_BT"], batch["weight_BT"], batch["mask_BT"]
    hard, logp_BT = model.cross_entropy(params, hidden_BTD, targets_BT, weight_BT, z_coef=config.z_coef)
    # Masked positions are deleted, not multiplied by zero, as in the cross-entropy.
    soft = config.temperature**2 * jnp.sum(weight_BT * jnp.where(weight_BT > 0, jsd_BT, 0.0))
    loss = config.hard_weight * hard + (1 - config.hard_weight) * soft
    return loss, {"nll": _mean(-logp_BT, mask_BT), "jsd": _mean(jsd_BT, mask_BT)}


def _head(model: Model, params: Tree) -> jax.Array:
    """head_DV, its shards gathered once and not for every chunk of positions."""
    return place(heads.head(model.config, params), "dv")


def _mean(x_BT: jax.Array, mask_BT: jax.Array) -> Ratio:
    return Ratio(jnp.sum(jnp.where(mask_BT, x_BT, 0.0)), jnp.sum(mask_BT, dtype=jnp.float32))
