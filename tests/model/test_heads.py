import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import token_logprobs
from jaxllm.model import build, heads, with_scalar_head

HIDDEN_BTD = np.random.default_rng(0).normal(size=(2, 3, 16)).astype("f")
TOKENS_BT = np.random.default_rng(1).integers(0, 40, (2, 3))


def test_a_tied_head_is_the_table_and_an_own_head_its_kernel(tiny, built):
    tied, own = tiny(), tiny(tied_head=False)
    table_VD, kernel_DV = built(tied)[1]["embedding"]["table"], built(own)[1]["head"]["kernel"]
    np.testing.assert_allclose(heads.logits(tied, built(tied)[1], HIDDEN_BTD), HIDDEN_BTD @ table_VD.T, atol=1e-5)
    np.testing.assert_allclose(heads.logits(own, built(own)[1], HIDDEN_BTD), HIDDEN_BTD @ kernel_DV, atol=1e-5)


def test_logits_are_float32_and_capped(tiny, built):
    config = tiny(logit_soft_cap=0.5, operand_dtype="bfloat16", activation_dtype="bfloat16", tied_head=False)
    found = heads.logits(config, built(config)[1], jnp.bfloat16(HIDDEN_BTD))
    plain = heads.logits(tiny(tied_head=False), built(config)[1], HIDDEN_BTD)
    assert found.dtype == jnp.float32 and np.abs(found).max() <= 0.5
    np.testing.assert_allclose(found, 0.5 * np.tanh(plain / 0.5), atol=0.03)


@pytest.mark.parametrize("soft_cap", [0.0, 0.5])
def test_scores_are_those_of_the_dense_logits(tiny, built, soft_cap):
    config = tiny(logit_soft_cap=soft_cap, loss_chunk=2)
    params = built(config)[1]
    logits_BTV = np.asarray(heads.logits(config, params, HIDDEN_BTD))
    for temperature in (1.0, 0.5):
        found = heads.score(config, params, HIDDEN_BTD, TOKENS_BT, temperature=temperature)
        p_BTV = np.exp(logits_BTV / temperature) / np.exp(logits_BTV / temperature).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(found[0], token_logprobs(logits_BTV / temperature, TOKENS_BT), atol=1e-5)
        np.testing.assert_allclose(found[1], jax.nn.logsumexp(logits_BTV / temperature, axis=-1), atol=1e-5)
        np.testing.assert_allclose(found[2], -(p_BTV * np.log(p_BTV)).sum(axis=-1), atol=1e-5)


def test_a_scalar_head_starts_at_zero_and_is_a_float32_sum(tiny, built):
    config = tiny(scalar_head=True, activation_dtype="bfloat16")
    new = heads.empty_scalar_head(config)
    assert not np.any(heads.scalars({"scalar_head": new}, HIDDEN_BTD))
    own = built(config)[1]["scalar_head"]
    assert own["kernel"].shape == (16,) and own["bias"].shape == ()
    for hidden_BTD in (HIDDEN_BTD, jnp.bfloat16(HIDDEN_BTD)):
        found = heads.scalars(built(config)[1], hidden_BTD)
        expected = np.float64(hidden_BTD) @ np.float64(own["kernel"]) + own["bias"]
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_critic_is_a_copy_of_the_policy_under_a_scalar_head_of_its_own(tiny, built):
    plain, critic = tiny(tied_head=False), tiny(tied_head=False, scalar_head=True, critic=True)
    params = built(plain)[1]
    completed = with_scalar_head(critic, params)
    assert completed["critic"]["blocks"] is params["blocks"] and not np.any(
        completed["critic"]["scalar_head"]["kernel"]
    )
    drawn = jax.eval_shape(build(critic).init, jax.random.key(0))
    assert jax.tree.map(np.shape, completed) == jax.tree.map(np.shape, drawn)
    assert {name: x for name, x in completed.items() if name != "critic"} == params
    assert with_scalar_head(critic, completed) is completed
    with pytest.raises(ValueError, match="have a scalar head .*and model.critic, as there"):
        with_scalar_head(plain, completed)
    with pytest.raises(ValueError, match="model.critic=True is what a scalar head stands on"):
        tiny(critic=True)


def test_only_a_model_with_a_scalar_head_takes_parameters_with_one(tiny, built):
    plain, scalar = tiny(), tiny(scalar_head=True)
    params = built(plain)[1]
    assert with_scalar_head(plain, params) == params
    completed = with_scalar_head(scalar, params)
    assert completed.keys() == built(scalar)[1].keys() and completed["blocks"] is params["blocks"]
    assert with_scalar_head(scalar, built(scalar)[1])["scalar_head"] is built(scalar)[1]["scalar_head"]
    with pytest.raises(ValueError, match="have a scalar head .*set model.scalar_head=True"):
        with_scalar_head(plain, completed)
