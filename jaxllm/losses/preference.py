"""Losses that learn from preferences without a reward model: unreduced functions of sequences' log-probabilities.

``chosen_B`` and ``rejected_B`` are sums over an answer's tokens, ``*_mean_B`` their means, ``ref_*`` those of the
frozen reference: data, whose producer has stopped the gradient.
"""

import jax
import jax.numpy as jnp

# A probability that float32 cannot tell from 1 is taken as 1 - 2^-24, the nearest one below.
LARGEST_LOGP = -(2.0**-24)


def log_ratio_margin(
    chosen_B: jax.Array, rejected_B: jax.Array, ref_chosen_B: jax.Array, ref_rejected_B: jax.Array
) -> jax.Array:
    """margin_B: h = (chosen - rejected) - (ref_chosen - ref_rejected), how much more than the reference the policy
    prefers the chosen answer, in nats.
    """
    # Each answer against itself first: a policy near its reference then loses no digits to the answers' lengths.
    return (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)


def dpo(
    chosen_B: jax.Array,
    rejected_B: jax.Array,
    ref_chosen_B: jax.Array,
    ref_rejected_B: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """per_pair_B: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = ``log_ratio_margin``, e =
    ``label_smoothing``.

    DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7) at e = 0; else the conservative one of its authors' note
    (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, equation 3), which stops widening the margin at sigmoid(beta h) =
    1 - e. Raises ``ValueError`` where beta is not positive or e not in [0, 1/2).
    """
    _check(beta, label_smoothing)
    logit_B = beta * log_ratio_margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B)
    right_B, flipped_B = jax.nn.log_sigmoid(logit_B), jax.nn.log_sigmoid(-logit_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * flipped_B


def robust_dpo(
    chosen_B: jax.Array,
    rejected_B: jax.Array,
    ref_chosen_B: jax.Array,
    ref_rejected_B: jax.Array,
    *,
    beta: float,
    label_smoothing: float,
) -> jax.Array:
    """per_pair_B: (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e), h = ``log_ratio_margin``, e =
    ``label_smoothing``.

    Where a share e of the labels is flipped at random, its mean over the flips is DPO's loss of the true labels
    (Chowdhury et al. 2024, arXiv:2403.00409, section 3.1). It has no lower bound. Raises ``ValueError`` as ``dpo``.
    """
    _check(beta, label_smoothing)
    logit_B = beta * log_ratio_margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B)
    right_B, flipped_B = jax.nn.log_sigmoid(logit_B), jax.nn.log_sigmoid(-logit_B)
    return (-(1 - label_smoothing) * right_B + label_smoothing * flipped_B) / (1 - 2 * label_smoothing)


def ipo(
    chosen_B: jax.Array, rejected_B: jax.Array, ref_chosen_B: jax.Array, ref_rejected_B: jax.Array, *, beta: float
) -> jax.Array:
    """per_pair_B: (h - 1 / (2 beta))^2, h = ``log_ratio_margin``: the margin has a goal, not only a direction.

    Gheshlaghi Azar et al. 2023, arXiv:2310.12036, equation 17, whose tau is beta. The paper's log-probabilities are
    sums; TRL passes means over an answer's tokens, which is the same function. Raises ``ValueError`` where beta is not
    positive.
    """
    _check(beta)
    return jnp.square(log_ratio_margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B) - 1 / (2 * beta))


def hinge(
    chosen_B: jax.Array, rejected_B: jax.Array, ref_chosen_B: jax.Array, ref_rejected_B: jax.Array, *, beta: float
) -> jax.Array:
    """per_pair_B: max(0, 1 - beta h), h = ``log_ratio_margin``: pairs won by 1 / beta nats teach nothing more.

    SLiC-HF (Zhao et al. 2023, arXiv:2305.10425, section 2) has no reference in it; with one it is RSO's hinge loss (Liu
    et al. 2023, arXiv:2309.06657). Raises ``ValueError`` where beta is not positive.
    """
    _check(beta)
    return jax.nn.relu(1 - beta * log_ratio_margin(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B))


def orpo(chosen_mean_B: jax.Array, rejected_mean_B: jax.Array, *, weight: float) -> jax.Array:
    """per_pair_B: -weight log sigmoid(log odds(chosen) - log odds(rejected)), log odds = log(p / (1 - p)) of
    p = exp(mean log-probability).

    The odds-ratio part alone (Hong et al. 2024, arXiv:2403.07691, equations 4 and 7); ``weight`` is the paper's lambda,
    and the supervised term beside it is the objective's. It needs no reference.
    """
    return -weight * jax.nn.log_sigmoid(_log_odds(chosen_mean_B) - _log_odds(rejected_mean_B))


def simpo(chosen_mean_B: jax.Array, rejected_mean_B: jax.Array, *, beta: float, gamma: float) -> jax.Array:
    """per_pair_B: -log sigmoid(beta (chosen - rejected) - gamma), of mean log-probabilities; it needs no reference.

    Meng et al. 2024, arXiv:2405.14734. The authors' code is configured by gamma / beta. Raises ``ValueError`` where
    beta is not positive.
    """
    _check(beta)
    return -jax.nn.log_sigmoid(beta * (chosen_mean_B - rejected_mean_B) - gamma)


def kto(
    logratio_B: jax.Array,
    desirable_B: jax.Array,
    kl: jax.Array | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """per_example_B: weight (1 - sigmoid(beta (logratio - z))) of a desirable answer, weight (1 - sigmoid(beta (z -
    logratio))) of another, z = max(kl, 0).

    ``logratio_B`` is log policy - log reference of a whole answer, ``desirable_B`` whether people liked it, ``kl`` an
    estimate of KL(policy || reference): the batch's mean log-ratio of prompts with the answers of other prompts. z is
    the point from which people feel gains and losses, and gets no gradient (Ethayarajh et al. 2024, arXiv:2402.01306).
    Raises ``ValueError`` where beta is not positive.
    """
    _check(beta)
    baseline = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
    gain_B = jnp.where(desirable_B, 1.0, -1.0) * (logratio_B - baseline)
    return jnp.where(desirable_B, desirable_weight, undesirable_weight) * jax.nn.sigmoid(-beta * gain_B)


def _check(beta, label_smoothing=0.0):
    if beta <= 0:
        raise ValueError(f"beta={beta} must be positive: it scales the log-ratios; 0.1 is common")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} must be in [0, 0.5): it is the share of labels thought to be flipped; "
            "where that is more than half, swap chosen and rejected"
        )


@jax.custom_jvp
def _log_odds(logp_B):
    """log(p / (1 - p)) = logp - log(1 - exp(logp)), finite with its gradient up to p = 1.

    log(-expm1(x)) alone is exact near p = 1; for a small p, where it is inexact, it is nothing beside logp. The
    gradient is written down so that a rejected answer of probability 1 is still pushed down: a clamp's would be 0.
    """
    logp_B = jnp.minimum(logp_B, LARGEST_LOGP)
    return logp_B - jnp.log(-jnp.expm1(logp_B))


_log_odds.defjvps(lambda tangent_B, _, logp_B: tangent_B / -jnp.expm1(jnp.minimum(logp_B, LARGEST_LOGP)))
