import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from jaxllm import loop, sharding, tree
from jaxllm.configure import section
from jaxllm.losses import token_weights
from jaxllm.metrics import Ratio
from jaxllm.model import build, parameter_rules
from jaxllm.run_config import run_config
from jaxllm.stages import Stage
from jaxllm.train import OptimizerConfig, TrainState, optimizer, update
from jaxllm.train.objectives import ObjectiveConfig, next_token
from jaxllm.train.update import init_state

B, T = 16, 12
RATE = 1e-3


@pytest.fixture(scope="module")
def optimizer_config():
    return run_config(common.get_config()).optimizer


def keep_gradients():
    """An optimizer's first link that remembers the gradients it was given."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )


@pytest.fixture(scope="module")
def one_update(tiny, built, packed_batch, optimizer_config):
    """A function: M, mesh, targets -> (loss, nll, norm, gradients, parameters) of one AdamW update with clipping."""

    @functools.cache
    def one_update(M, on=None, targets="all"):
        config = tiny(tied_head=False)
        model, params = built(config)
        rules = parameter_rules(config)
        chain = optax.chain(keep_gradients(), optimizer(optimizer_config, lambda step: RATE, rules))
        batch = packed_batch(M, B, T)
        if targets == "answers":  # runs of supervised tokens, as of conversations; few in some rows and none in others
            batch["mask_BT"] = batch["mask_BT"] & (batch["positions_BT"] % 5 > 2)
            batch["weight_BT"] = np.asarray(token_weights(batch["mask_BT"]))
        if on is not None:
            params = jax.tree.map(jax.device_put, params, sharding.parameter_shardings(rules, params, on))
            batch = sharding.global_batch(batch, on)
        loss = next_token(model, ObjectiveConfig(1e-3))
        state, metrics = jax.jit(functools.partial(update, loss=loss, optimizer=chain))(
            init_state(params, chain), batch
        )
        assert state.step == 1
        jax.tree.map(
            lambda new, old: new.sharding == old.sharding or pytest.fail(str(new.sharding)),
            state.params,
            jax.tree.map(jnp.asarray, params),
        )
        return jax.device_get(
            (metrics["loss"], metrics["nll"].value, metrics["grad_norm"], state.opt_state[0], state.params)
        )

    return one_update


def relative(found, expected):
    distance = sum(np.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    return (distance / sum(np.sum(x**2) for x in jax.tree.leaves(expected))) ** 0.5


def agree(found, expected):
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-6)
    assert relative(found[3], expected[3]) <= 1e-5
    for ours, same in zip(jax.tree.leaves(found[4]), jax.tree.leaves(expected[4]), strict=True):
        np.testing.assert_allclose(ours, same, atol=1e-6)


def test_loss_and_gradients_are_those_of_the_whole_batch_at_once(tiny, built, packed_batch, one_update):
    config = tiny(tied_head=False)
    model, params = built(config)
    batch = {name: x[0] for name, x in packed_batch(1, B, T).items()}
    both = jax.jit(jax.value_and_grad(next_token(model, ObjectiveConfig(1e-3)), has_aux=True))
    (value, metrics), gradients = both(params, batch)
    loss, nll, norm, found, _ = one_update(4)
    np.testing.assert_allclose([loss, nll], [value, metrics["nll"].value], rtol=1e-6)
    np.testing.assert_allclose(norm, tree.global_norm(gradients), rtol=1e-5)
    assert relative(found, gradients) <= 1e-5


@pytest.mark.parametrize("M", [4, 16])
def test_micro_batches_of_ragged_lengths_change_nothing(one_update, M):
    agree(one_update(M), one_update(1))


def test_micro_batches_change_nothing_where_answers_alone_are_supervised(one_update, make_mesh):
    expected = one_update(1, targets="answers")
    assert relative(expected[3], one_update(1)[3]) > 0.1
    agree(one_update(4, targets="answers"), expected)
    with jax.set_mesh(on := make_mesh(2, 2, 2)):
        agree(one_update(4, on, targets="answers"), expected)


@pytest.mark.parametrize("shape, M", [((1, 1, 1), 16), ((1, 4, 2), 4), ((2, 2, 2), 1)], ids=str)
def test_a_mesh_changes_nothing(one_update, make_mesh, shape, M):
    on = make_mesh(*shape)
    with jax.set_mesh(on):
        found = one_update(M, on)
    agree(found, one_update(1))


def quadratic(params, batch):
    return jnp.sum(batch["weight_B"] * jnp.square(params["x"] - batch["target_B"])), {}


def test_losses_and_gradients_are_summed_not_averaged_over_micro_batches():
    batch = {"weight_B": jnp.array([[0.25, 0.25], [0.5, 0.0]]), "target_B": jnp.array([[1.0, 2.0], [3.0, 9.0]])}
    sgd = optax.with_extra_args_support(optax.sgd(0.1))
    state, metrics = update(init_state({"x": jnp.float32(0.0)}, sgd), batch, loss=quadratic, optimizer=sgd)
    assert metrics["loss"] == 0.25 * 1 + 0.25 * 4 + 0.5 * 9
    assert metrics["grad_norm"] == 4.5 and state.step == 1
    np.testing.assert_allclose(state.params["x"], 0.45, rtol=1e-6)


def test_a_state_is_parameters_optimizer_state_and_an_integer_step():
    state = init_state({"x": jnp.float32(0.0)}, optax.sgd(0.1))
    assert TrainState._fields == ("params", "opt_state", "step")
    assert state.step == 0 and state.step.dtype == jnp.int32


# ---- the state on a mesh, from its first moment ----

LARGE = dict(vocab_size=512, num_layers=4, width=64, mlp_width=256, num_heads=8, num_kv_heads=4, head_width=16)


def programs(config, mesh_shape, mesh, **loop_changes):
    values = common.get_config()
    values.model.update(common.llama(**LARGE))
    values.mesh.update(dict(zip(("replica", "fsdp", "tensor"), mesh_shape, strict=True)))
    values.loop.update(dict(batch_size=B, micro_batches=2) | loop_changes)
    model = build(config)
    stage = Stage(
        model=model, tokenizer=None, batches=None, validation=None, report={}, prompt=None,
        prepare=lambda params, batch: batch | {"weight_BT": token_weights(batch["mask_BT"])},
        objective=next_token(model, ObjectiveConfig(0.0)),
    )  # fmt: skip
    return loop.compile_programs(run_config(values), stage, mesh)


def device_bytes(array):
    return array.addressable_shards[0].data.nbytes


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_the_state_is_sharded_from_initialisation_on_and_never_whole(tiny, make_mesh, shape):
    mesh = make_mesh(*shape)
    parts = shape[1] * shape[2]
    with jax.set_mesh(mesh):
        init = programs(tiny(**LARGE), shape, mesh).init
        compiled = init.lower(jax.random.key(0)).compile()
        state = init(jax.random.key(0))
    leaves = jax.tree.leaves(state)
    whole, here = sum(leaf.nbytes for leaf in leaves), sum(map(device_bytes, leaves))
    assert whole / parts <= here <= 1.02 * whole / parts
    matrices = [leaf for leaf in leaves if leaf.nbytes > 2**14]
    assert {leaf.nbytes // device_bytes(leaf) for leaf in matrices} == {parts}
    assert compiled.memory_analysis().output_size_in_bytes <= 1.02 * whole / parts + 2**14
    # Not even for a moment: no step of the program that each device runs has the shape of a whole matrix.
    text = compiled.as_text()
    assert "f32[" in text
    for leaf in matrices:
        assert f"f32[{','.join(map(str, leaf.shape))}]" not in text


def test_initial_parameters_do_not_depend_on_the_mesh(tiny, make_mesh):
    found = []
    for shape in ((1, 1, 1), (1, 4, 2)):
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            found.append(jax.device_get(programs(tiny(**LARGE), shape, mesh).init(jax.random.key(0)).params))
    jax.tree.map(np.testing.assert_array_equal, *found)


# ---- learning ----


def trained(config, steps, chain, params, batch):
    loss = next_token(build(config), ObjectiveConfig(0.0))
    step = jax.jit(functools.partial(update, loss=loss, optimizer=chain), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.asarray, params), chain)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


def test_a_hundred_bfloat16_steps_move_every_norm_weight_and_state_stays_float32(tiny, built, packed_batch):
    config = tiny(activation_dtype="bfloat16", operand_dtype="bfloat16", qk_norm="head", post_norm=True)
    params = jax.device_get(jax.jit(build(config).init)(jax.random.key(0)))
    rules = parameter_rules(config)
    chain = optimizer(run_config(common.get_config()).optimizer, lambda step: 3e-4, rules)
    state, _ = trained(config, 100, chain, params, packed_batch(2, 8, T))
    for name, old, new in zip(tree.names(params), jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        if name.endswith("scale"):
            assert np.all(old != np.asarray(new)), name
    floating = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floating) == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "name", ["adamw", pytest.param("muon", marks=pytest.mark.slow), pytest.param("adafactor", marks=pytest.mark.slow)]
)
def test_one_batch_is_learned_by_heart(tiny, packed_batch, name):
    config = tiny(width=32, mlp_width=64, head_width=8)
    values = common.get_config().optimizer
    values.update(dict(name=name, weight_decay=0.0))
    chain = optimizer(section(OptimizerConfig, values), lambda step: 1e-2, parameter_rules(config))
    params = jax.jit(build(config).init)(jax.random.key(0))
    _, metrics = trained(config, 300, chain, params, packed_batch(1, 4, T))
    assert metrics["nll"].value < 0.1


def test_micro_batches_beyond_the_filled_ones_are_not_computed():
    chain, batch_M1 = optax.sgd(1.0), np.array([[1.0], [2.0], [np.nan], [np.nan]], np.float32)

    def loss(params, micro_batch):
        return params * jnp.sum(micro_batch), {"seen": Ratio(jnp.sum(micro_batch), jnp.float32(1))}

    state, measured = update(init_state(jnp.float32(0), chain), batch_M1, loss=loss, optimizer=chain, filled=2)
    assert float(state.params) == -3 and float(measured["seen"].total) == 3 and float(measured["seen"].count) == 2
