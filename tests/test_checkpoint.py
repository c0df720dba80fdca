import logging
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm import checkpoint

META = {"config": {"model": {"width": 8, "layers": 2}, "train": {"steps": 100}}, "tokenizer": "a1", "data": "d1"}


class State(NamedTuple):
    params: Any
    opt_state: Any
    step: Any


def optimizer():
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), {"embed": False, "blocks": True})
    )


def make_state(step=0, width=8):
    key = jax.random.key(step)
    params = {
        "embed": {"table": jax.random.normal(key, (16, width))},
        "blocks": {"kernel": jax.random.normal(key, (2, width, 8)), "norm": jnp.full((2, 8), 1 / 3, jnp.bfloat16)},
    }
    return State(params, optimizer().init(params), jnp.int32(step))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(checkpoints, step, state=None, **metrics):
    checkpoints.save(step, state or make_state(step), position={"row": step}, meta=META, metrics=metrics)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


@pytest.fixture
def saved(tmp_path):
    with checkpoint.open(tmp_path, keep_last=3) as checkpoints:
        for step in (10, 20):
            save(checkpoints, step)
    return tmp_path


def restore(directory, state=None, meta=META, **options):
    with checkpoint.open(directory) as checkpoints:
        return checkpoints.restore(abstract(state or make_state()), meta, **options)


# ---- round trip ----


def test_state_position_and_meta_come_back_as_they_were_saved(saved):
    state, position, meta = restore(saved)
    assert_equal(state, make_state(20))
    assert (position, meta) == ({"row": 20}, META)
    assert isinstance(state.opt_state[1].inner_state[0].mu["embed"], optax.MaskedNode)


def test_an_older_step_can_be_named(saved):
    assert_equal(restore(saved, step=10).state, make_state(10))


def test_a_template_without_shardings_lands_on_the_first_device(saved):
    with checkpoint.open(saved) as checkpoints:
        state = checkpoints.restore(jax.eval_shape(make_state), META).state
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {SingleDeviceSharding(jax.devices()[0])}


def test_a_save_equals_the_host_copy_of_its_step_while_training_goes_on_in_donated_buffers(tmp_path):
    @jax.jit
    def grow(tree):
        return jax.tree.map(lambda x: x * 1.25 + 1, tree)

    train = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.5 + 3, tree), donate_argnums=0)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = {
        "sharded": jax.device_put(jnp.ones((1 << 20,)), sharded),
        "one": jnp.ones((1 << 20,)),
        "step": jnp.float32(1),
    }
    copies = {}
    with checkpoint.open(tmp_path, keep_last=9) as checkpoints:
        for step in range(3):
            state = grow(state)
            copies[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(step, state, position=None, meta={})
            for _ in range(20):
                before, state = state, train(state)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        checkpoints.wait()
        for step, copy in copies.items():
            assert_equal(checkpoints.restore(abstract(state), {}, step=step).state, copy)


# ---- topology ----


def on_devices(count, axis_type=AxisType.Explicit):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("fsdp",), axis_types=(axis_type,))

    def sharding(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size % count == 0), None)
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if i == axis else None for i in range(leaf.ndim))))

    return lambda tree: jax.tree.map(sharding, tree)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_a_state_moves_from_8_devices_to_1_2_4_and_back(tmp_path, axis_type):
    source = make_state(1)
    with checkpoint.open(tmp_path, keep_last=9) as checkpoints:
        for step, count in enumerate((8, 1, 2, 4, 8)):
            shardings = on_devices(count, axis_type)(source)
            template = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), source, shardings)
            state = checkpoints.restore(template, META).state if step else jax.device_put(source, shardings)
            assert_equal(state, source)
            assert jax.tree.map(lambda x: x.sharding, state) == shardings
            save(checkpoints, step, state)
            checkpoints.wait()


def test_restoring_works_inside_an_explicit_mesh(saved):
    shardings = on_devices(8)(make_state())
    with jax.set_mesh(jax.tree.leaves(shardings)[0].mesh), checkpoint.open(saved) as checkpoints:
        template = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), make_state(), shardings
        )
        assert_equal(checkpoints.restore(template, META).state, make_state(20))


def test_the_first_resumed_step_reuses_the_compiled_step_and_every_buffer(tmp_path):
    train = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.device_put(make_state(), on_devices(4)(make_state()))
    template = abstract(state)
    with checkpoint.open(tmp_path) as checkpoints:
        save(checkpoints, 0, state)
        train(train(state))
        checkpoints.wait()
        resumed = checkpoints.restore(template, META).state
    train(resumed)
    assert train._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(resumed))


# ---- mismatches ----


def with_param(state, name, leaf):
    blocks = {**state.params["blocks"], name: leaf}
    return state._replace(params={**state.params, "blocks": {k: v for k, v in blocks.items() if v is not None}})


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("norm", jnp.zeros((2, 8), jnp.float32), r"params/blocks/norm: saved bfloat16\[2, 8\], wanted float32\[2, 8\]"),
        (
            "norm",
            jnp.zeros((3, 8), jnp.bfloat16),
            r"params/blocks/norm: saved bfloat16\[2, 8\], wanted bfloat16\[3, 8\]",
        ),
        ("norm", None, r"params/blocks/norm: saved bfloat16\[2, 8\], wanted absent"),
        ("bias", jnp.zeros((2, 8)), r"params/blocks/bias: saved absent, wanted float32\[2, 8\]"),
    ],
)
def test_another_dtype_shape_or_key_is_named_with_both_values(saved, name, leaf, message):
    with pytest.raises(ValueError, match=message):
        restore(saved, with_param(make_state(), name, leaf))


def test_another_optimizer_is_refused(saved):
    params = make_state().params
    with pytest.raises(ValueError, match=r"opt_state/\S*mu/blocks/kernel: saved float32\[2, 8, 8\], wanted absent"):
        restore(saved, State(params, optax.sgd(1e-3, momentum=0.9).init(params), jnp.int32(0)))


def test_a_long_list_of_mismatches_is_cut_and_counted(saved):
    with pytest.raises(ValueError, match="and 2 more"):
        restore(saved, {"x": jnp.zeros(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "b2"}, "tokenizer: saved 'a1', now 'b2'"),
        ({"data": "e5"}, "data: saved 'd1', now 'e5'"),
        ({"config": {**META["config"], "model": {"width": 9, "layers": 2}}}, "config.model.width: saved 8, now 9"),
        ({"config": {**META["config"], "lora": {"rank": 4}}}, "config.lora.rank: saved 'absent', now 4"),
        ({"config": {"model": META["config"]["model"]}}, "config.train.steps: saved 100, now 'absent'"),
    ],
)
def test_another_tokenizer_data_or_config_is_named_with_both_values(saved, change, message):
    with pytest.raises(ValueError, match=message):
        restore(saved, meta=META | change)


def test_a_difference_is_accepted_when_it_or_its_section_is_named(saved):
    changed = META | {"config": {**META["config"], "train": {"steps": 200}}}
    for ignore in ("config.train.steps", "config.train", "config"):
        assert restore(saved, meta=changed, ignore=[ignore]).meta == META
    with pytest.raises(ValueError, match="config.train.steps: saved 100, now 200"):
        restore(saved, meta=changed, ignore=["config.tr", "tokenizer"])


def test_differences_see_through_tuples_and_name_both_values():
    saved = {"a": {"b": [1, 2]}, "c": 0.1}
    assert checkpoint.differences(saved, {"a": {"b": (1, 2)}, "c": 0.1}) == {}
    assert checkpoint.differences(saved, {"a": {"b": (1, 3)}, "d": None}) == {
        "a.b": ([1, 2], [1, 3]),
        "c": (0.1, "absent"),
        "d": ("absent", None),
    }


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"key": jax.random.key(0)}, "key is key<fry>.*derive keys from seed and step"),
        ({"count": 3}, "count is int: the state holds number arrays only"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, "two leaves of the state have the same path name"),
    ],
)
def test_a_leaf_that_cannot_be_stored_is_refused_by_name(tmp_path, state, message):
    with checkpoint.open(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.save(1, state, position=0, meta={})


def test_a_position_that_is_not_json_is_refused_at_once(tmp_path):
    with checkpoint.open(tmp_path) as checkpoints, pytest.raises(ValueError, match="position cannot be saved as JSON"):
        checkpoints.save(1, make_state(), position=b"bytes", meta={})


# ---- which steps are kept ----


def test_the_newest_and_the_best_are_kept_and_nan_is_never_best(tmp_path):
    losses = {1: float("nan"), 2: 0.5, 3: 0.9, 4: 0.7, 5: 0.8, 6: 0.6}
    for step, loss in losses.items():  # reopened every time: the metrics come from the disk
        with checkpoint.open(tmp_path, keep_last=2, keep_best=2, best_metric="loss") as checkpoints:
            save(checkpoints, step, loss=loss)
    assert steps(tmp_path) == [2, 5, 6]


def test_best_can_be_largest(tmp_path):
    with checkpoint.open(tmp_path, keep_last=1, keep_best=1, best_metric="reward", best_mode="max") as checkpoints:
        for step, reward in enumerate((0.1, 0.9, 0.5, 0.2)):
            save(checkpoints, step, reward=reward)
    assert steps(tmp_path) == [1, 3]


def test_a_step_without_the_metric_is_kept_only_while_it_is_new(tmp_path):
    with checkpoint.open(tmp_path, keep_last=1, keep_best=1, best_metric="loss") as checkpoints:
        save(checkpoints, 1, loss=1.0)
        save(checkpoints, 2)
        save(checkpoints, 3)
    assert steps(tmp_path) == [1, 3]


def test_a_saved_step_is_left_alone_and_an_older_one_refused(saved):
    with checkpoint.open(saved) as checkpoints:
        save(checkpoints, 20, make_state(7))
        with pytest.raises(ValueError, match="step 5 is older than checkpoint 20"):
            save(checkpoints, 5)
    assert_equal(restore(saved).state, make_state(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last=0 must be at least 1"),
        ({"keep_best": 1}, "keep_best=1 needs best_metric"),
        ({"best_mode": "low"}, "best_mode='low' must be 'min' or 'max'"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.open(tmp_path, **options)


# ---- damage ----


def damage(path, how):
    path.unlink() if how == "removed" else os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_a_step_with_any_file_damaged_is_not_whole(saved, how, caplog):
    files = [path for path in (saved / "20").rglob("*") if path.is_file() and path.parent.name != "20"]
    assert len(files) > 10
    for file in [*files, saved / "20" / "files.json"]:
        content = file.read_bytes()
        damage(file, how)
        assert next(checkpoint.whole_steps(saved)) == 10
        assert f"20 is not whole: {file.relative_to(saved / '20')}" in caplog.text
        file.write_bytes(content)
    assert next(checkpoint.whole_steps(saved)) == 20


@pytest.mark.parametrize("file", ["state/d/*", "meta/metadata", "files.json"])
def test_a_damaged_step_is_set_aside_and_training_goes_on_from_the_one_before(saved, file, caplog):
    for _ in range(2):
        damage(next((saved / "20").glob(file)), "cut")
        with checkpoint.open(saved) as checkpoints:
            assert "20 is not whole" in caplog.text and checkpoints.latest_step == 10
            assert_equal(checkpoints.restore(abstract(make_state()), META).state, make_state(10))
            save(checkpoints, 20)
    assert steps(saved) == [10, 20] and {path.name for path in saved.glob("20.*")} == {"20.damaged", "20.damaged2"}


@pytest.mark.parametrize("how", ["removed", "cut"])
def test_the_files_that_orbax_keeps_for_itself_do_not_matter(saved, how):
    for path in [path for path in (saved / "20").iterdir() if path.is_file() and path.name != "files.json"]:
        damage(path, how)
    assert_equal(restore(saved).state, make_state(20))


def test_reading_beside_a_damaged_step_changes_nothing_on_the_disk(saved, caplog):
    damage(saved / "20" / "state" / "manifest.ocdbt", "cut")
    np.testing.assert_array_equal(
        checkpoint.restore_params(saved)["embed"]["table"], make_state(10).params["embed"]["table"]
    )
    assert "manifest.ocdbt has" in caplog.text and steps(saved) == [10, 20]


def test_when_no_step_is_whole_the_error_says_what_is_there(saved):
    for step in ("10", "20"):
        damage(saved / step / "files.json", "cut")
    with pytest.raises(FileNotFoundError, match=r"no whole checkpoint in .*steps there: \[20, 10\]"):
        checkpoint.restore_params(saved)
    with pytest.raises(ValueError, match="20 is not whole: files.json is missing or cut short"):
        checkpoint.read_meta(saved, step=20)


def test_missing_directories_and_steps_are_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in .*nowhere"):
        checkpoint.read_meta(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 15 in .*; it has \[20, 10\]"):
        checkpoint.restore_params(saved, step=15)


def test_an_unfinished_save_is_never_seen_and_is_cleaned_up(saved):
    unfinished = saved / "25.orbax-checkpoint-tmp"
    shutil.copytree(saved / "20", unfinished)
    with checkpoint.open(saved) as checkpoints:
        assert checkpoints.latest_step == 20
        save(checkpoints, 30)
    assert not unfinished.exists() and steps(saved)[-1] == 30


SAVE_UNTIL_KILLED = """
import sys, jax, jax.numpy as jnp
from jaxllm import checkpoint
with checkpoint.open(sys.argv[1], keep_last=1) as checkpoints:
    for step in range(1000):
        state = {"x": jnp.full((1 << 21,), step), "y": jnp.arange(1 << 20) + step}
        checkpoints.save(step, state, position=step, meta={})
        print(step, flush=True)
"""


@pytest.mark.parametrize(
    "delay", [0.03, *[pytest.param(t, marks=pytest.mark.slow) for t in (0.0, 0.01, 0.05, 0.1, 0.2)]]
)
def test_sigkill_during_a_save_leaves_the_newest_whole_step_loadable(tmp_path, delay):
    command = [sys.executable, "-c", SAVE_UNTIL_KILLED, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(checkpoint.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if (started := int(line)) == 3:
            break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with checkpoint.open(tmp_path) as checkpoints:
        step = checkpoints.latest_step
        template = {"x": jax.ShapeDtypeStruct((1 << 21,), jnp.int32), "y": jax.ShapeDtypeStruct((1 << 20,), jnp.int32)}
        state, position, _ = checkpoints.restore(template, {})
        assert step >= started - 1 and position == step
        assert_equal(state, {"x": jnp.full((1 << 21,), step), "y": jnp.arange(1 << 20) + step})


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_a_full_disk_fails_the_run_and_says_where_and_what_to_do(saved, then):
    noise = {"noise": jax.random.normal(jax.random.key(0), (1 << 18,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = checkpoint.open(saved)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match=rf"saving .*failed in {saved}: .*Newest whole checkpoint: 20. Free space"):
            checkpoints.save(30, noise, position=0, meta={})
            checkpoints.save(31, noise, position=0, meta={}) if then == "save" else getattr(checkpoints, then)()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert_equal(restore(saved).state, make_state(20))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="opening failed in .*file/checkpoints"):
        checkpoint.open(tmp_path / "file" / "checkpoints")


# ---- inference ----


def test_params_are_found_by_a_relative_path(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    params = checkpoint.restore_params(saved.name)
    np.testing.assert_array_equal(params["embed"]["table"], checkpoint.restore_params(saved)["embed"]["table"])
    assert checkpoint.read_meta(saved.name) == checkpoint.read_meta(saved)


def test_params_alone_come_back_as_a_dict_on_one_device(saved):
    params = checkpoint.restore_params(saved)
    assert_equal(params, make_state(20).params)
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(params))
    assert checkpoint.read_meta(saved, step=10) == META


def test_params_alone_land_on_the_shardings_asked_for(saved):
    shardings = on_devices(4)(make_state().params)
    params = checkpoint.restore_params(saved, step=10, shardings=shardings)
    assert_equal(params, make_state(10).params)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings


def test_shardings_with_other_names_are_refused(saved):
    with pytest.raises(ValueError, match=r"\['params/blocks/kernel', 'params/blocks/norm'\] are in only one"):
        checkpoint.restore_params(saved, shardings=on_devices(4)({"embed": make_state().params["embed"]}))


# ---- manners ----


def test_saving_and_restoring_print_and_log_nothing(tmp_path, capfd, caplog):
    caplog.set_level(logging.WARNING)
    with checkpoint.open(tmp_path) as checkpoints:
        save(checkpoints, 1)
    restore(tmp_path)
    checkpoint.restore_params(tmp_path)
    assert capfd.readouterr() == ("", "") and not caplog.records


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_fifty_saves_do_not_grow_the_process(tmp_path):
    state = {"weights": jnp.ones((1 << 16,))}
    with checkpoint.open(tmp_path) as checkpoints:
        for step in range(55):
            save(checkpoints, step, state)
            if step == 4:
                checkpoints.wait()
                before = resident_bytes()
        checkpoints.wait()
    assert resident_bytes() < 1.05 * before
