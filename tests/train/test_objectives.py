import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.train.objectives import ObjectiveConfig, next_token


def objective_of(tiny, built, z_coef=0.0, **changes):
    model, params = built(tiny(**changes))
    return jax.jit(next_token(model, ObjectiveConfig(z_coef))), params, model


def micro_batch(packed_batch):
    return {name: x[0] for name, x in packed_batch(1, 4, 8).items()}


@pytest.mark.parametrize("z_coef", [0.0, 0.1])
def test_next_token_is_the_weighted_cross_entropy_of_the_packed_logits(tiny, built, packed_batch, z_coef):
    objective, params, model = objective_of(tiny, built, z_coef)
    batch = micro_batch(packed_batch)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    logits_BTV = np.float64(jax.jit(model.forward)(params, batch["tokens_BT"], **packed))
    expected = nll = 0.0
    for b, t in np.ndindex(4, 8):
        if batch["mask_BT"][b, t]:
            logz = np.log(np.exp(logits_BTV[b, t]).sum())
            token = logz - logits_BTV[b, t, batch["targets_BT"][b, t]]
            nll += token
            expected += batch["weight_BT"][b, t] * (token + z_coef * logz**2)
    loss, metrics = objective(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"].total, nll, rtol=1e-5)
    assert metrics["nll"].count == batch["mask_BT"].sum()


def test_the_metric_counts_tokens_whatever_the_weights(tiny, built, packed_batch):
    objective, params, _ = objective_of(tiny, built)
    batch = micro_batch(packed_batch)
    plain, tripled = (objective(params, batch | {"weight_BT": factor * batch["weight_BT"]}) for factor in (1, 3))
    np.testing.assert_allclose(tripled[0], 3 * plain[0], rtol=1e-6)
    assert tripled[1]["nll"].total == plain[1]["nll"].total


def test_tokens_at_masked_positions_and_padding_change_neither_loss_nor_gradient(tiny, built, packed_batch):
    model, params = built(tiny())
    both = jax.jit(jax.value_and_grad(lambda *x: next_token(model, ObjectiveConfig(1e-3))(*x)[0]))
    batch = micro_batch(packed_batch)
    other = {name: x.copy() for name, x in batch.items()}
    outside = ~batch["mask_BT"]
    other["targets_BT"][outside] = 39
    other["tokens_BT"][batch["segments_BT"] == 0] = 17
    value, gradient = both(params, batch)
    changed, changed_gradient = both(params, other)
    assert value == changed and np.any(outside)
    jax.tree.map(np.testing.assert_array_equal, gradient, changed_gradient)


@pytest.mark.parametrize("pad", [1, 37])
def test_more_padding_changes_nothing(tiny, built, packed_batch, pad):
    objective, params, _ = objective_of(tiny, built)
    batch = micro_batch(packed_batch)
    longer = {name: np.pad(x, ((0, 0), (0, pad))) for name, x in batch.items()}
    np.testing.assert_allclose(objective(params, longer)[0], objective(params, batch)[0], rtol=1e-6)


def test_a_batch_without_a_target_has_loss_and_gradient_zero(tiny, built, packed_batch):
    model, params = built(tiny())
    batch = {name: np.zeros_like(x) for name, x in micro_batch(packed_batch).items()}
    with jax.debug_nans(True):
        value, gradient = jax.jit(jax.value_and_grad(lambda *x: next_token(model, ObjectiveConfig(1e-3))(*x)[0]))(
            params, batch
        )
    assert value == 0 and not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_dropout_is_on_only_where_the_batch_has_a_key(tiny, built, packed_batch):
    objective, params, _ = objective_of(tiny, built, dropout=0.5)
    batch = micro_batch(packed_batch)
    keyed = [objective(params, batch | {"dropout_key": jax.random.key(seed)})[0] for seed in (0, 0, 1)]
    assert keyed[0] == keyed[1] != keyed[2]
    assert objective(params, batch)[0] == objective_of(tiny, built)[0](params, batch)[0]


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match=r"objective\.z_coef=-0\.1 must not be negative"):
        ObjectiveConfig(-0.1)
    assert jnp.isfinite(ObjectiveConfig(0.0).z_coef)
