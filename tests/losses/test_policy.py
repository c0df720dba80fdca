import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import (
    cispo,
    gspo_clip,
    kl_k1,
    kl_k2,
    kl_k3,
    ppo_clip,
    sequence_weights,
    token_weights,
    value_clip,
)

B, T, V = 4, 6, 5
DRAW = np.random.default_rng(0)
LOGP_BT = -3 * DRAW.random((B, T))
OLD_BT = LOGP_BT + 0.5 * DRAW.normal(size=(B, T))
ADVANTAGES_BT = DRAW.normal(size=(B, T))
MASK_BT = np.array([[0, 1, 1, 1, 1, 0], [1] * 6, [0] * 6, [1, 1, 0, 0, 1, 0]], bool)
CLIPS = dict(clip_low=0.2, clip_high=0.3)
KLS = (kl_k1, kl_k2, kl_k3)


def kept(ratio, advantage, clip_low=0.2, clip_high=0.3):
    """What is maximised, case by case: a gain is capped above, a loss below, and neither on the other side."""
    if advantage >= 0:
        return advantage * (ratio if ratio < 1 + clip_high else 1 + clip_high)
    return advantage * (ratio if ratio > 1 - clip_low else 1 - clip_low)


def ppo_oracle(logp, old_logp, advantage):
    return -kept(np.exp(logp) / np.exp(old_logp), advantage)


def value_oracle(value, old_value, target, clip=0.4):
    near = min(max(value, old_value - clip), old_value + clip)
    return max(abs(value - target), abs(near - target)) ** 2 / 2


def k1_oracle(logp, ref_logp):
    return np.log(np.exp(logp) / np.exp(ref_logp))


def k2_oracle(logp, ref_logp):
    return np.log(np.exp(ref_logp) / np.exp(logp)) ** 2 / 2


def k3_oracle(logp, ref_logp):
    ratio = np.exp(ref_logp) / np.exp(logp)
    return (ratio - 1) - np.log(ratio)


CASES = {
    "ppo_clip": (ppo_clip, ppo_oracle, (LOGP_BT, OLD_BT, ADVANTAGES_BT), CLIPS),
    "value_clip": (value_clip, value_oracle, (3 * LOGP_BT, 3 * OLD_BT, 3 * LOGP_BT + ADVANTAGES_BT), dict(clip=0.4)),
    "kl_k1": (kl_k1, k1_oracle, (LOGP_BT, OLD_BT), {}),
    "kl_k2": (kl_k2, k2_oracle, (LOGP_BT, OLD_BT), {}),
    "kl_k3": (kl_k3, k3_oracle, (LOGP_BT, OLD_BT), {}),
}


@functools.partial(jax.jit, static_argnames=("loss", "options"))
def values_and_gradients(loss, options, *arrays):
    values, pull = jax.vjp(functools.partial(loss, **dict(options)), *arrays)
    return values, pull(jnp.ones_like(values))


def ours(loss, *arrays, **options):
    """The loss of each token, and the gradient of their sum for every array."""
    outputs = values_and_gradients(loss, tuple(options.items()), *(np.float32(x) for x in arrays))
    return jax.tree.map(np.asarray, outputs)


def slope(function, x, step=1e-6):
    return (function(x + step) - function(x - step)) / (2 * step)


@pytest.mark.parametrize("name", CASES)
def test_every_elementwise_loss_and_its_gradients_match_the_oracle(name):
    loss, define, arrays, options = CASES[name]
    per_token_BT, gradients = ours(loss, *arrays, **options)
    for place in np.ndindex(B, T):
        token = [x[place] for x in arrays]
        np.testing.assert_allclose(per_token_BT[place], define(*token), rtol=1e-6, atol=1e-6)
        for index, gradient_BT in enumerate(gradients):
            partial = lambda x, token=token, index=index: define(*token[:index], x, *token[index + 1 :])  # noqa: E731
            np.testing.assert_allclose(gradient_BT[place], slope(partial, token[index]), rtol=1e-5, atol=1e-5)


# ---- clipped ratios ----


@pytest.mark.parametrize(
    "ratio, advantage, value, gradient",
    [
        (1.1, 2.0, -2.2, -2.2),  # within
        (1.5, 2.0, -2.6, 0.0),  # a gain beyond 1 + 0.3 counts no more
        (0.5, 2.0, -1.0, -1.0),  # but what was lost below comes back
        (0.5, -2.0, 1.6, 0.0),  # a fall below 1 - 0.2 counts no more
        (1.5, -2.0, 3.0, 3.0),  # but what was gained by mistake is taken back
    ],
)
def test_each_side_is_clipped_only_where_it_would_gain(ratio, advantage, value, gradient):
    logp_BT, old_BT = np.full((1, 1), np.log(ratio) - 1), np.full((1, 1), -1.0)
    found_BT, (gradient_BT, *_) = ours(ppo_clip, logp_BT, old_BT, np.full((1, 1), advantage), **CLIPS)
    np.testing.assert_allclose(found_BT, [[value]], rtol=1e-6)
    np.testing.assert_allclose(gradient_BT, [[gradient]], rtol=1e-6)
    one = dict(advantages_B=jnp.array([advantage]), mask_BT=jnp.ones((1, 1), bool))
    found_BT, (gradient_BT, _) = ours(functools.partial(gspo_clip, **one), logp_BT, old_BT, **CLIPS)
    np.testing.assert_allclose(found_BT, [[value]], rtol=1e-6)
    np.testing.assert_allclose(gradient_BT, [[gradient]], rtol=1e-6)


def losses_at_ratio_1(logp_BT):
    """Every policy loss where the policy is the one that sampled."""
    old_BT, advantages_BT = jax.lax.stop_gradient(logp_BT), jnp.float32(ADVANTAGES_BT[:, :1] * np.ones((1, T)))
    return {
        "ppo_clip": ppo_clip(logp_BT, old_BT, advantages_BT, **CLIPS),
        "gspo_clip": gspo_clip(logp_BT, old_BT, advantages_BT[:, 0], jnp.ones((B, T), bool), **CLIPS),
        "cispo": cispo(logp_BT, old_BT, advantages_BT, clip_high=0.3),
    }


@pytest.mark.parametrize("name", ["ppo_clip", "gspo_clip", "cispo"])
def test_at_ratio_1_the_gradient_is_that_of_reinforce(name):
    _, (gradient_BT,) = ours(lambda x_BT: losses_at_ratio_1(x_BT)[name], LOGP_BT)
    np.testing.assert_allclose(gradient_BT, -ADVANTAGES_BT[:, :1] * np.ones((1, T)), rtol=1e-6)


# ---- whole sequences ----


def gspo_tokens(logp_BT, frozen_BT, advantages_B):
    """One token at a time: the sequence's ratio, as ``frozen_BT`` has it, times the token's own p / stop(p)."""
    found_BT = np.zeros((B, T))
    for b, t in zip(*np.nonzero(MASK_BT), strict=True):
        places = np.flatnonzero(MASK_BT[b])
        ratios = [np.exp(frozen_BT[b, place]) / np.exp(OLD_BT[b, place]) for place in places]
        sequence_ratio = np.prod(ratios) ** (1 / len(places))
        found_BT[b, t] = -kept(sequence_ratio * np.exp(logp_BT[b, t]) / np.exp(frozen_BT[b, t]), advantages_B[b])
    return found_BT


def gspo(logp_BT, old_BT, advantages_B, mask_BT=MASK_BT):
    return ours(functools.partial(gspo_clip, mask_BT=jnp.asarray(mask_BT)), logp_BT, old_BT, advantages_B, **CLIPS)


def test_gspo_and_its_token_gradient_match_the_oracle():
    per_token_BT, (gradient_BT, old_grad_BT, _) = gspo(LOGP_BT, OLD_BT, ADVANTAGES_BT[:, 0])
    np.testing.assert_allclose(per_token_BT, gspo_tokens(LOGP_BT, LOGP_BT, ADVANTAGES_BT[:, 0]), rtol=1e-6)
    step = 1e-6
    above_BT, below_BT = (gspo_tokens(LOGP_BT + s, LOGP_BT, ADVANTAGES_BT[:, 0]) for s in (step, -step))
    np.testing.assert_allclose(gradient_BT, (above_BT - below_BT) / (2 * step), atol=1e-5)
    assert not np.any(old_grad_BT)


def test_the_weighed_token_gradient_of_gspo_is_that_of_the_loss_of_whole_sequences():
    def whole(logp_BT):
        log_ratio_BT = jnp.where(MASK_BT, logp_BT - OLD_BT, 0.0)
        ratio_B = jnp.exp(jnp.sum(log_ratio_BT, axis=1) / np.maximum(MASK_BT.sum(axis=1), 1))
        gains_B = jnp.minimum(ratio_B * ADVANTAGES_BT[:, 0], jnp.clip(ratio_B, 0.8, 1.3) * ADVANTAGES_BT[:, 0])
        return -jnp.sum(gains_B * MASK_BT.any(axis=1)) / MASK_BT.any(axis=1).sum()

    def tokens(logp_BT):
        per_token_BT = gspo_clip(
            logp_BT, jnp.float32(OLD_BT), jnp.float32(ADVANTAGES_BT[:, 0]), jnp.asarray(MASK_BT), **CLIPS
        )
        return jnp.sum(sequence_weights(MASK_BT) * per_token_BT)

    (value, gradient_BT), (same, same_BT) = (
        jax.jit(jax.value_and_grad(f))(jnp.float32(LOGP_BT)) for f in (tokens, whole)
    )
    np.testing.assert_allclose(value, same, rtol=1e-6)
    np.testing.assert_allclose(gradient_BT, same_BT, atol=1e-6)
    assert np.any(gradient_BT)


@pytest.mark.parametrize("garbage", [1e4, -1e4, np.inf, np.nan])
def test_whatever_stands_outside_of_the_mask_reaches_nothing_in_gspo(garbage):
    changed = (np.where(MASK_BT, x_BT, garbage) for x_BT in (LOGP_BT, OLD_BT))
    advantages_B = np.where(MASK_BT.any(axis=1), ADVANTAGES_BT[:, 0], garbage)
    per_token_BT, gradients = gspo(*changed, advantages_B)
    same_BT, same_gradients = gspo(LOGP_BT, OLD_BT, ADVANTAGES_BT[:, 0])
    np.testing.assert_array_equal(per_token_BT, same_BT)
    for gradient, same in zip(gradients, same_gradients, strict=True):
        np.testing.assert_array_equal(gradient, same)
    assert not np.any(per_token_BT[~MASK_BT]) and not np.any(gradients[0][~MASK_BT])


# ---- truncated importance weights ----


def test_cispo_and_its_gradients_match_the_oracle_with_its_weight_a_constant():
    per_token_BT, (gradient_BT, old_grad_BT, _) = ours(cispo, LOGP_BT, OLD_BT, ADVANTAGES_BT, clip_high=0.3)
    truncated = 0
    for place in np.ndindex(B, T):
        ratio = np.exp(LOGP_BT[place]) / np.exp(OLD_BT[place])
        weight = ratio if ratio < 1.3 else 1.3
        truncated += weight < ratio
        expected = weight * ADVANTAGES_BT[place]
        np.testing.assert_allclose(per_token_BT[place], -expected * LOGP_BT[place], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradient_BT[place], -expected, rtol=1e-6, atol=1e-6)
    assert 3 < truncated < B * T - 3 and np.all(gradient_BT) and not np.any(old_grad_BT)


# ---- the critic ----


def test_a_clipped_value_learns_only_where_it_would_not_run_away():
    """Old value 0, clip 0.4; the value has moved to 1: towards a return of 0.1 it comes back, from 3 it waits."""
    values, old, returns = np.full((1, 3), 1.0), np.zeros((1, 3)), np.array([[0.1, 3.0, 1.2]])
    per_token, (gradient, *_) = ours(value_clip, values, old, returns, clip=0.4)
    np.testing.assert_allclose(per_token, [[0.9**2 / 2, 2.6**2 / 2, 0.8**2 / 2]], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.9, 0.0, 0.0]], rtol=1e-6)
    unclipped, _ = ours(value_clip, values, old, returns, clip=np.inf)
    np.testing.assert_allclose(unclipped, (values - returns) ** 2 / 2, rtol=1e-5)


# ---- estimates of a KL divergence ----

POLICY_V, REFERENCE_V = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0.1, 0.25, 0.3, 0.15, 0.2])
KL = sum(p * (np.log(p) - np.log(q)) for p, q in zip(POLICY_V, REFERENCE_V, strict=True))


def expected_gradient(estimate):
    """In the logits, of the estimate's mean over the vocabulary with the policy that samples held fixed."""

    def mean(logits_V):
        logp_V = jax.nn.log_softmax(logits_V)
        return jnp.sum(jnp.float32(POLICY_V) * estimate(logp_V[None], jnp.log(jnp.float32(REFERENCE_V))[None])[0])

    return jax.jit(jax.grad(mean))(jnp.log(jnp.float32(POLICY_V)))


def divergence_gradient(define):
    """Central differences in the logits, in float64."""

    def at(logits_V):
        return define(np.exp(logits_V) / np.exp(logits_V).sum())

    return np.array([slope(lambda s, e_V=e_V: at(np.log(POLICY_V) + s * e_V), 0.0) for e_V in np.eye(V)])


def test_over_a_million_samples_k1_and_k3_are_the_divergence_and_k2_half_the_mean_square():
    samples = np.random.default_rng(1).choice(V, size=1_000_000, p=POLICY_V)
    logp, ref_logp = (jnp.log(jnp.float32(x_V[samples]))[None] for x_V in (POLICY_V, REFERENCE_V))
    k1, k2, k3 = (np.mean(estimate(logp, ref_logp), dtype=float) for estimate in KLS)
    np.testing.assert_allclose([k1, k3], KL, rtol=1e-2)
    np.testing.assert_allclose(k2, np.sum(POLICY_V * np.log(POLICY_V / REFERENCE_V) ** 2) / 2, rtol=1e-2)
    exact = [np.sum(POLICY_V * estimate(jnp.log(POLICY_V)[None], jnp.log(REFERENCE_V)[None])[0]) for estimate in KLS]
    np.testing.assert_allclose([exact[0], exact[2]], KL, rtol=1e-5)


def test_as_losses_k1_teaches_nothing_k2_the_reverse_and_k3_the_forward_divergence():
    reverse = divergence_gradient(lambda p_V: np.sum(p_V * np.log(p_V / REFERENCE_V)))
    forward = divergence_gradient(lambda p_V: np.sum(REFERENCE_V * np.log(REFERENCE_V / p_V)))
    for estimate, expected in zip(KLS, (np.zeros(V), reverse, forward), strict=True):
        np.testing.assert_allclose(expected_gradient(estimate), expected, atol=1e-6)
    assert np.abs(forward - reverse).max() > 0.05


def test_k3_is_never_negative_and_keeps_its_digits_near_0():
    for width in (30.0, 1.0, 1e-3, 1e-6):
        difference = np.linspace(-width, width, 200_001, dtype=np.float32)[None]
        assert np.min(kl_k3(jnp.asarray(difference), jnp.zeros_like(difference))) >= 0
    near = np.float64(np.float32([[1e-2, -1e-2, 1e-3]]))
    expected = near**2 / 2 + near**3 / 6 + near**4 / 24
    np.testing.assert_allclose(kl_k3(jnp.zeros((1, 3)), jnp.float32(near)), expected, rtol=1e-3)


@pytest.mark.parametrize("estimate", KLS)
def test_a_policy_that_is_its_reference_has_exactly_no_divergence(estimate):
    np.testing.assert_array_equal(estimate(jnp.float32(LOGP_BT), jnp.float32(LOGP_BT)), np.zeros((B, T)))


# ---- a small policy ----


@pytest.mark.parametrize("name", ["ppo_clip", "gspo_clip", "cispo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_one_step_raises_the_rewarded_token_and_lowers_the_others_or_the_reverse(name, advantage):
    """Five tokens, the fourth sampled: in the logits the gradient is -A (onehot - p)."""
    logits_V = jnp.log(jnp.float32(POLICY_V))

    def loss(logits_V):
        logp_BT = jax.nn.log_softmax(logits_V)[None, 3:4]
        old_BT, advantages_BT = jax.lax.stop_gradient(logp_BT), jnp.full((1, 1), advantage)
        if name == "gspo_clip":
            return gspo_clip(logp_BT, old_BT, advantages_BT[0], jnp.ones((1, 1), bool), **CLIPS)[0, 0]
        if name == "cispo":
            return cispo(logp_BT, old_BT, advantages_BT, clip_high=0.3)[0, 0]
        return ppo_clip(logp_BT, old_BT, advantages_BT, **CLIPS)[0, 0]

    gradient_V = jax.jit(jax.grad(loss))(logits_V)
    logp = lambda s, e_V: np.log(POLICY_V[3] * np.exp(s * e_V[3]) / np.sum(POLICY_V * np.exp(s * e_V)))  # noqa: E731
    expected_V = [-advantage * slope(functools.partial(logp, e_V=e_V), 0.0) for e_V in np.eye(V)]
    np.testing.assert_allclose(gradient_V, expected_V, atol=1e-6)
    step_V = -advantage * gradient_V
    assert step_V[3] > 0 and np.all(np.delete(step_V, 3) < 0)
    assert advantage * (jax.nn.softmax(logits_V - 0.1 * gradient_V)[3] - POLICY_V[3]) > 0


# ---- masked and extreme positions ----

ELEMENTWISE = {name: (loss, arrays, options) for name, (loss, _, arrays, options) in CASES.items()}
ELEMENTWISE["cispo"] = cispo, (LOGP_BT, OLD_BT, ADVANTAGES_BT), dict(clip_high=0.3)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_positions_of_weight_0_are_inert_whatever_finite_garbage_they_hold(name):
    loss, arrays, options = ELEMENTWISE[name]
    weight_BT = token_weights(MASK_BT)
    every = tuple(range(len(arrays)))
    both = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(weight_BT * loss(*x, **options)), argnums=every))
    value, gradients = both(*(jnp.float32(x) for x in arrays))
    for signs in ((1, 1, 1), (1, -1, 1), (-1, 1, 1), (1, -1, -1)):
        garbage = [jnp.float32(np.where(MASK_BT, x, 1e4 * sign)) for x, sign in zip(arrays, signs, strict=False)]
        changed, same = both(*garbage)
        assert value == changed and not np.any(np.stack(same)[:, ~MASK_BT])
        np.testing.assert_array_equal(gradients, same)


@pytest.mark.parametrize("garbage", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_masked_positions_that_are_not_finite_are_inert_where_they_are_deleted_first(name, garbage):
    """As objectives do it: zeros in place of what is masked, before the loss and not after it."""
    loss, arrays, options = ELEMENTWISE[name]

    def total(*arrays):
        arrays = (jnp.where(MASK_BT, x, 0.0) for x in arrays)
        return jnp.sum(token_weights(MASK_BT) * loss(*arrays, **options))

    both = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(arrays)))))
    value, gradients = both(*(jnp.float32(x) for x in arrays))
    changed, same = both(*(jnp.float32(np.where(MASK_BT, x, garbage)) for x in arrays))
    assert value == changed
    np.testing.assert_array_equal(gradients, same)


def test_impossible_and_certain_tokens_have_finite_losses_that_push_the_right_way():
    logp, old, advantages = (x.reshape(1, -1) for x in np.meshgrid([0.0, -5.0, -1e4], [0.0, -5.0, -1e4], [1.0, -1.0]))
    for loss, options in ((ppo_clip, CLIPS), (cispo, dict(clip_high=0.3))):
        per_token, (gradient, *_) = ours(loss, logp, old, advantages, **options)
        assert np.all(np.isfinite(per_token)) and np.all(np.isfinite(gradient))
        assert np.all(gradient * advantages <= 0)
    for estimate in KLS:
        value, gradients = ours(estimate, logp, old)
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradients))
    assert np.all((gradients[0] < 0) == (logp < old)), "k3 raises what the reference finds likelier"


def test_a_token_that_rose_by_mistake_is_pushed_down_however_far_it_rose():
    rise = np.array([[1.0, 15.0, 40.0, 1e4]])
    _, (gradient, *_) = ours(ppo_clip, 0 * rise, -rise, np.full((1, 4), -1.0), **CLIPS)
    np.testing.assert_allclose(gradient, np.exp(np.minimum(rise, 20.0)), rtol=1e-5)


# ---- bad input ----


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(clip_low=0.0), r"clip_low=0.0 must be in \(0, 1\]: ratios are kept above 1 - clip_low; 1 clips none"),
        (dict(clip_low=1.5), r"clip_low=1.5 must be in \(0, 1\]"),
        (dict(clip_high=0.0), "clip_high=0.0 must be positive: at 0 nothing could move; infinity clips nothing"),
    ],
)
def test_clips_outside_of_their_range_are_refused(change, message):
    arrays = LOGP_BT, OLD_BT, ADVANTAGES_BT
    with pytest.raises(ValueError, match=message):
        ppo_clip(*arrays, **CLIPS | change)
    with pytest.raises(ValueError, match=message):
        gspo_clip(*arrays[:2], ADVANTAGES_BT[:, 0], MASK_BT, **CLIPS | change)


def test_a_clip_of_0_is_refused():
    with pytest.raises(ValueError, match="clip_high=-0.1 must be positive"):
        cispo(LOGP_BT, OLD_BT, ADVANTAGES_BT, clip_high=-0.1)
    with pytest.raises(ValueError, match="clip=0 must be positive"):
        value_clip(LOGP_BT, OLD_BT, ADVANTAGES_BT, clip=0)
