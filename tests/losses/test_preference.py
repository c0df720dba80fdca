import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import dpo, hinge, ipo, kto, log_ratio_margin, orpo, robust_dpo, simpo

DRAW = np.random.default_rng(0)
B = 7
PAIRS = tuple(DRAW.normal(-9.0, 3.0, size=(4, B)))
MEANS = tuple(-2 * DRAW.random((2, B)) - 1e-3)
LOG_RATIO_B, DESIRABLE_B = 3 * DRAW.normal(size=B), np.arange(B) % 3 > 0


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dpo_oracle(chosen, rejected, ref_chosen, ref_rejected, *, beta, label_smoothing=0.0):
    """The two answers' implicit rewards, and the probability that the chosen one wins."""
    wins, loses = (np.exp(chosen) / np.exp(ref_chosen)) ** beta, (np.exp(rejected) / np.exp(ref_rejected)) ** beta
    p = wins / (wins + loses)
    return -(1 - label_smoothing) * np.log(p) - label_smoothing * np.log(1 - p)


def robust_oracle(chosen, rejected, ref_chosen, ref_rejected, *, beta, label_smoothing):
    """DPO's loss of the pair as it is labelled and as it is not."""
    labelled = dpo_oracle(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    flipped = dpo_oracle(rejected, chosen, ref_rejected, ref_chosen, beta=beta)
    return ((1 - label_smoothing) * labelled - label_smoothing * flipped) / (1 - label_smoothing - label_smoothing)


def ipo_oracle(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    ratio = np.exp(chosen) * np.exp(ref_rejected) / (np.exp(rejected) * np.exp(ref_chosen))
    return np.log(ratio) ** 2 - np.log(ratio) / beta + 1 / (4 * beta**2)


def hinge_oracle(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    won = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return 1 - won if won < 1 else 0.0


def orpo_oracle(chosen_mean, rejected_mean, *, weight):
    odds, other = (np.exp(x) / -np.expm1(x) for x in (chosen_mean, rejected_mean))
    return -weight * np.log(odds / (odds + other))


def simpo_oracle(chosen_mean, rejected_mean, *, beta, gamma):
    return np.log(1 + np.exp(gamma) * np.exp(rejected_mean) ** beta / np.exp(chosen_mean) ** beta)


def kto_oracle(logratio, desirable, kl, *, beta, desirable_weight=1.0, undesirable_weight=1.0):
    baseline = kl if kl > 0 else 0.0
    if desirable:
        return desirable_weight - desirable_weight * sigmoid(beta * (logratio - baseline))
    return undesirable_weight - undesirable_weight * sigmoid(beta * (baseline - logratio))


CASES = {
    "dpo": (dpo, dpo_oracle, PAIRS, dict(beta=0.3)),
    "smoothed dpo": (dpo, dpo_oracle, PAIRS, dict(beta=0.3, label_smoothing=0.2)),
    "robust dpo": (robust_dpo, robust_oracle, PAIRS, dict(beta=0.3, label_smoothing=0.2)),
    "ipo": (ipo, ipo_oracle, PAIRS, dict(beta=0.2)),
    "hinge": (hinge, hinge_oracle, PAIRS, dict(beta=0.3)),
    "orpo": (orpo, orpo_oracle, MEANS, dict(weight=0.7)),
    "simpo": (simpo, simpo_oracle, MEANS, dict(beta=2.0, gamma=0.5)),
}
REFERENCED = {name: case for name, case in CASES.items() if len(case[2]) == 4}
cases = functools.partial(pytest.mark.parametrize, "name")


@functools.partial(jax.jit, static_argnames=("loss", "options"))
def values_and_gradients(loss, options, *arrays):
    values_B, pull = jax.vjp(functools.partial(loss, **dict(options)), *arrays)
    return values_B, pull(jnp.ones_like(values_B))


def ours(loss, *arrays, **options):
    """Unreduced values, and the gradient of their sum for every array."""
    outputs = values_and_gradients(loss, tuple(options.items()), *(np.float32(x) for x in arrays))
    return jax.tree.map(np.asarray, outputs)


def alone(define, arrays, options):
    """The oracle, one pair at a time in float64, and its central differences in every array."""
    pairs = [list(pair) for pair in zip(*arrays, strict=True)]
    values_B = np.array([define(*pair, **options) for pair in pairs])
    gradients = np.zeros((len(arrays), len(pairs)))
    for place in np.ndindex(gradients.shape):
        above, below = pairs[place[1]].copy(), pairs[place[1]].copy()
        above[place[0]] += 1e-6
        below[place[0]] -= 1e-6
        gradients[place] = (define(*above, **options) - define(*below, **options)) / 2e-6
    return values_B, gradients


@cases(CASES)
def test_every_loss_and_its_gradients_match_the_oracle(name):
    loss, define, arrays, options = CASES[name]
    values_B, gradients = ours(loss, *arrays, **options)
    expected_B, expected = alone(define, arrays, options)
    assert values_B.dtype == jnp.float32
    np.testing.assert_allclose(values_B, expected_B, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients, expected, rtol=1e-5, atol=1e-5)


@cases(CASES)
def test_every_loss_raises_the_chosen_answer_and_lowers_the_rejected_one_where_it_is_wrong(name):
    loss, _, arrays, options = CASES[name]
    apart = [np.full(B, value) for value in (-2.0, -1.0, -1.0, -2.0)[: len(arrays)]]
    _, gradients = ours(loss, *apart, **options)
    assert np.all(gradients[0] < 0) and np.all(gradients[1] > 0)


@cases(CASES)
def test_a_pair_of_weight_0_changes_nothing(name):
    loss, _, arrays, options = CASES[name]
    weight_B = np.arange(B) < B - 2

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=tuple(range(len(arrays))))
    def weighed(*arrays):
        return jnp.sum(weight_B * loss(*arrays, **options))

    value, gradients = weighed(*(jnp.float32(x_B) for x_B in arrays))
    for garbage in (-1e4, 0.0):
        changed, same = weighed(*(jnp.float32(np.where(weight_B, x_B, garbage)) for x_B in arrays))
        assert value == changed and not np.any(np.stack(same)[:, ~weight_B])
        np.testing.assert_array_equal(gradients, same)


@cases(CASES)
def test_impossible_and_certain_answers_have_finite_losses_that_push_the_right_way(name):
    loss, _, arrays, options = CASES[name]
    ends = np.array([-1e4, -100.0, -1e-3, -1e-8, 0.0])
    grid = [x.ravel() for x in np.meshgrid(*[ends] * len(arrays))]
    values_B, gradients = ours(loss, *grid, **options)
    assert np.all(np.isfinite(values_B)) and np.all(np.isfinite(gradients))
    if name not in ("smoothed dpo", "ipo"):
        assert np.all(gradients[0] <= 0) and np.all(gradients[1] >= 0)


# ---- with a reference ----


@cases(["dpo", "smoothed dpo", "robust dpo"])
def test_dpo_is_log_2_where_the_policy_is_its_reference(name):
    loss, _, (chosen_B, rejected_B, *_), options = CASES[name]
    values_B, (chosen_grad_B, rejected_grad_B, *_) = ours(loss, chosen_B, rejected_B, chosen_B, rejected_B, **options)
    np.testing.assert_allclose(values_B, np.log(2), atol=1e-6)
    slope = 0.3 / 2 * {"dpo": 1, "smoothed dpo": 1 - 2 * 0.2, "robust dpo": 1 / (1 - 2 * 0.2)}[name]
    np.testing.assert_allclose(chosen_grad_B, -slope, rtol=1e-6)
    np.testing.assert_allclose(rejected_grad_B, slope, rtol=1e-6)
    np.testing.assert_array_equal(log_ratio_margin(chosen_B, rejected_B, chosen_B, rejected_B), np.zeros(B))


def test_swapping_chosen_and_rejected_negates_the_margin():
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = PAIRS
    swapped = rejected_B, chosen_B, ref_rejected_B, ref_chosen_B
    margin_B = log_ratio_margin(*(jnp.float32(x) for x in PAIRS))
    np.testing.assert_allclose(margin_B, (chosen_B - rejected_B) - (ref_chosen_B - ref_rejected_B), atol=5e-6)
    np.testing.assert_array_equal(log_ratio_margin(*(jnp.float32(x) for x in swapped)), -margin_B)
    more_B = ours(dpo, *swapped, beta=0.3)[0] - ours(dpo, *PAIRS, beta=0.3)[0]
    np.testing.assert_allclose(more_B, 0.3 * margin_B, atol=1e-6)


def test_the_margin_of_a_short_answer_keeps_its_digits_beside_a_long_one():
    """A step of 1e-3 nats from the reference is not rounded to what a rejected answer of 3,000 nats can tell."""
    pair = [jnp.float32([x]) for x in (-5.001, -3000.3, -5.0, -3000.3)]
    np.testing.assert_allclose(log_ratio_margin(*pair), pair[0] - pair[2], rtol=1e-6)


@cases(REFERENCED)
def test_only_the_log_ratio_counts(name):
    """What policy and reference share of an answer, its length for one, changes nothing."""
    loss, _, arrays, options = CASES[name]
    shift = np.array([[3.0], [-2.0], [3.0], [-2.0]])
    np.testing.assert_allclose(
        ours(loss, *(np.stack(arrays) + shift), **options)[0], ours(loss, *arrays, **options)[0], rtol=1e-5, atol=1e-5
    )


def test_smoothed_dpo_is_least_where_the_winner_has_probability_1_minus_e():
    h, zero = np.log(0.8 / 0.2) / 0.3 + np.array([0.0, 0.5, -0.5]), np.zeros(3)
    values, (gradient, *_) = ours(dpo, h, zero, zero, zero, beta=0.3, label_smoothing=0.2)
    assert abs(gradient[0]) < 1e-6 and values[0] < min(values[1:]) and gradient[2] < 0 < gradient[1]


def test_the_mean_of_robust_dpo_over_flipped_labels_is_dpo_of_the_true_ones():
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = PAIRS
    robust = functools.partial(ours, robust_dpo, beta=0.3, label_smoothing=0.2)
    right_B = robust(*PAIRS)[0]
    flipped_B = robust(rejected_B, chosen_B, ref_rejected_B, ref_chosen_B)[0]
    np.testing.assert_allclose(0.8 * right_B + 0.2 * flipped_B, ours(dpo, *PAIRS, beta=0.3)[0], atol=1e-6)


def test_ipo_is_0_and_least_at_a_margin_of_1_over_2_beta():
    h, zero = 2.5 + np.array([0.0, 0.1, -0.1]), np.zeros(3)
    values, (gradient, *_) = ours(ipo, h, zero, zero, zero, beta=0.2)
    np.testing.assert_allclose(values, [0.0, 0.01, 0.01], atol=1e-6)
    np.testing.assert_allclose(gradient, [0.0, 0.2, -0.2], atol=1e-5)


def test_hinge_teaches_nothing_past_a_margin_of_1_over_beta():
    h, zero = 5.0 + np.array([0.5, -0.5]), np.zeros(2)
    values, (gradient, *_) = ours(hinge, h, zero, zero, zero, beta=0.2)
    np.testing.assert_allclose(values, [0.0, 0.1], atol=1e-6)
    np.testing.assert_allclose(gradient, [0.0, -0.2], atol=1e-6)


# ---- without one ----


def test_equal_answers_lose_log_2():
    mean_B = MEANS[0]
    np.testing.assert_allclose(ours(orpo, mean_B, mean_B, weight=0.7)[0], 0.7 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(ours(simpo, mean_B, mean_B, beta=2.0, gamma=0.0)[0], np.log(2), rtol=1e-6)


@pytest.mark.parametrize("logp", [-1e-6, -1e-4, -0.1, -np.log(2), -5.0, -30.0])
def test_the_odds_keep_their_digits_from_certain_to_hopeless(logp):
    arrays, options = (np.full(1, logp), np.full(1, logp / 3 - 0.1)), dict(weight=1.0)
    arrays = tuple(np.float64(np.float32(x)) for x in arrays)
    values, (gradient, _) = ours(orpo, *arrays, **options)
    np.testing.assert_allclose(values, orpo_oracle(*arrays, **options), rtol=3e-6)
    lost = -np.expm1(-orpo_oracle(*arrays, **options))
    np.testing.assert_allclose(gradient, lost / np.expm1(arrays[0]), rtol=1e-5)


def test_a_rejected_answer_that_is_certain_is_pushed_down_and_harder_than_one_that_is_nearly_so():
    _, (_, gradient) = ours(orpo, np.full(2, -1.0), np.array([0.0, -1e-3]), weight=1.0)
    assert gradient[0] > gradient[1] > 0


def test_simpo_asks_for_a_margin_of_gamma_after_beta():
    """At beta (c - r) = gamma the loss is log 2: gamma is not scaled by beta."""
    value = ours(simpo, np.full(1, -1.0), np.full(1, -1.25), beta=2.0, gamma=0.5)[0]
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)


# ---- kto ----


@pytest.mark.parametrize("kl", [0.8, -0.8])
def test_kto_and_its_gradient_match_the_oracle_and_the_kl_is_a_constant_of_at_least_0(kl):
    options = dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    loss = lambda x_B, kl: kto(x_B, DESIRABLE_B, kl, **options)  # noqa: E731
    values_B, (gradient_B, kl_grad) = ours(loss, LOG_RATIO_B, kl)
    for b in range(B):
        define = functools.partial(kto_oracle, desirable=DESIRABLE_B[b], kl=kl, **options)
        np.testing.assert_allclose(values_B[b], define(LOG_RATIO_B[b]), rtol=1e-6)
        expected = (define(LOG_RATIO_B[b] + 1e-6) - define(LOG_RATIO_B[b] - 1e-6)) / 2e-6
        np.testing.assert_allclose(gradient_B[b], expected, atol=1e-5)
    assert kl_grad == 0 and np.all((gradient_B < 0) == DESIRABLE_B)


def test_kto_is_half_its_weight_where_policy_and_reference_are_one():
    values_B = kto(jnp.zeros(B), DESIRABLE_B, 0.0, beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    np.testing.assert_allclose(values_B, np.where(DESIRABLE_B, 0.65, 0.3), rtol=1e-6)


@pytest.mark.parametrize("logratio", [-1e4, 1e4])
def test_kto_of_far_log_ratios_is_finite_and_between_0_and_its_weight(logratio):
    values_B, (gradient_B,) = ours(lambda x_B: kto(x_B, DESIRABLE_B, 1e4, beta=0.3), np.full(B, logratio))
    assert np.all((values_B >= 0) & (values_B <= 1)) and np.all(np.isfinite(gradient_B))


# ---- bad input ----


@pytest.mark.parametrize("beta", [0.0, -0.1])
@cases([*REFERENCED, "simpo"])
def test_a_beta_that_is_not_positive_is_refused(name, beta):
    loss, _, arrays, options = CASES[name]
    with pytest.raises(ValueError, match=f"beta={beta} must be positive: it scales the log-ratios; 0.1 is common"):
        loss(*arrays, **options | dict(beta=beta))
    with pytest.raises(ValueError, match=f"beta={beta} must be positive"):
        kto(LOG_RATIO_B, DESIRABLE_B, 0.0, beta=beta)


@pytest.mark.parametrize("share", [-0.1, 0.5, 0.9])
@pytest.mark.parametrize("loss", [dpo, robust_dpo])
def test_a_label_smoothing_outside_of_its_range_is_refused(loss, share):
    with pytest.raises(ValueError, match=rf"label_smoothing={share} must be in \[0, 0.5\): .*swap chosen and rejected"):
        loss(*PAIRS, beta=0.1, label_smoothing=share)
