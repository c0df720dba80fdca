"""Objectives: (params, batch) -> (loss, metrics), what a stage minimises on one micro-batch.

A batch's ``weight_BT`` is normalised over the whole global batch, so losses and metrics of micro-batches just add.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.losses import chunked_generalized_jsd, chunked_top_k, chunked_top_k_jsd
from jaxllm.metrics import Ratio
from jaxllm.model import Model, heads
from jaxllm.sharding import spec
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
    top_k: int = 0
    store_teacher: bool = False

    def __post_init__(self):
        for key in ("z_coef", "neftune_alpha", "top_k"):
            if not getattr(self, key) >= 0:
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
        if self.store_teacher and (not self.top_k or self.student_fraction):
            raise ValueError(
                f"objective.store_teacher=True stores the teacher's top_k={self.top_k} tokens on the data's text: set "
                f"top_k to 1 or more, and student_fraction={self.student_fraction} to 0, for the student's own text is "
                "not there to store"
            )


def next_token(model: Model, config: ObjectiveConfig) -> Objective:
    """Cross-entropy of each next token with the z-loss: pretraining, and every stage that imitates text.

    The batch holds ``tokens_BT``, ``targets_BT``, ``positions_BT``, ``segments_BT``, ``mask_BT`` and ``weight_BT``;
    with a ``dropout_key`` dropout is on, and with a ``noise_key`` NEFTune noise: training has them, evaluation has not.
    The metric ``nll`` is in nats per unmasked token, whatever the weights.
    """

    def objective(params: Tree, batch: Batch):
        hidden_BTD = hidden_states(model, params, batch, config.neftune_alpha)
        targets_BT, weight_BT = batch["targets_BT"], batch["weight_BT"]
        loss, logp_BT = model.cross_entropy(params, hidden_BTD, targets_BT, weight_BT, z_coef=config.z_coef)
        return loss, {"nll": _mean(-logp_BT, batch["mask_BT"])}

    return objective


def distillation(model: Model, teacher: Model, config: ObjectiveConfig) -> Objective:
    """h * cross-entropy + (1 - h) * t^2 * generalized JSD from the teacher, h = ``hard_weight``, t = ``temperature``.

    The factor t^2 keeps the gradient's size whatever the temperature (Hinton et al. 2015, arXiv:1503.02531, section 2).
    The batch is that of ``next_token``, and who wrote its text is open: the data, the teacher, or the student itself
    (on-policy, GKD: Agarwal et al. 2023, arXiv:2306.13649). ``teacher_params`` are an argument of their own, outside of
    what is differentiated. The metric ``jsd`` is in nats per unmasked token, at this temperature. With a ``top_k`` it
    is ``stored_distillation`` of what ``likeliest`` makes of the batch. Raises ``ValueError`` where the vocabularies
    differ.
    """
    sizes = model.config.vocab_size, teacher.config.vocab_size
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the student has a vocabulary of {sizes[0]} ids, its teacher one of {sizes[1]}: distillation of logits "
            "needs one tokenizer; use the teacher's, or let it write the data (experiments/distill_data.py)"
        )
    return (_top_k_distillation if config.top_k else _whole_distillation)(model, teacher, config)


def stored_distillation(model: Model, config: ObjectiveConfig) -> Objective:
    """``distillation`` from a teacher's likeliest K tokens, which the batch holds: ``teacher_ids_BTK``, distinct, and
    ``teacher_logp_BTJ``, the log-probabilities of them and of all others together at ``temperature``.

    A bound of it from below: all other tokens are one outcome (``losses.top_k_jsd``).
    """

    def objective(params: Tree, batch: Batch):
        hidden_BTD = hidden_states(model, params, batch, config.neftune_alpha)
        stored = batch["teacher_ids_BTK"], batch["teacher_logp_BTJ"]
        how = _distributions(model, config)
        jsd_BT = chunked_top_k_jsd(hidden_BTD, heads.head(model.config, params), *stored, beta=config.beta, **how)
        return _mixed(model, config, params, batch, hidden_BTD, jsd_BT)

    return objective


def likeliest(teacher: Model, config: ObjectiveConfig) -> Callable[[Tree, Batch], Batch]:
    """(teacher_params, batch) -> what ``stored_distillation`` needs: the teacher's K = ``top_k`` likeliest tokens.

    Raises ``ValueError`` where they would be none, or leave none of the vocabulary.
    """
    if not 0 < config.top_k < teacher.config.vocab_size:
        raise ValueError(
            f"objective.top_k={config.top_k} must be at least 1 and less than the teacher's vocabulary of "
            f"{teacher.config.vocab_size} ids; 0 learns from all of them, online"
        )

    def say(teacher_params: Tree, batch: Batch) -> Batch:
        hidden_BTD = _teacher_hidden(teacher, teacher_params, batch)
        how = _distributions(teacher, config)
        ids_BTK, logp_BTJ = chunked_top_k(hidden_BTD, heads.head(teacher.config, teacher_params), k=config.top_k, **how)
        return {"teacher_ids_BTK": ids_BTK, "teacher_logp_BTJ": logp_BTJ}

    return say


def embedding_noise(key: jax.Array, segments_BT: jax.Array, *, width: int, alpha: float) -> jax.Array:
    """noise_BTD: uniform in +-alpha / sqrt(L D), L the length of the token's own document, D = ``width``.

    NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1), where L is the length of the sequence: in a packed row
    that of its segment, so that packing changes no document's noise.
    """
    length_BT = jnp.sum(segments_BT[:, :, None] == segments_BT[:, None, :], axis=-1)
    noise_BTD = jax.random.uniform(key, (*segments_BT.shape, width), minval=-1.0, out_sharding=spec("btd"))
    return noise_BTD * (alpha / jnp.sqrt(length_BT * width))[..., None]


def _top_k_distillation(model: Model, teacher: Model, config: ObjectiveConfig) -> Objective:
    learn, say = stored_distillation(model, config), likeliest(teacher, config)
    return lambda params, batch, *, teacher_params: learn(params, batch | say(teacher_params, batch))


def _whole_distillation(model: Model, teacher: Model, config: ObjectiveConfig) -> Objective:
    def objective(params: Tree, batch: Batch, *, teacher_params: Tree):
        hidden_BTD = hidden_states(model, params, batch, config.neftune_alpha)
        jsd_BT = chunked_generalized_jsd(
            hidden_BTD,
            heads.head(model.config, params),
            _teacher_hidden(teacher, teacher_params, batch),
            heads.head(teacher.config, teacher_params),
            beta=config.beta,
            teacher_soft_cap=teacher.config.logit_soft_cap,
            **_distributions(model, config),
        )
        return _mixed(model, config, params, batch, hidden_BTD, jsd_BT)

    return objective


def hidden_states(model: Model, params: Tree, batch: Batch, neftune_alpha: float = 0.0) -> jax.Array:
    """The model's hidden states of a batch, with the noise that its keys ask for; ``parents_BT`` where it has them."""
    noise_key, segments_BT, noise_BTD = batch.get("noise_key"), batch["segments_BT"], None
    if noise_key is not None and neftune_alpha > 0:
        noise_BTD = embedding_noise(noise_key, segments_BT, width=model.config.width, alpha=neftune_alpha)
    return model.hidden(
        params,
        batch["tokens_BT"],
        positions_BT=batch["positions_BT"],
        segments_BT=segments_BT,
        parents_BT=batch.get("parents_BT"),
        dropout_key=batch.get("dropout_key"),
        embedding_noise_BTD=noise_BTD,
    )


def _teacher_hidden(teacher: Model, teacher_params: Tree, batch: Batch) -> jax.Array:
    """Without dropout and noise, which are the student's."""
    return hidden_states(teacher, teacher_params, batch | {"dropout_key": None, "noise_key": None})


def _distributions(model: Model, config: ObjectiveConfig) -> dict:
    """How a model's distributions, which are to be compared, are made of its hidden states."""
    return dict(
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


def _mean(x_BT: jax.Array, mask_BT: jax.Array) -> Ratio:
    return Ratio(jnp.sum(jnp.where(mask_BT, x_BT, 0.0)), jnp.sum(mask_BT, dtype=jnp.float32))
