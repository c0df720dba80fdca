"""Losses of a reward model: of pairs of answers, and of single answers with a score. Unreduced, in float32."""

import jax
import jax.numpy as jnp


def bradley_terry(
    chosen_B: jax.Array, rejected_B: jax.Array, *, margin_B: jax.Array | float = 0.0, centering: float = 0.0
) -> jax.Array:
    """per_pair_B: -log sigmoid(chosen - rejected - margin) + centering (chosen + rejected)^2, of two answers' scores.

    The margin by which a pair's chosen answer should win is Llama 2's (Touvron et al. 2023, arXiv:2307.09288, equation
    2). A pair fixes only the difference of its scores; ``centering`` draws their sum to 0, so that scores of different
    prompts compare (Eisenstein et al. 2023, arXiv:2312.09244). Raises ``ValueError`` where centering is below 0.
    """
    if centering < 0:
        raise ValueError(f"centering={centering} must be at least 0: below it, scores run away from 0")
    chosen_B, rejected_B = (score_B.astype(jnp.float32) for score_B in (chosen_B, rejected_B))
    per_pair_B = -jax.nn.log_sigmoid(chosen_B - rejected_B - margin_B)
    return per_pair_B + centering * jnp.square(chosen_B + rejected_B)


def score_regression(score_B: jax.Array, target_B: jax.Array) -> jax.Array:
    """per_example_B: (score - target)^2, for answers that people gave a number, say 1 to 5; no factor 1/2.

    As in HelpSteer2 (Wang et al. 2024, arXiv:2406.08673).
    """
    return jnp.square(score_B.astype(jnp.float32) - target_B)
