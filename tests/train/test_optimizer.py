import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from jaxllm import sharding
from jaxllm.configure import section
from jaxllm.train.optimizer import (
    SPIKE_HISTORY,
    AverageState,
    OptimizerConfig,
    SpikeState,
    find_state,
    optimizer,
    schedule,
)

RULES = (
    (r"blocks/attention/query/kernel", "ldnh"),
    (r"blocks/attention/output/kernel", "lnhd"),
    (r"blocks/mlp/down/kernel", "lfd"),
    (r"blocks/mlp/down/bias", "l."),
    (r"embedding/table", "vd"),
    (r"final_norm/scale", "."),
)
SHAPES = {
    "blocks": {
        "attention": {"query": {"kernel": (2, 8, 4, 6)}, "output": {"kernel": (2, 4, 6, 8)}},
        "mlp": {"down": {"kernel": (2, 12, 8), "bias": (2, 8)}},
    },
    "embedding": {"table": (10, 8)},
    "final_norm": {"scale": (8,)},
}


def config(**changes):
    plain = dict(schedule="constant", warmup=0, clip_norm=0.0, weight_decay=0.0)
    return section(OptimizerConfig, common.get_config().optimizer.to_dict() | plain | changes)


def drawn(seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(draw.normal(size=shape)), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


@functools.cache
def chain(**changes):
    made = config(**changes)
    return optimizer(made, schedule(made, steps=10, tokens_per_step=1), RULES)


@functools.cache
def stepper(**changes):
    @jax.jit
    def step(grads, state, params, value):
        updates, state = chain(**changes).update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step


def stepped(params, gradients, values=None, **changes):
    """[(params, state) after each gradient]."""
    state, found = chain(**changes).init(params), []
    for index, grads in enumerate(gradients):
        params, state = stepper(**changes)(grads, state, params, jnp.float32(values[index] if values else 1.0))
        found.append((params, state))
    return found


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.float64(x)
        for path, x in jax.tree.leaves_with_path(tree)
    }


# ---- schedules ----


def rates(steps=10, tokens_per_step=7, **changes):
    rate = schedule(config(learning_rate=2.0, **changes), steps=steps, tokens_per_step=tokens_per_step)
    return [float(rate(step)) for step in range(steps)]


def test_cosine_falls_from_the_peak_to_its_final_fraction_at_the_last_step():
    found = rates(schedule="cosine", warmup=4, final_fraction=0.1)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == pytest.approx([0.2 + 1.8 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(1, 7)], abs=1e-6)
    assert found[-1] == pytest.approx(0.2)


def test_linear_falls_in_equal_steps():
    assert rates(schedule="linear", warmup=0, final_fraction=0.5, steps=4) == pytest.approx([1.75, 1.5, 1.25, 1.0])


def test_wsd_stays_at_the_peak_and_decays_at_the_end():
    found = rates(schedule="wsd", warmup=2, final_fraction=0.0, decay_fraction=0.3)
    assert found == pytest.approx([1.0] + [2.0] * 6 + [4 / 3, 2 / 3, 0.0], abs=1e-6)


def test_a_constant_rate_stays():
    assert rates(schedule="constant", warmup=2) == pytest.approx([1.0] + [2.0] * 9)


def test_warm_up_counts_in_tokens_rounded_up_to_steps():
    assert rates(warmup=15, warmup_unit="tokens")[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert rates(warmup=3, warmup_unit="steps")[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_the_first_update_moves_and_no_rate_exceeds_the_peak(name):
    for warmup in (0, 1, 5):
        found = rates(schedule=name, warmup=warmup, final_fraction=0.1)
        assert found[0] > 0 and max(found) <= 2.0 + 1e-6


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.warmup of 10 steps leaves nothing of loop\.steps=10; lower it"):
        rates(warmup=10)
    with pytest.raises(ValueError, match=r"optimizer\.warmup of 10 steps leaves nothing"):
        rates(warmup=64, warmup_unit="tokens")


# ---- AdamW, clipping, masks ----

ADAMW = dict(learning_rate=0.1, weight_decay=0.2, clip_norm=1.5, b1=0.8, b2=0.9, eps=1e-3, schedule="linear", warmup=2)


def numpy_adamw(params, gradients, rates, *, decays, weight_decay, clip_norm, b1, b2, eps):
    """Loshchilov & Hutter's algorithm 2 with bias correction, all in float64."""
    m, v = ({name: 0 * x for name, x in params.items()} for _ in range(2))
    for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        length = math.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = min(1, clip_norm / length) if clip_norm else 1
        for name in params:
            g = grads[name] * factor
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            direction = (m[name] / (1 - b1**t)) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            decay = weight_decay * params[name] if decays(name) else 0
            params[name] = params[name] - rate * (direction + decay)
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.5, 1e6])
def test_adamw_with_clipping_and_decay_matches_numpy_for_several_steps(clip_norm):
    gradients = [drawn(seed) for seed in range(1, 5)]
    found = stepped(drawn(0), gradients, **(ADAMW | {"clip_norm": clip_norm}))[-1][0]
    numbers = {key: ADAMW[key] for key in ("weight_decay", "b1", "b2", "eps")}
    rate = schedule(config(**ADAMW), steps=10, tokens_per_step=1)
    expected = numpy_adamw(
        flat(drawn(0)), [flat(g) for g in gradients], [float(rate(step)) for step in range(4)], clip_norm=clip_norm,
        decays=lambda name: name.endswith(("kernel", "table")), **numbers,
    )  # fmt: skip
    for name, x in flat(found).items():
        np.testing.assert_allclose(x, expected[name], atol=2e-6, err_msg=name)


def test_weight_decay_follows_its_mask_and_the_rate():
    zero = jax.tree.map(np.zeros_like, drawn(0))
    found = flat(stepped(drawn(0), [zero], learning_rate=0.5, weight_decay=0.1, decay_mask="table")[0][0])
    for name, x in flat(drawn(0)).items():
        np.testing.assert_allclose(found[name], x * (0.95 if name == "embedding/table" else 1.0), rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_frozen_leaves_stay_bit_for_bit_and_have_no_moments(name):
    changes = dict(name=name, freeze_mask="embedding|final_norm|bias", weight_decay=0.1, clip_norm=1.0)
    params = drawn(0)
    found, state = stepped(params, [drawn(1), drawn(2)], **changes)[-1]
    for leaf, x in flat(found).items():
        moved = np.any(x != flat(params)[leaf])
        assert (
            moved == leaf.startswith("blocks") and leaf.endswith("kernel") or not moved and not leaf.endswith("kernel")
        ), leaf
    assert not any(np.shape(leaf) in ((10, 8), (8,), (2, 8)) for leaf in jax.tree.leaves(state))


# ---- spikes ----

LOSSES = [1.0, 1.1, 0.9, 1.05]


@pytest.fixture
def short_history(monkeypatch):
    monkeypatch.setitem(optimizer.__globals__, "SPIKE_HISTORY", 4)
    chain.cache_clear()
    stepper.cache_clear()
    yield
    chain.cache_clear()
    stepper.cache_clear()


def scaled(factor):
    return jax.tree.map(lambda x: factor * x, drawn(1))


SPIKES = dict(spike_deviations=4.0, clip_norm=1.0, learning_rate=0.1)


def spiking(losses, factors, **changes):
    return stepped(drawn(0), [scaled(factor) for factor in factors], losses, **(SPIKES | changes))


def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_the_history_is_that_of_the_paper():
    assert SPIKE_HISTORY == 128


@pytest.mark.parametrize("spike", [(50.0, 1.0), (1.0, 50.0)], ids=["loss", "gradient norm"])
def test_a_spike_changes_nothing_but_its_counter_and_the_history(short_history, spike):
    found = spiking(LOSSES + [spike[0], 1.0], [1.0, 1.1, 0.9, 1.0, spike[1], 1.0], ema_decay=0.9)
    skipped = [int(find_state(SpikeState, state).skipped) for _, state in found]
    assert skipped == [0, 0, 0, 0, 1, 1]
    (before, state_before), (after, state_after), (later, _) = found[3:]
    assert same(before, after) and not same(after, later)
    ours, theirs = (find_state(SpikeState, state) for state in (state_before, state_after))
    assert same(ours.inner, theirs.inner) and find_state(AverageState, theirs.inner)


def test_no_update_is_skipped_before_the_history_is_full(short_history):
    found = spiking(LOSSES[:3] + [50.0], [1.0, 1.1, 0.9, 1.0])
    assert int(find_state(SpikeState, found[-1][1]).skipped) == 0


def test_a_small_loss_is_no_spike_and_deviations_set_the_bar(short_history):
    mean, deviation = np.mean(LOSSES), np.std(LOSSES)
    for value, skipped in ((0.0, 0), (mean + 3.9 * deviation, 0), (mean + 4.1 * deviation, 1)):
        found = spiking(LOSSES + [value], [1.0, 1.1, 0.9, 1.0, 1.0])
        assert int(find_state(SpikeState, found[-1][1]).skipped) == skipped


def test_the_history_is_of_the_newest_finite_updates_those_skipped_as_high_as_the_bar(short_history):
    found = spiking(LOSSES + [50.0, np.inf, 1.2, np.nan, 0.8], [1.0] * 9, spike_deviations=9.0)
    history = np.asarray(find_state(SpikeState, found[-1][1]).history)
    bar = np.mean(LOSSES) + 9.0 * np.std(LOSSES)
    np.testing.assert_allclose(sorted(history[0]), sorted([1.05, bar, 1.2, 0.8]), rtol=1e-5)
    assert int(find_state(SpikeState, found[-1][1]).skipped) == 3
    norm = math.sqrt(sum((x**2).sum() for x in flat(drawn(1)).values()))
    np.testing.assert_allclose(history[1], norm, rtol=1e-5)


def test_a_level_that_lasts_is_taken_for_what_it_is(short_history):
    found = spiking(LOSSES + [50.0] * 14, [1.0] * 18)
    skipped = [int(find_state(SpikeState, state).skipped) for _, state in found]
    assert skipped[4] == 1 and skipped[-1] == skipped[-4] < 14


def test_a_spike_does_not_hide_the_next(short_history):
    found = spiking(LOSSES + [1e6, 1.0, 1e6, 1.0, 1e6], [1.0, 1.1, 0.9, 1.0, 1.0, 1.1, 0.9, 1.0, 1.0])
    assert int(find_state(SpikeState, found[-1][1]).skipped) == 3


def test_a_loss_that_is_infinite_before_the_history_is_full_leaves_the_guard_as_it_is(short_history):
    found = spiking([1.0, np.inf, *LOSSES[1:], 1.0, 50.0], [1.0] * 7)
    assert [int(find_state(SpikeState, state).skipped) for _, state in found] == [0] * 6 + [1]


def test_a_loss_that_is_not_a_number_is_skipped(short_history):
    found = spiking(LOSSES + [np.nan], [1.0, 1.1, 0.9, 1.0, 1.0])
    assert int(find_state(SpikeState, found[-1][1]).skipped) == 1


def test_without_a_guard_there_is_no_state_of_it():
    state = chain().init(drawn(0))
    assert find_state(SpikeState, state) is None and find_state(AverageState, state) is None


# ---- averages, Muon, Adafactor ----


def test_the_average_follows_the_parameters_after_each_update():
    changes = dict(ema_decay=0.75, learning_rate=0.1)
    found, average = stepped(drawn(0), [drawn(seed) for seed in (1, 2, 3)], **changes), flat(drawn(0))
    for params, state in found:
        average = {name: 0.75 * average[name] + 0.25 * x for name, x in flat(params).items()}
        for name, x in flat(find_state(AverageState, state).average).items():
            np.testing.assert_allclose(x, average[name], atol=1e-6)
    assert same(found[-1][0], stepped(drawn(0), [drawn(seed) for seed in (1, 2, 3)], learning_rate=0.1)[-1][0])


def test_muon_orthogonalises_each_layers_matrix_along_the_width():
    params, grads = drawn(0), drawn(1)
    found = stepped(params, [grads], name="muon", learning_rate=1.0)[0][0]
    for path, shape, side in (
        (("attention", "query"), (8, 24), 24),
        (("attention", "output"), (24, 8), 24),
        (("mlp", "down"), (12, 8), 12),
    ):
        old, new, gradient = (tree["blocks"][path[0]][path[1]]["kernel"] for tree in (params, found, grads))
        for layer in range(2):
            moved = np.float64(old - new)[layer].reshape(shape) / (0.2 * math.sqrt(side))
            singular = np.linalg.svd(moved, compute_uv=False)
            assert 0.6 < singular.min() and singular.max() < 1.3, path
            u, _, vt = np.linalg.svd(np.float64(gradient)[layer].reshape(shape), full_matrices=False)
            assert np.sum(moved * (u @ vt)) > 0.95 * np.linalg.norm(moved) * math.sqrt(8)


def test_muon_leaves_tables_biases_and_norms_to_adamw():
    gradients = [drawn(1), drawn(2)]
    muon, adamw = (flat(stepped(drawn(0), gradients, name=name)[-1][0]) for name in ("muon", "adamw"))
    for name in muon:
        assert np.array_equal(muon[name], adamw[name]) == (not name.endswith("kernel")), name


def test_muon_takes_a_critic_s_matrices_as_it_takes_the_policy_s():
    blocks = {"blocks": {"mlp": {"down": {"kernel": drawn(1)["blocks"]["mlp"]["down"]["kernel"]}}}}
    both, rules = blocks | {"critic": blocks}, ((r"(critic/)?blocks/mlp/down/kernel", "lfd"),)
    made = optimizer(config(name="muon"), lambda step: 1.0, rules)
    updates, _ = made.update(both, made.init(both), both)
    assert same(updates["blocks"], updates["critic"]["blocks"])


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_each_optimizer_lowers_a_quadratic(name):
    target = drawn(3)

    def distance(params):
        return sum(np.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))

    params, state = drawn(0), chain(name=name, learning_rate=0.2).init(drawn(0))
    for _step in range(20):
        grads = jax.tree.map(lambda x, y: x - y, params, target)
        params, state = stepper(name=name, learning_rate=0.2)(grads, state, params, 1.0)
    assert distance(params) < 0.5 * distance(drawn(0))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_a_mesh_changes_no_update_and_state_is_sharded_as_its_parameter(name, shape, make_mesh):
    changes = dict(name=name, weight_decay=0.1, clip_norm=1.0, spike_deviations=6.0, ema_decay=0.9, learning_rate=0.01)
    expected = stepped(drawn(0), [drawn(1), drawn(2)], **changes)[-1][0]
    mesh = make_mesh(*shape)
    placed = sharding.parameter_shardings(RULES, jax.eval_shape(drawn_zeros), mesh)
    put = lambda tree: jax.tree.map(jax.device_put, tree, placed)  # noqa: E731
    with jax.set_mesh(mesh):
        params, state = put(drawn(0)), jax.jit(chain(**changes).init)(put(drawn(0)))
        for seed in (1, 2):
            params, state = jax.jit(stepper(**changes).__wrapped__)(put(drawn(seed)), state, params, jnp.float32(1.0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), params, expected)
    jax.tree.map(lambda x, where: x.sharding == where or pytest.fail(f"{x.sharding} {where}"), params, placed)
    average = find_state(AverageState, state).average
    jax.tree.map(lambda x, where: x.sharding == where or pytest.fail(f"{x.sharding} {where}"), average, placed)


def drawn_zeros():
    return jax.tree.map(lambda shape: jnp.zeros(shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(name="adam"), r"optimizer\.name='adam' must be one of \('adamw', 'muon', 'adafactor'\)"),
        (dict(schedule="cos"), r"optimizer\.schedule='cos' must be one of"),
        (dict(warmup_unit="epochs"), r"optimizer\.warmup_unit='epochs' must be one of"),
        (dict(learning_rate=-1.0), r"optimizer\.learning_rate=-1\.0 must not be negative"),
        (dict(clip_norm=-1.0), r"optimizer\.clip_norm=-1\.0 must not be negative"),
        (dict(b2=1.0), r"optimizer\.b2=1\.0 must be in \[0, 1\)"),
        (dict(ema_decay=1.5), r"optimizer\.ema_decay=1\.5 must be in \[0, 1\)"),
        (dict(final_fraction=1.5), r"optimizer\.final_fraction=1\.5 must be in \[0, 1\]"),
        (dict(learning_rate=math.nan), r"optimizer\.learning_rate=nan must not be negative"),
        (dict(eps=-1.0), r"optimizer\.eps=-1\.0 must not be negative"),
        (dict(freeze_mask="("), r"optimizer\.freeze_mask='\(' is no regular expression: missing \)"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("changes", [dict(freeze_mask="blocs"), dict(decay_mask="kernl")])
def test_a_mask_that_matches_no_parameter_is_refused(changes):
    ((key, pattern),) = changes.items()
    with pytest.raises(
        ValueError, match=rf"optimizer\.{key}='{pattern}' matches no parameter: they are blocks/attention"
    ):
        chain(**changes).init(drawn(0))
