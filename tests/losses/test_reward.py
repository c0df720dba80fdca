import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import bradley_terry, score_regression

DRAW = np.random.default_rng(0)
B = 6
CHOSEN_B, REJECTED_B, TARGET_B = 2 * DRAW.normal(size=(3, B))
MARGIN_B = DRAW.random(B)


def oracle(chosen_B, rejected_B, margin_B=(0.0,) * B, centering=0.0):
    """One pair at a time in float64: the odds that the chosen answer wins by the margin, and both scores' sum."""
    found_B = np.zeros(B)
    for b in range(B):
        wins, loses = np.exp(chosen_B[b] - margin_B[b]), np.exp(rejected_B[b])
        found_B[b] = -np.log(wins / (wins + loses)) + centering * (chosen_B[b] + rejected_B[b]) ** 2
    return found_B


def oracle_gradient(x_B, function, step=1e-6):
    """Central differences in every coordinate, of the sum."""
    steps = step * np.eye(B)
    return np.array([(function(x_B + e_B).sum() - function(x_B - e_B).sum()) / (2 * step) for e_B in steps])


@functools.partial(jax.jit, static_argnames=("loss", "options"))
def values_and_gradients(loss, options, *arrays):
    values, pull = jax.vjp(functools.partial(loss, **dict(options)), *arrays)
    return values, pull(jnp.ones_like(values))


def ours(loss, *arrays, **options):
    """Unreduced values, and the gradient of their sum for every array."""
    outputs = values_and_gradients(loss, tuple(options.items()), *(np.float32(x) for x in arrays))
    return jax.tree.map(np.asarray, outputs)


@pytest.mark.parametrize("margin_B, centering", [(np.zeros(B), 0.0), (MARGIN_B, 0.0), (np.zeros(B), 0.3)])
def test_bradley_terry_and_its_gradient_match_the_oracle(margin_B, centering):
    loss = functools.partial(bradley_terry, margin_B=jnp.float32(margin_B), centering=centering)
    values_B, gradients = ours(loss, CHOSEN_B, REJECTED_B)
    define = functools.partial(oracle, margin_B=margin_B, centering=centering)
    np.testing.assert_allclose(values_B, define(CHOSEN_B, REJECTED_B), rtol=1e-6, atol=1e-6)
    expected = oracle_gradient(CHOSEN_B, lambda x_B: define(x_B, REJECTED_B))
    np.testing.assert_allclose(gradients[0], expected, atol=1e-5)
    expected = oracle_gradient(REJECTED_B, lambda x_B: define(CHOSEN_B, x_B))
    np.testing.assert_allclose(gradients[1], expected, atol=1e-5)


def test_equal_scores_lose_log_2_and_a_margin_asks_for_more():
    scores_B = jnp.float32(CHOSEN_B)
    np.testing.assert_allclose(bradley_terry(scores_B, scores_B), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(bradley_terry(scores_B, scores_B, margin_B=3.0), np.log1p(np.exp(3.0)), rtol=1e-6)


def test_a_swapped_pair_loses_more_by_the_difference_of_its_scores():
    chosen_B, rejected_B = jnp.float32(CHOSEN_B), jnp.float32(REJECTED_B)
    more_B = bradley_terry(rejected_B, chosen_B) - bradley_terry(chosen_B, rejected_B)
    np.testing.assert_allclose(more_B, CHOSEN_B - REJECTED_B, atol=1e-6)


def test_only_centering_sees_a_shift_of_both_scores_and_it_draws_their_sum_to_0():
    plain_B, _ = ours(bradley_terry, CHOSEN_B, REJECTED_B)
    np.testing.assert_allclose(ours(bradley_terry, CHOSEN_B + 5, REJECTED_B + 5)[0], plain_B, atol=2e-6)
    _, gradients = ours(bradley_terry, CHOSEN_B, -CHOSEN_B, centering=0.3)
    for gradient_B, same_B in zip(gradients, ours(bradley_terry, CHOSEN_B, -CHOSEN_B)[1], strict=True):
        np.testing.assert_array_equal(gradient_B, same_B)
    above_B = ours(bradley_terry, CHOSEN_B + 5, 5 - CHOSEN_B, centering=0.3)[1]
    np.testing.assert_allclose(above_B[0] + above_B[1], 2 * 2 * 0.3 * 10, rtol=1e-5)


def test_far_scores_have_finite_losses_and_gradients_of_at_most_1():
    far_B = np.array([1e4, -1e4, 0.0, 100.0, -100.0, 1.0])
    values_B, (chosen_B, rejected_B) = ours(bradley_terry, far_B, -far_B)
    np.testing.assert_allclose(values_B, np.logaddexp(0, -2 * far_B), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(chosen_B, [0, -1, -0.5, 0, -1, -1 / (1 + np.exp(2))], atol=1e-6)
    np.testing.assert_array_equal(chosen_B, -rejected_B)


def test_bfloat16_scores_give_float32_losses():
    narrow = [jnp.bfloat16(x) for x in (CHOSEN_B, REJECTED_B)]
    values_B = bradley_terry(*narrow)
    assert values_B.dtype == score_regression(*narrow).dtype == jnp.float32
    np.testing.assert_allclose(values_B, oracle(*(np.float64(x) for x in narrow)), rtol=1e-6, atol=1e-6)


def test_score_regression_is_the_squared_error_and_its_gradient_twice_the_error():
    values_B, (score_grad_B, _) = ours(score_regression, CHOSEN_B, TARGET_B)
    for b in range(B):
        error = CHOSEN_B[b] - TARGET_B[b]
        np.testing.assert_allclose(values_B[b], error * error, atol=1e-6)
        np.testing.assert_allclose(score_grad_B[b], 2 * error, rtol=1e-5)


@pytest.mark.parametrize("loss", [bradley_terry, score_regression])
def test_an_example_of_weight_0_changes_nothing(loss):
    weight_B = np.arange(B) < B - 2
    garbage_B = jnp.float32(np.where(weight_B, CHOSEN_B, 1e4))
    weighed = jax.jit(jax.value_and_grad(lambda x_B: jnp.sum(weight_B * loss(x_B, jnp.float32(REJECTED_B)))))
    (value, gradient_B), (same, same_B) = weighed(garbage_B), weighed(jnp.float32(CHOSEN_B))
    assert value == same and not np.any(gradient_B[~weight_B])
    np.testing.assert_array_equal(gradient_B, same_B)


def test_a_negative_centering_is_refused():
    with pytest.raises(ValueError, match="centering=-0.1 must be at least 0: below it, scores run away"):
        bradley_terry(jnp.zeros(B), jnp.zeros(B), centering=-0.1)
