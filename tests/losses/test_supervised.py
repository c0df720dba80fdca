import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import constant_weights, cross_entropy, sequence_weights, token_weights

DRAW = np.random.default_rng(0)
MASK = DRAW.random((4, 6)) < 0.6
MASK[2] = False


def test_token_weights_give_every_token_of_the_batch_the_same():
    weights = np.asarray(token_weights(MASK))
    assert weights.dtype == np.float32
    for place in np.ndindex(MASK.shape):
        np.testing.assert_allclose(weights[place], MASK[place] / sum(MASK.ravel()), rtol=1e-6)


def test_sequence_weights_give_every_row_that_has_tokens_the_same():
    weights = np.asarray(sequence_weights(MASK))
    rows = sum(row.any() for row in MASK)
    for place in np.ndindex(MASK.shape):
        expected = 1 / sum(MASK[place[0]]) / rows if MASK[place] else 0.0
        np.testing.assert_allclose(weights[place], expected, rtol=1e-6)


def test_constant_weights_do_not_depend_on_the_length_of_a_row():
    weights = np.asarray(constant_weights(MASK, length=6))
    np.testing.assert_allclose(weights, MASK / (6 * 4), rtol=1e-6)
    np.testing.assert_allclose(constant_weights(np.ones((4, 6), bool), length=6).sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(constant_weights(MASK, length=12), weights / 2, rtol=1e-6)


@pytest.mark.parametrize("weigh", [token_weights, sequence_weights, lambda mask: constant_weights(mask, length=6)])
def test_micro_batches_are_weighed_over_all_of_the_batch(weigh):
    whole = np.asarray(weigh(MASK))
    np.testing.assert_allclose(np.asarray(weigh(MASK.reshape(2, 2, 6))).reshape(4, 6), whole, rtol=1e-6)
    if weigh in (token_weights, sequence_weights):
        np.testing.assert_allclose(whole.sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("weigh", [token_weights, sequence_weights, lambda mask: constant_weights(mask, length=6)])
def test_an_empty_batch_weighs_nothing_and_has_loss_zero(weigh):
    with jax.debug_nans(True):
        weights = weigh(np.zeros((2, 3), bool))
        np.testing.assert_array_equal(weights, np.zeros((2, 3)))
        value, gradient = jax.value_and_grad(cross_entropy)(jnp.full((2, 3), -2.0), weights)
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("z_coef", [0.0, 0.3])
def test_cross_entropy_is_the_weighted_sum_of_minus_logp_and_the_z_loss(z_coef):
    logp, logz = -DRAW.random(MASK.shape), DRAW.normal(size=MASK.shape)
    weights = np.asarray(sequence_weights(MASK))
    loss = lambda logp, logz: cross_entropy(logp, jnp.asarray(weights), logz_BT=logz, z_coef=z_coef)  # noqa: E731
    value, (logp_grad, logz_grad) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.float32(logp), jnp.float32(logz))
    expected = 0.0
    for place in np.ndindex(MASK.shape):
        expected += weights[place] * (-logp[place] + z_coef * logz[place] ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(logp_grad, -weights, rtol=1e-6)
    np.testing.assert_allclose(logz_grad, 2 * z_coef * logz * weights, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("garbage", [1e4, -np.inf, np.inf, np.nan])
@pytest.mark.parametrize("z_coef", [0.0, 1e-4])
def test_whatever_stands_at_masked_positions_changes_nothing(garbage, z_coef):
    logp, logz = (jnp.float32(DRAW.normal(size=MASK.shape)) for _ in range(2))
    weights = token_weights(MASK)
    both = jax.value_and_grad(
        lambda logp, logz: cross_entropy(logp, weights, logz_BT=logz, z_coef=z_coef), argnums=(0, 1)
    )
    value, gradients = both(logp, logz)
    changed, changed_gradients = both(*(jnp.where(MASK, x, garbage) for x in (logp, logz)))
    assert value == changed
    for gradient, same in zip(gradients, changed_gradients, strict=True):
        np.testing.assert_array_equal(gradient, same)
        assert not np.any(np.asarray(gradient)[~MASK])


def test_masked_infinities_are_clean_under_debug_nans():
    logp, weights = jnp.where(MASK, -1.0, -jnp.inf), token_weights(MASK)
    with jax.debug_nans(True):
        value = jax.value_and_grad(cross_entropy)(logp, weights, logz_BT=-logp, z_coef=1e-4)[0]
    np.testing.assert_allclose(value, 1.0 + 1e-4, rtol=1e-6)


def test_the_z_loss_asks_for_the_log_partition():
    with pytest.raises(ValueError, match="z_coef=0.1 needs logz_BT"):
        cross_entropy(jnp.zeros((1, 1)), jnp.ones((1, 1)), z_coef=0.1)
