import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import losses

B, T, P, C = 4, 8, 3, 5
DRAW = np.random.default_rng(0)
REWARDS_BT, VALUES_BT = DRAW.normal(size=(2, B, T))
# Padding left and right, a hole as a tool's words leave it, an empty row.
MASK_BT = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1, 0], [0] * 8, [1] * 8], bool)
REWARDS_PC = DRAW.normal(size=(P, C))
LOGP_BT, OLD_BT = -3 * DRAW.random((2, B, T))


def compiled(function, *static):
    """The function as one program, from and to NumPy."""
    program = jax.jit(function, static_argnames=static)
    return lambda *arrays, **options: jax.tree.map(np.asarray, program(*arrays, **options))


gae = compiled(losses.gae, "gamma", "lam")
whiten = compiled(losses.whiten, "shift_mean")
group_advantages = compiled(losses.group_advantages, "scale")
leave_one_out_advantages = compiled(losses.leave_one_out_advantages)


def gae_oracle(gamma, lam):
    """Masked positions deleted; then the sum of equation 16, every term of it."""
    advantages_BT, returns_BT = np.zeros((2, B, T))
    for b in range(B):
        places = np.flatnonzero(MASK_BT[b])
        rewards, values = REWARDS_BT[b, places], [*VALUES_BT[b, places], 0.0]
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(places))]
        for t, place in enumerate(places):
            advantage = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            advantages_BT[b, place], returns_BT[b, place] = advantage, advantage + values[t]
    return advantages_BT, returns_BT


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (1.0, 1.0), (0.0, 0.9)])
def test_gae_matches_the_sum_over_what_is_left_when_masked_positions_are_deleted(gamma, lam):
    found = gae(REWARDS_BT, VALUES_BT, MASK_BT, gamma=gamma, lam=lam)
    for found_BT, expected_BT in zip(found, gae_oracle(gamma, lam), strict=True):
        assert found_BT.dtype == jnp.float32
        np.testing.assert_allclose(found_BT, expected_BT, atol=1e-6)


def test_gae_of_a_worked_example():
    """The value behind the end is not looked at."""
    rewards, values, mask = np.array([[0, 1, 0]]), np.array([[0, 0, 100]]), np.array([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.95, 1.0, 0.0]], atol=1e-7)
    np.testing.assert_allclose(returns, [[0.95, 1.0, 0.0]], atol=1e-7)


def test_at_lambda_1_the_return_is_the_discounted_sum_of_rewards_and_the_advantage_what_it_has_over_the_value():
    advantages_BT, returns_BT = gae(REWARDS_BT, VALUES_BT, MASK_BT, gamma=0.9, lam=1.0)
    expected = [sum(0.9**k * reward for k, reward in enumerate(REWARDS_BT[3, t:])) for t in range(T)]
    np.testing.assert_allclose(returns_BT[3], expected, atol=1e-6)
    np.testing.assert_allclose(advantages_BT[3], expected - VALUES_BT[3], atol=1e-6)


@pytest.mark.parametrize("left, right", [(0, 1), (1, 0), (5, 37)])
def test_padding_on_either_side_changes_no_advantage(left, right):
    pad = lambda x, value: np.pad(x, ((0, 0), (left, right)), constant_values=value)  # noqa: E731
    padded = gae(pad(REWARDS_BT, 1e4), pad(VALUES_BT, -1e4), pad(MASK_BT, False), gamma=0.9, lam=0.8)
    for found_BT, same_BT in zip(padded, gae(REWARDS_BT, VALUES_BT, MASK_BT, gamma=0.9, lam=0.8), strict=True):
        np.testing.assert_array_equal(found_BT, np.pad(same_BT, ((0, 0), (left, right))))


@pytest.mark.parametrize("garbage", [1e4, np.inf, np.nan])
def test_whatever_stands_at_masked_positions_reaches_no_advantage(garbage):
    rewards_BT, values_BT = (np.where(MASK_BT, x, garbage) for x in (REWARDS_BT, VALUES_BT))
    found = gae(rewards_BT, values_BT, MASK_BT, gamma=0.9, lam=0.8)
    for found_BT, same_BT in zip(found, gae(REWARDS_BT, VALUES_BT, MASK_BT, gamma=0.9, lam=0.8), strict=True):
        np.testing.assert_array_equal(found_BT, same_BT)
        assert not np.any(found_BT[~MASK_BT])
    for shift_mean in (True, False):
        found_BT = whiten(values_BT, MASK_BT, shift_mean=shift_mean)
        same_BT = whiten(VALUES_BT, MASK_BT, shift_mean=shift_mean)
        np.testing.assert_array_equal(found_BT[MASK_BT], same_BT[MASK_BT])


def test_advantages_are_constants():
    def total(rewards_BT, values_BT):
        made = *losses.gae(rewards_BT, values_BT, MASK_BT, gamma=0.9, lam=0.8), losses.whiten(values_BT, MASK_BT)
        groups = losses.group_advantages(rewards_BT, scale="std"), losses.leave_one_out_advantages(rewards_BT)
        return sum(jnp.sum(jnp.sin(x)) for x in made + groups)

    for gradient_BT in jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.float32(REWARDS_BT), jnp.float32(VALUES_BT)):
        np.testing.assert_array_equal(gradient_BT, np.zeros((B, T)))


@pytest.mark.parametrize("name, value", [("gamma", 1.1), ("gamma", -0.1), ("lam", 2.0)])
def test_a_gamma_or_lambda_outside_of_the_unit_interval_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value} must be in \[0, 1\]: it is what one step leaves"):
        gae(REWARDS_BT, VALUES_BT, MASK_BT, **dict(gamma=1.0, lam=0.95) | {name: value})


# ---- whitening ----


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (30.0, 7.0), (1e-2, 0.0)])
def test_whitened_positions_have_mean_0_and_biased_variance_1_and_the_mean_may_stay(scale, offset):
    x_BT = scale * VALUES_BT + offset
    valid = x_BT[MASK_BT]
    mean, variance = statistics.fmean(valid), statistics.pvariance(valid)
    found_BT = whiten(x_BT, MASK_BT)
    np.testing.assert_allclose(found_BT[MASK_BT], (valid - mean) / np.sqrt(variance + 1e-8), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.mean(found_BT[MASK_BT], dtype=float), 0.0, atol=1e-6)
    np.testing.assert_allclose(np.var(found_BT[MASK_BT], dtype=float), variance / (variance + 1e-8), rtol=1e-6)
    kept_BT = whiten(x_BT, MASK_BT, shift_mean=False)
    np.testing.assert_allclose(kept_BT[MASK_BT], found_BT[MASK_BT] + mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found_BT[~MASK_BT], np.float32(x_BT)[~MASK_BT])


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_fewer_than_two_positions_stay_as_they_are(count, shift_mean):
    mask_BT = np.zeros((B, T), bool)
    mask_BT[1, 2 : 2 + count] = True
    with jax.debug_nans(True):
        found_BT = whiten(VALUES_BT, mask_BT, shift_mean=shift_mean)
    np.testing.assert_array_equal(found_BT, np.float32(VALUES_BT))


def test_equal_values_whiten_to_0():
    np.testing.assert_allclose(whiten(np.full((B, T), 0.1), MASK_BT)[MASK_BT], 0.0, atol=1e-3)


# ---- groups ----


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_group_advantages_match_the_statistics_of_each_prompt(offset):
    scaled_PC, plain_PC = (group_advantages(REWARDS_PC + offset, scale=scale) for scale in ("std", "none"))
    for p in range(P):
        mean, std = statistics.fmean(REWARDS_PC[p]), statistics.stdev(REWARDS_PC[p])
        for c in range(C):
            np.testing.assert_allclose(plain_PC[p, c], REWARDS_PC[p, c] - mean, atol=1e-6 + 1e-7 * offset)
            expected = (REWARDS_PC[p, c] - mean) / (std + 1e-6)
            np.testing.assert_allclose(scaled_PC[p, c], expected, atol=1e-6 + 3e-7 * offset)


def test_leave_one_out_advantages_are_over_the_mean_of_the_others():
    found_PC = leave_one_out_advantages(REWARDS_PC)
    for p, c in np.ndindex(P, C):
        others = [REWARDS_PC[p, other] for other in range(C) if other != c]
        np.testing.assert_allclose(found_PC[p, c], REWARDS_PC[p, c] - statistics.fmean(others), atol=1e-6)


def test_worked_examples_of_right_and_wrong_answers():
    rewards_PC = np.array([[1, 0, 0, 0], [True, True, False, False]])
    np.testing.assert_allclose(
        group_advantages(rewards_PC, scale="none"), [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]], atol=1e-7
    )
    half = np.sqrt(3) / 2
    np.testing.assert_allclose(
        group_advantages(rewards_PC, scale="std"), [[1.5, -0.5, -0.5, -0.5], [half, half, -half, -half]], atol=1e-5
    )
    third = 1 / 3
    np.testing.assert_allclose(
        leave_one_out_advantages(rewards_PC),
        [[1, -third, -third, -third], [2 * third] * 2 + [-2 * third] * 2],
        atol=1e-6,
    )


ADVANTAGES = {
    "std": lambda rewards_PC: group_advantages(rewards_PC, scale="std"),
    "none": lambda rewards_PC: group_advantages(rewards_PC, scale="none"),
    "leave one out": leave_one_out_advantages,
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exactly_0_beside_groups_that_differ(name):
    """0.1 seven times has a float32 mean that is not 0.1."""
    for completions in (3, 7):
        rewards_PC = np.tile([[0.1], [-3.3], [0.0]], (1, completions))
        rewards_PC = np.concatenate([rewards_PC, DRAW.normal(size=(1, completions))])
        with jax.debug_nans(True):
            found_PC = ADVANTAGES[name](rewards_PC)
        assert not np.any(found_PC[:3]) and np.all(found_PC[3])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_prompts_do_not_see_each_other_and_completions_may_be_shuffled(name):
    found_PC, order = ADVANTAGES[name](REWARDS_PC), DRAW.permutation(C)
    np.testing.assert_array_equal(ADVANTAGES[name](REWARDS_PC[1:2]), found_PC[1:2])
    np.testing.assert_allclose(ADVANTAGES[name](REWARDS_PC[:, order]), found_PC[:, order], atol=1e-6)
    np.testing.assert_allclose(found_PC.sum(axis=1), 0.0, atol=1e-6)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_reward_that_is_not_finite_is_left_out_of_its_group(name, missing):
    rewards_PC = REWARDS_PC.copy()
    rewards_PC[0, 1], rewards_PC[1, :], rewards_PC[2, 1:] = missing, missing, missing
    found_PC = ADVANTAGES[name](rewards_PC)
    np.testing.assert_allclose(found_PC[0, [0, 2, 3, 4]], ADVANTAGES[name](REWARDS_PC[:1, [0, 2, 3, 4]])[0], atol=1e-6)
    assert found_PC[0, 1] == 0 and not np.any(found_PC[1:])


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_one_is_refused(name):
    with pytest.raises(ValueError, match="1 completion per prompt has no others .*; sample at least 2"):
        ADVANTAGES[name](np.ones((4, 1)))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale='mad' must be 'std' \(GRPO\) or 'none' \(Dr. GRPO\)"):
        group_advantages(REWARDS_PC, scale="mad")


# ---- what a policy's loss makes of them ----


@compiled
@jax.value_and_grad
def grpo(logp_BT, old_BT, advantages_B, weight_BT, beta):
    """With the reference where the sampler was."""
    advantages_BT = jnp.broadcast_to(advantages_B[:, None], logp_BT.shape)
    per_token_BT = losses.ppo_clip(logp_BT, old_BT, advantages_BT, clip_low=0.2, clip_high=0.3)
    return jnp.sum(weight_BT * (per_token_BT + beta * losses.kl_k3(logp_BT, old_BT)))


def test_the_first_update_of_grpo_has_loss_0_and_a_gradient_and_a_group_of_equal_rewards_has_none():
    weight_BT = np.asarray(losses.sequence_weights(np.arange(T) < np.array([[2], [8], [3], [5]])))
    advantages_B = group_advantages(np.array([[1, 0], [0, 1]]), scale="std").ravel()
    value, gradient_BT = grpo(LOGP_BT, LOGP_BT, advantages_B, weight_BT, 0.0)
    assert abs(value) <= 1e-7 and np.linalg.norm(gradient_BT) > 0.1
    for scale in ("std", "none"):
        equal_B = group_advantages(np.full((2, 2), 0.7), scale=scale).ravel()
        value, gradient_BT = grpo(LOGP_BT, LOGP_BT, equal_B, weight_BT, 0.0)
        assert value == 0 and not np.any(gradient_BT)


@pytest.mark.parametrize(
    "weigh, expected",
    [
        (losses.token_weights, (-1 + 3) / 4),  # DAPO: every token alike
        (losses.sequence_weights, (-1 / 1 + 3 / 3) / 2),  # GRPO: every answer alike
        (lambda mask_BT: losses.constant_weights(mask_BT, length=4), (-1 + 3) / (2 * 4)),  # Dr. GRPO: over a constant
    ],
)
def test_each_way_to_weigh_tokens_on_a_worked_example(weigh, expected):
    """Two answers of 1 and 3 tokens with advantages 1 and -1, ratio 1, rows of 4."""
    mask_BT, logp_BT = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool), np.full((2, 4), -0.7)
    value, _ = grpo(logp_BT, logp_BT, np.array([1.0, -1.0]), np.asarray(weigh(mask_BT)), 0.0)
    np.testing.assert_allclose(value, expected, atol=1e-6)


def test_shuffled_rows_and_micro_batches_give_the_same_gradient():
    arrays, order = (LOGP_BT, OLD_BT, REWARDS_BT[:, 0], np.asarray(losses.token_weights(MASK_BT))), [2, 0, 3, 1]
    _, whole_BT = grpo(*arrays, 0.1)
    np.testing.assert_array_equal(grpo(*(x[order] for x in arrays), 0.1)[1], whole_BT[order])
    parts = [grpo(*(x[rows] for x in arrays), 0.1)[1] for rows in (slice(0, 1), slice(1, 4))]
    np.testing.assert_array_equal(np.concatenate(parts), whole_BT)


@pytest.mark.parametrize("beta", [0.1, 0.2])
def test_the_kl_term_is_proportional_to_its_coefficient(beta):
    arrays = LOGP_BT, OLD_BT, REWARDS_BT[:, 0], np.asarray(losses.token_weights(MASK_BT))
    difference = (OLD_BT - LOGP_BT)[MASK_BT]
    expected = beta * np.mean(np.exp(difference) - 1 - difference)
    np.testing.assert_allclose(grpo(*arrays, beta)[0] - grpo(*arrays, 0.0)[0], expected, atol=2e-6)


# ---- sharded ----


def test_rows_and_prompts_sharded_over_the_mesh_give_the_same(mesh):
    rows = jax.NamedSharding(mesh, jax.P(("replica", "fsdp"), None))
    arrays = [np.float32(REWARDS_BT), np.float32(VALUES_BT), MASK_BT]

    @jax.jit
    def every(rewards_BT, values_BT, mask_BT):
        made = *losses.gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8), losses.whiten(values_BT, mask_BT)
        return *made, losses.group_advantages(rewards_BT, scale="std"), losses.leave_one_out_advantages(rewards_BT)

    found = jax.tree.leaves(every(*(jax.device_put(x, rows) for x in arrays)))
    for sharded, whole in zip(found, jax.tree.leaves(every(*arrays)), strict=True):
        np.testing.assert_allclose(sharded, whole, atol=1e-6)
