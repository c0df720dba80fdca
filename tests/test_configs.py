"""Every run of configs/ is whole: it builds, its model has shapes, and no key of it is unknown or without effect."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import common, rl
from jaxllm.evaluate.perplexity import weighed
from jaxllm.model import build, parameter_rules
from jaxllm.run_config import LoopConfig, RunConfig, run_config
from jaxllm.sharding import parameter_shardings
from jaxllm.stages import limited, named
from jaxllm.text.tokenizer import byte_tokenizer
from jaxllm.train import optimizer, schedule
from jaxllm.train.objectives import next_token
from jaxllm.train.update import init_state, update

NOT_RUNS = ("common", "architectures", "pipeline", "quickstart")
RUNS = sorted(
    path.stem for path in (Path(__file__).parent.parent / "configs").glob("*.py") if path.stem not in NOT_RUNS
)


@pytest.mark.parametrize("arg", ["", "tiny"])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_builds_and_its_update_has_shapes(run, arg, make_mesh):
    config = run_config(importlib.import_module(f"configs.{run}").get_config(arg))
    vocabulary = byte_tokenizer().vocab_size if config.tokenizer.kind == "bytes" else config.tokenizer.vocab_size
    model = build(config.model.with_vocabulary(vocabulary))
    params = jax.eval_shape(model.init, jax.random.key(0))
    parameter_shardings(parameter_rules(model.config), params, make_mesh(1, 1, 1))
    M, B, T = config.loop.micro_batches, config.loop.batch_size, config.data.sequence_length
    assert B % M == 0
    batch = {
        name: jax.ShapeDtypeStruct((M, B // M, T), "int32")
        for name in ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")
    }
    batch["mask_BT"] = jax.ShapeDtypeStruct((M, B // M, T), "bool")
    chain = optimizer(
        config.optimizer,
        schedule(config.optimizer, steps=config.loop.steps, tokens_per_step=B * T),
        parameter_rules(model.config),
    )

    def step(params, batch):
        return update(
            init_state(params, chain), weighed(params, batch), loss=next_token(model, config.objective), optimizer=chain
        )

    state, metrics = jax.eval_shape(step, params, batch)
    assert jax.tree.map(lambda x: x.shape, state.params) == jax.tree.map(lambda x: x.shape, params)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


@pytest.mark.parametrize("run", RUNS)
def test_a_run_says_its_command_and_refuses_an_unknown_argument(run):
    module = importlib.import_module(f"configs.{run}")
    assert f"--config=configs/{run}.py" in module.__doc__
    with pytest.raises(ValueError, match=f"configs/{run}.py takes no argument, .*'tiny'.*, not 'tinny'"):
        module.get_config("tinny")


@pytest.mark.parametrize("run", RUNS)
def test_a_tiny_run_ends_in_a_minute(run):
    config = run_config(importlib.import_module(f"configs.{run}").get_config("tiny"))
    assert (
        config.loop.steps <= 50 and config.loop.steps * config.loop.batch_size * config.data.sequence_length <= 50_000
    )


def changed(**changes):
    """The default config with ``section.key`` set, two underscores for the dot, whether the key exists or not."""
    config = common.get_config()
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = config
        for name in sections:
            section = section[name]
        with section.unlocked():
            section[key] = value
    return config


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(optimizer__learning_rat=1.0),
            r"config\.optimizer\.learning_rat is not a known key; did you mean 'learning_rate'\?",
        ),
        (dict(model__num_head=4), r"config\.model\.num_head is not a known key; did you mean 'num_heads'\?"),
        (dict(model__rope__tetha=1.0), r"config\.model\.rope\.tetha is not a known key; did you mean 'theta'\?"),
        (dict(lop=1), r"config\.lop is not a known key; did you mean 'loop'\?"),
        (dict(model__num_kv_heads=3), r"model\.num_heads=4 is not a multiple of model\.num_kv_heads=3"),
        (dict(loop__steps=-1), r"loop\.steps=-1 must be at least 0"),
        (dict(loop__save_every=0), r"loop\.save_every=0 must be at least 1"),
        (dict(mesh__tensor=0), r"mesh\.tensor=0 must be at least 1"),
        (dict(objective__z_coef=-1.0), r"objective\.z_coef=-1\.0 must not be negative"),
        (dict(tokenizer__kind="words"), r"tokenizer\.kind='words' must be one of"),
        (dict(data__validation=1.5), r"validation=1\.5 is a share"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(changed(**changes))


def test_a_stage_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"config\.stage='pretrian' is not a stage; did you mean 'pretrain'\?"):
        named("pretrian")


@pytest.mark.parametrize("algorithm", rl.ALGORITHMS)
def test_every_algorithm_of_reinforcement_learning_is_a_few_keys_that_are_known(algorithm):
    config = run_config(rl.get_config(f"{algorithm}-tiny"))
    assert config.stage == "rl" and config.model.scalar_head == config.policy.has_values
    for key, value in rl.ALGORITHMS[algorithm].items():
        assert getattr(config.policy, key) == value


def test_a_config_survives_its_way_through_json():
    assert run_config(json.loads(json.dumps(common.get_config().to_dict()))) == run_config(common.get_config())


def test_common_has_every_key_and_no_other():
    def keys(cls):
        return {
            field.name: keys(field.type) if dataclasses.is_dataclass(field.type) else None
            for field in dataclasses.fields(cls)
        }

    def given(values, like):
        return {key: given(value, like[key]) if like.get(key) else None for key, value in values.items()}

    known = keys(RunConfig)
    assert given(common.get_config().to_dict(), known) == known


def test_every_default_has_a_reason_beside_it():
    source = Path(common.__file__).read_text(encoding="utf-8")
    for field in dataclasses.fields(LoopConfig):
        assert f"config.loop.{field.name} = " in source


def test_limited_takes_the_first_few_and_all_for_zero():
    assert list(limited(range(5), 2)) == [0, 1] and list(limited(range(5), 0)) == [0, 1, 2, 3, 4]
    assert list(limited(iter("ab"), 9)) == ["a", "b"]
