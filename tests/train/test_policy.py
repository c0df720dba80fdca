import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import rl
from jaxllm.losses import gspo_clip
from jaxllm.rl.layout import Sample, Shape, layout
from jaxllm.train import policy as policies
from jaxllm.train.policy import PolicyConfig, adapted, assess, credit, policy
from jaxllm.train.update import init_state, update

DEFAULTS = dict(
    advantage="group", ratio="token", surrogate="clip", weights="token", clip_low=0.2, clip_high=0.3,
    importance_cap=1.1, kl="k3", kl_loss=0.0, kl_reward=0.0, kl_target=0.0, kl_horizon=100, entropy=0.0, whiten=False,
    gamma=1.0, lam=0.95, value_weight=0.5, value_clip=0.2, epochs=1, minibatches=1,
)  # fmt: skip
LENGTHS = (4, 2, 5, 1)
CHOICES = {
    "grpo": dict(kl_loss=0.3, weights="sequence"),
    "dr_grpo": dict(weights="constant"),
    "dapo": dict(clip_high=0.5),
    "gspo": dict(ratio="sequence", clip_low=0.05, clip_high=0.04, weights="sequence"),
    "cispo": dict(surrogate="cispo"),
    "reinforce": dict(surrogate="reinforce", entropy=0.1, importance_cap=0.0),
    "k2": dict(kl="k2", kl_loss=0.2),
    "sequence_cispo": dict(ratio="sequence", surrogate="cispo"),
}


def config(**changes):
    return PolicyConfig(**(DEFAULTS | changes))


def samples(vocab=40, tool=True):
    """Four completions of two prompts; of the third, two tokens are a tool's."""
    draw, found = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        sampled = np.ones(length, bool)
        sampled[1:3] = not (tool and number == 2)
        logp = np.where(sampled, -draw.uniform(2, 4, length), 0).astype(np.float32)
        prompt = (2, 7, 8) if number < 2 else (2, 9)
        found.append(Sample(prompt, draw.integers(5, vocab, length).astype(np.int32), sampled, logp))
    return found


def given(weights="token"):
    """(samples, mask_NW, columns [N, W]) with garbage of size 1e4 where nothing was sampled."""
    drawn, draw, width = samples(), np.random.default_rng(1), max(LENGTHS)
    mask_NW = np.zeros((len(LENGTHS), width), bool)
    for mask_W, each in zip(mask_NW, drawn, strict=True):
        mask_W[: len(each.sampled)] = each.sampled
    sampled_NW = np.full(mask_NW.shape, -1e4, np.float32)
    sampled_NW[mask_NW] = np.concatenate([each.logp[each.sampled] for each in drawn])
    near_NW = sampled_NW + draw.normal(0, 0.3, mask_NW.shape)
    columns = {
        "sampled_logp_BT": sampled_NW,
        "old_logp_BT": near_NW,
        "ref_logp_BT": near_NW + draw.normal(0, 0.5, mask_NW.shape),
        "advantage_BT": np.where(mask_NW, draw.normal(0, 1, mask_NW.shape), 1e4),
        "value_BT": np.where(mask_NW, draw.normal(0, 1, mask_NW.shape), 1e4),
        "return_BT": np.where(mask_NW, draw.normal(0, 1, mask_NW.shape), -1e4),
    }
    columns["weight_BT"] = np.asarray(policies.WEIGHTS[weights](jnp.asarray(mask_NW)))
    return drawn, mask_NW, {name: x_NW.astype(np.float32) for name, x_NW in columns.items()}


def of_logp(each, logp_NW, mask_NW, c, entropy_NW=0.0):
    """The loss of completions, one per row, spelled out in NumPy's words from the papers' formulas."""
    old_NW, advantage_NW = each["old_logp_BT"], each["advantage_BT"]
    ratio_NW = jnp.exp(logp_NW - old_NW)
    if c.ratio == "sequence":
        count_N1 = mask_NW.sum(axis=1, keepdims=True)
        mean_N1 = jnp.where(mask_NW, logp_NW - old_NW, 0).sum(axis=1, keepdims=True) / count_N1
        ratio_NW = jax.lax.stop_gradient(jnp.exp(mean_N1)) * jnp.exp(logp_NW - jax.lax.stop_gradient(logp_NW))
    if c.surrogate == "clip":
        clipped_NW = jnp.clip(ratio_NW, 1 - c.clip_low, 1 + c.clip_high)
        loss_NW = -jnp.minimum(ratio_NW * advantage_NW, clipped_NW * advantage_NW)
    elif c.surrogate == "cispo":
        loss_NW = -jax.lax.stop_gradient(jnp.minimum(ratio_NW, 1 + c.clip_high)) * advantage_NW * logp_NW
    else:
        loss_NW = -advantage_NW * logp_NW
    if c.importance_cap:
        loss_NW *= jnp.minimum(jnp.exp(old_NW - each["sampled_logp_BT"]), c.importance_cap)
    difference_NW = logp_NW - each["ref_logp_BT"]
    kl_NW = {"k1": difference_NW, "k2": difference_NW**2 / 2, "k3": jnp.exp(-difference_NW) - 1 + difference_NW}[c.kl]
    loss_NW += c.kl_loss * kl_NW - c.entropy * entropy_NW
    return jnp.sum(jnp.where(mask_NW, each["weight_BT"] * loss_NW, 0.0))


class Told:
    """A model whose log-probabilities are its parameters: what the objective does with them is all that is left."""

    @staticmethod
    def hidden(params, tokens_BT, **_):
        return tokens_BT[..., None]

    @staticmethod
    def score(params, hidden_BTD, targets_BT, *, temperature, mask_BT):
        return params["logp_BT"], None, 2.0 * params["logp_BT"]

    config = None


@pytest.mark.parametrize("name", CHOICES)
def test_each_composition_is_its_formula_in_value_and_gradient(name):
    c = config(**CHOICES[name])
    drawn, mask_NW, columns = given(c.weights)
    laid, lengths = layout(drawn, Shape(1, 4, 16)), list(LENGTHS)
    # A 1e4 at masked places: what they hold must not matter, and NaN is no less inert than a number.
    batch = {key: x[0] for key, x in (laid.batch | laid.lay(columns, lengths)).items()}
    batch = {key: np.where(batch["mask_BT"], x, np.nan) if x.dtype == np.float32 else x for key, x in batch.items()}
    logp_NW = np.where(mask_NW, columns["old_logp_BT"] + np.random.default_rng(2).normal(0, 0.4, mask_NW.shape), 1e4)
    logp_BT = laid.lay({"x": logp_NW.astype(np.float32)}, lengths)["x"][0]

    loss, grads = jax.value_and_grad(lambda p: policy(Told, c)(p, batch)[0])({"logp_BT": jnp.asarray(logp_BT)})
    clean = {key: np.where(mask_NW, x, 0.0) for key, x in columns.items()}

    def wanted(logp_NW):
        return of_logp(clean, logp_NW, mask_NW, c, 2.0 * logp_NW)

    wanted_loss, wanted_NW = jax.value_and_grad(wanted)(jnp.where(mask_NW, logp_NW, 0.0))
    got_NW = laid.read(np.asarray(grads["logp_BT"])[None], lengths, mask_NW.shape[1])
    np.testing.assert_allclose(got_NW, wanted_NW, rtol=2e-5, atol=1e-6)
    assert np.all(np.asarray(grads["logp_BT"])[~batch["mask_BT"]] == 0)
    if c.surrogate == "clip":  # the others' value is shifted by what has no gradient
        np.testing.assert_allclose(loss, wanted_loss, rtol=2e-5)


def test_weights_are_of_tokens_of_sequences_or_of_a_constant_length():
    mask_NW = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    wanted = {"token": (1 / 4, 1 / 4), "sequence": (1 / 6, 1 / 2), "constant": (1 / 8, 1 / 8)}
    for name, each in wanted.items():
        found_NW = policies.WEIGHTS[name](mask_NW)
        np.testing.assert_allclose(found_NW, np.where(mask_NW, np.array(each)[:, None], 0), rtol=1e-6, err_msg=name)
    assert set(wanted) == set(policies.WEIGHTS)


def test_the_ratio_of_a_sequence_is_gspo_of_it_alone():
    c = config(**CHOICES["gspo"])
    drawn, mask_NW, columns = given("sequence")
    advantage_N = np.array([1.0, -1.0, 0.5, -2.0], np.float32)
    columns["advantage_BT"] = np.broadcast_to(advantage_N[:, None], mask_NW.shape).copy()
    laid, lengths = layout(drawn, Shape(1, 4, 16)), list(LENGTHS)
    batch = {key: x[0] for key, x in (laid.batch | laid.lay(columns, lengths)).items()}
    logp_NW = (columns["sampled_logp_BT"] + 0.01).astype(np.float32)
    params = {"logp_BT": laid.lay({"x": logp_NW}, lengths)["x"][0]}
    plain = dataclasses.replace(c, importance_cap=0.0)
    how = dict(clip_low=c.clip_low, clip_high=c.clip_high)
    per_token_NW = gspo_clip(logp_NW, columns["old_logp_BT"], advantage_N, mask_NW, **how)
    loss, _ = policy(Told, plain)(params, batch)
    np.testing.assert_allclose(loss, np.sum(columns["weight_BT"] * per_token_NW), rtol=1e-5)


def full(**changes):
    """All of PPO at once."""
    return config(advantage="gae", kl_loss=0.1, entropy=0.05, epochs=2, **changes)


@pytest.fixture(scope="module")
def critic(tiny, built):
    model, params = built(tiny(num_layers=1, scalar_head=True))
    return model, jax.tree.map(jnp.asarray, params)


def batches(c, shape, order=None, tool=True):
    drawn, mask_NW, columns = given(c.weights)
    order = np.arange(len(drawn)) if order is None else order
    laid, lengths = layout([drawn[n] for n in order], shape), [LENGTHS[n] for n in order]
    return laid.batch | laid.lay({name: x_NW[order] for name, x_NW in columns.items()}, lengths)


def test_the_update_does_not_depend_on_how_completions_lie_in_rows(critic):
    model, params = critic
    # AdamW makes of a tiny gradient's rounding a share of its rate, which is therefore one that people take.
    c, optimizer = full(), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    loss = policy(model, c, temperature=0.7)
    step = jax.jit(lambda s, b, filled: update(s, b, loss=loss, optimizer=optimizer, filled=filled))

    def one(batch, filled=1):
        state, measured = step(init_state(params, optimizer), batch, filled)
        return state.params, {name: getattr(x, "value", x) for name, x in measured.items()}

    wanted, measured = one(batches(c, Shape(1, 4, 16)))
    assert float(measured["grad_norm"]) > 0
    others = {
        "a row each, another order": one(batches(c, Shape(1, 4, 16), order=[2, 0, 3, 1])),
        "micro-batches, the last one empty": one(batches(c, Shape(4, 1, 16)), filled=2),
    }
    for name, (found, told) in others.items():
        assert told.keys() == measured.keys()
        for key in measured:
            np.testing.assert_allclose(told[key], measured[key], rtol=2e-5, atol=1e-6, err_msg=f"{name}: {key}")
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


def test_a_critic_of_its_own_learns_beside_the_policy_and_not_in_it(tiny, built):
    model, params = built(tiny(num_layers=1, scalar_head=True, critic=True))
    c = dataclasses.replace(full(), kl_loss=0.0, entropy=0.0)
    batch = {name: x[0] for name, x in batches(c, Shape(1, 4, 16)).items()} | {"advantage_BT": np.zeros((4, 16), "f")}
    grads = jax.jit(jax.grad(lambda p: policy(model, c)(p, batch)[0]))(jax.tree.map(jnp.asarray, params))
    norms = {name: float(sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(grads[name]))) for name in grads}
    assert norms["critic"] > 1e-3 and all(norm == 0 for name, norm in norms.items() if name != "critic")


def test_what_is_assessed_is_the_policy_the_critic_and_the_reference(critic):
    model, params = critic
    c, batch = full(), batches(full(), Shape(1, 4, 16))
    batch = {name: x[0] for name, x in batch.items()}
    ref_params = jax.tree.map(lambda x: 1.1 * x, params)
    found = jax.jit(assess(model, model, c, temperature=0.7))(params, batch, ref_params=ref_params)
    assert set(found) == {"old_logp_BT", "value_BT", "ref_logp_BT"}
    again = batch | {name: np.asarray(x) for name, x in found.items()} | {"return_BT": found["value_BT"] + 1.0}
    again["sampled_logp_BT"] = again["old_logp_BT"]
    told = jax.jit(policy(model, c, temperature=0.7))(params, again)[1]
    value = {name: float(ratio.value) for name, ratio in told.items()}
    # Ratio 1, nothing clipped, no mismatch, and a critic that is off by 1 (C13).
    assert abs(value["ratio"] - 1) < 1e-5 and value["clipped_high"] == value["clipped_low"] == 0
    assert value["rollout_train_logp_diff"] < 1e-6 and value["value_loss"] == pytest.approx(0.5, abs=1e-5)
    assert value["kl_per_token"] > 1e-4
    np.testing.assert_array_equal(np.asarray(found["value_BT"])[~batch["mask_BT"]], 0)
    only = assess(model, None, config(), temperature=0.7)(params, batch)
    assert only == {}


def test_on_policy_the_loss_is_0_and_its_gradient_reinforces(critic):
    model, params = critic
    c = config(weights="sequence", importance_cap=0.0)
    drawn, mask_NW, columns = given("sequence")
    rewards_PC = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    zeros_NW = np.zeros(mask_NW.shape, np.float32)
    columns["advantage_BT"], _ = credit(c, 0.0, rewards_PC, mask_NW, zeros_NW, zeros_NW)
    laid, lengths = layout(drawn, Shape(1, 4, 16)), list(LENGTHS)
    batch = {name: x[0] for name, x in (laid.batch | laid.lay(columns, lengths)).items()}
    del batch["old_logp_BT"], batch["ref_logp_BT"]
    # The sampler is the trainer: its log-probabilities are those that the model has now.
    logp = jax.jit(lambda p: model.score(p, policies.hidden_states(model, p, batch), batch["targets_BT"])[0])
    batch["sampled_logp_BT"] = np.asarray(logp(params))
    objective = jax.jit(jax.value_and_grad(lambda p: policy(model, c)(p, batch)[0]))
    loss, grads = objective(params)
    assert abs(float(loss)) < 1e-6
    after = np.asarray(logp(jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads))) - np.asarray(logp(params))
    gain_N = laid.read(after[None], lengths, mask_NW.shape[1]).sum(axis=1, where=mask_NW)
    assert np.all(gain_N[[0, 3]] > 0) and np.all(gain_N[[1, 2]] < 0)


def test_credit_of_completions_lies_on_every_sampled_token_and_the_kl_is_taken_off():
    rewards_PC = np.array([[1.0, 0.0, 2.0]], np.float32)
    mask_NW = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], bool)
    log_ratio_NW = np.where(mask_NW, np.array([[0.1, 0.2, 9], [0.3, 9, -0.1], [0.0, 0.4, 0.5]]), 7.0).astype(np.float32)
    values_NW = np.zeros((3, 3), np.float32)
    whole_C = [1.0 - 0.5 * 0.3, 0.0 - 0.5 * 0.2, 2.0 - 0.5 * 0.9]
    wanted = {
        "group": (whole_C - np.mean(whole_C)) / np.std(whole_C, ddof=1),
        "group_mean": whole_C - np.mean(whole_C),
        "batch": whole_C - np.mean(whole_C),
        "leave_one_out": [whole_C[n] - np.mean(np.delete(whole_C, n)) for n in range(3)],
    }
    for name, advantages_C in wanted.items():
        c = config(advantage=name, kl_reward=0.5)
        found_NW, _ = credit(c, 0.5, rewards_PC, mask_NW, log_ratio_NW, values_NW)
        np.testing.assert_allclose(found_NW, np.where(mask_NW, np.array(advantages_C)[:, None], 0), atol=1e-5)
    # Token by token it is what the divergence leaves, the reward at the last sampled token: distillation on-policy.
    wanted_NW = np.where(mask_NW, -0.5 * log_ratio_NW, 0)
    wanted_NW[0, 1] += 1
    wanted_NW[2, 2] += 2
    for kl in policies.KLS:
        found_NW, _ = credit(config(advantage="token", kl=kl), 0.5, rewards_PC, mask_NW, log_ratio_NW, values_NW)
        np.testing.assert_allclose(found_NW, wanted_NW, atol=1e-6)


@pytest.mark.parametrize("kl", policies.KLS)
def test_the_kl_in_the_rewards_has_the_gradient_of_the_divergence_whatever_its_estimator_in_the_loss(kl):
    """Every token of a vocabulary of five once, weighed by its probability: the mean without noise."""
    draw = np.random.default_rng(0)
    logits_V, ref_V = (jax.nn.log_softmax(jnp.float32(draw.normal(size=5))) for _ in range(2))
    ratio_NW, ones_NW = np.asarray(logits_V - ref_V)[:, None], np.ones((5, 1), bool)
    credited_NW, _ = credit(config(advantage="token", kl=kl), 1.0, np.zeros((1, 5), "f"), ones_NW, ratio_NW, ratio_NW)
    advantage_V = jnp.asarray(credited_NW)[:, 0]
    found_V = jax.grad(lambda x_V: -jnp.sum(jnp.exp(logits_V) * advantage_V * jax.nn.log_softmax(x_V)))(logits_V)
    wanted_V = jax.grad(lambda x_V: jnp.sum(jax.nn.softmax(x_V) * (jax.nn.log_softmax(x_V) - ref_V)))(logits_V)
    np.testing.assert_allclose(found_V, wanted_V, atol=1e-6)


def test_the_baseline_of_a_batch_is_its_mean_and_that_of_a_group_its_own():
    rewards_PC, mask_NW = np.array([[1.0, 0.0], [5.0, 4.0]], np.float32), np.ones((4, 2), bool)
    zeros_NW = np.zeros((4, 2), np.float32)
    of = {
        name: credit(config(advantage=name), 0.0, rewards_PC, mask_NW, zeros_NW, zeros_NW)[0][:, 0]
        for name in ("batch", "group_mean")
    }
    np.testing.assert_allclose(of["batch"], [-1.5, -2.5, 2.5, 1.5])
    np.testing.assert_allclose(of["group_mean"], [0.5, -0.5, 0.5, -0.5])


def test_a_critic_is_credited_by_gae_over_sampled_tokens_and_whitened():
    c = config(advantage="gae", gamma=1.0, lam=0.95)
    rewards_PC, mask_NW = np.array([[1.0]], np.float32), np.array([[True, True, False]])
    values_NW, log_ratio_NW = np.array([[0.0, 0.0, 100.0]], np.float32), np.zeros((1, 3), np.float32)
    found_NW, returns_NW = credit(c, 0.0, rewards_PC, mask_NW, log_ratio_NW, values_NW)
    np.testing.assert_allclose(found_NW, [[0.95, 1.0, 0]], atol=1e-6)  # C11
    np.testing.assert_allclose(returns_NW, [[0.95, 1.0, 0]], atol=1e-6)
    white_NW, kept_NW = credit(dataclasses.replace(c, whiten=True), 0.0, rewards_PC, mask_NW, log_ratio_NW, values_NW)
    np.testing.assert_allclose(white_NW, [[-1, 1, 0]], atol=1e-2)
    np.testing.assert_array_equal(kept_NW, returns_NW)


def test_a_reward_that_is_not_finite_is_none_and_equal_ones_teach_nothing():
    rewards_PC, mask_NW = np.array([[1.0, np.nan, 0.0], [0.3, 0.3, 0.3]], np.float32), np.ones((6, 2), bool)
    zeros_NW = np.zeros((6, 2), np.float32)
    mask_NW[1] = False  # the caller's
    found_NW, _ = credit(config(advantage="group_mean"), 0.0, rewards_PC, mask_NW, zeros_NW, zeros_NW)
    np.testing.assert_allclose(found_NW[:3], [[0.5, 0.5], [0, 0], [-0.5, -0.5]])
    assert np.all(np.asarray(found_NW[3:]) == 0)


class Arms:
    """A policy of ten arms, each a token, and a critic that knows one number."""

    config = types.SimpleNamespace(critic=False)

    @staticmethod
    def hidden(params, tokens_BT, **_):
        return jnp.zeros((*tokens_BT.shape, 1))

    @staticmethod
    def score(params, hidden_BTD, targets_BT, *, temperature, mask_BT):
        logp_V = jax.nn.log_softmax(params["arms"] / temperature)
        entropy = -jnp.sum(jnp.exp(logp_V) * logp_V)
        return logp_V[targets_BT], None, jnp.broadcast_to(entropy, targets_BT.shape)

    @staticmethod
    def scalars(params, hidden_BTD):
        return jnp.broadcast_to(params["value"], hidden_BTD.shape[:2])


@pytest.mark.parametrize("name", rl.ALGORITHMS)
def test_every_algorithm_finds_the_best_of_ten_arms(name):
    """From chance, 0.1, to more than 0.9 on three of three seeds (C23)."""
    B, C, best = 32, 8, 7
    c = config(**rl.ALGORITHMS[name])
    objective, optimizer = policy(Arms, c), optax.adam(0.1)
    ones, width = np.ones((B, 1), bool), np.ones((B, 1), np.int32)
    step = jax.jit(lambda state, batch: update(state, batch, loss=objective, optimizer=optimizer)[0])
    judge, chances = jax.jit(functools.partial(credit, c)), []
    for seed in range(3):
        state = init_state({"arms": jnp.zeros(10), "value": jnp.zeros(())}, optimizer)
        for turn in range(40):
            logp_V = np.asarray(jax.nn.log_softmax(state.params["arms"]), np.float64)
            arms_B = np.random.default_rng([seed, turn]).choice(10, B, p=np.exp(logp_V) / np.exp(logp_V).sum())
            logp_BT = logp_V[arms_B][:, None].astype(np.float32)
            value_BT = np.full((B, 1), state.params["value"], np.float32)
            rewards_PC = (arms_B == best).astype(np.float32).reshape(-1, C)
            given = (0.0, rewards_PC, ones, np.zeros_like(logp_BT), value_BT)
            advantage_BT, return_BT = map(np.asarray, judge(*given))
            batch = {"tokens_BT": width, "targets_BT": arms_B[:, None], "positions_BT": width, "segments_BT": width}
            batch |= {"mask_BT": ones, "sampled_logp_BT": logp_BT, "old_logp_BT": logp_BT, "ref_logp_BT": logp_BT}
            batch |= {"advantage_BT": advantage_BT, "return_BT": return_BT, "value_BT": value_BT}
            batch["weight_BT"] = np.asarray(policies.WEIGHTS[c.weights](jnp.asarray(ones)))
            for _ in range(c.updates):
                state = step(state, {key: x[None] for key, x in batch.items()})
        chances.append(float(jax.nn.softmax(state.params["arms"])[best]))
    assert min(chances) > 0.9, chances


def test_the_coefficient_of_the_kl_follows_its_target():
    assert adapted(0.1, 6.0, target=6.0, horizon=100, count=10) == pytest.approx(0.1)
    assert adapted(0.1, 60.0, target=6.0, horizon=100, count=10) == pytest.approx(0.1 * 1.02)
    assert adapted(0.1, 0.0, target=6.0, horizon=100, count=10) == pytest.approx(0.1 * 0.98)
    assert adapted(0.1, 6.6, target=6.0, horizon=100, count=10) == pytest.approx(0.1 * 1.01)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(advantage="groups"), "policy.advantage='groups' is unknown; did you mean 'group'"),
        (dict(ratio="word"), "policy.ratio='word' is unknown"),
        (dict(kl="k4"), "policy.kl='k4' is unknown; did you mean 'k"),
        (dict(clip_low=0.0), "policy.clip_low=0.0 must be in"),
        (dict(kl_loss=-1.0), "policy.kl_loss=-1.0 must not be negative"),
        (dict(epochs=0), "policy.epochs=0 must be at least 1"),
        (dict(gamma=1.5), "policy.gamma=1.5 must be in"),
        (dict(kl_target=6.0), "policy.kl_target=6.0 adapts kl_reward=0"),
        (dict(entropy=float("nan")), "policy.entropy=nan must not be negative"),
        (dict(kl="k1", kl_loss=0.2), "policy.kl='k1' with kl_loss=0.2 teaches nothing.*'k2' or 'k3', or .* kl_reward"),
        (dict(surrogate="reinforce", epochs=4), "policy.epochs=4 learns from an older .* set epochs=1, or surrogate="),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)
