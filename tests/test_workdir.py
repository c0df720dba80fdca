import json
import shutil
import sys

import jax
import numpy as np
import pytest

from configs import common
from jaxllm import checkpoint, workdir
from jaxllm.configure import section
from jaxllm.data import tokens
from jaxllm.model import DecoderConfig, build, placement
from jaxllm.text.tokenizer import byte_tokenizer

VALUES = {"seed": 0, "loop": {"steps": 10, "sample_prompts": ("a", "b")}, "tokenizer": {"kind": "bytes"}}


def changed(**loop):
    return VALUES | {"loop": VALUES["loop"] | loop}


def test_a_new_directory_is_made_with_the_config_that_config_reads(tmp_path):
    directory = workdir.open(tmp_path / "a" / "b", VALUES)
    assert directory == (tmp_path / "a" / "b").absolute()
    assert workdir.config(directory) == json.loads(json.dumps(VALUES))
    assert [path.name for path in directory.iterdir()] == ["config.json"]


def test_an_empty_directory_is_a_new_one(tmp_path):
    assert workdir.config(workdir.open(tmp_path, VALUES))["seed"] == 0


def test_a_home_directory_and_a_relative_path_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert workdir.open("~/home", VALUES) == tmp_path / "home"
    assert workdir.open("relative", VALUES) == tmp_path / "relative"


def test_the_same_config_opens_a_run_again_and_changes_nothing(tmp_path, capfd):
    workdir.open(tmp_path, VALUES)
    written = (tmp_path / "config.json").stat().st_mtime_ns
    workdir.open(tmp_path, VALUES)
    workdir.open(tmp_path, VALUES, accept_changes=True)
    assert (tmp_path / "config.json").stat().st_mtime_ns == written and capfd.readouterr() == ("", "")


def test_another_config_is_refused_naming_every_key_both_values_and_the_mend(tmp_path):
    workdir.open(tmp_path, VALUES)
    other = changed(steps=20, sample_prompts=("a", "c")) | {"new": 1}
    with pytest.raises(ValueError) as raised:
        workdir.open(tmp_path, other)
    lines = str(raised.value).splitlines()
    assert lines == [
        f"{tmp_path} holds a run with another config:",
        "  loop.sample_prompts: ['a', 'b'] there, ['a', 'c'] here",
        "  loop.steps: 10 there, 20 here",
        "  new: 'absent' there, 1 here",
        "Use another --workdir, or --accept_changes to go on with the new values.",
    ]
    assert workdir.config(tmp_path) == json.loads(json.dumps(VALUES))


def test_accepted_changes_are_shown_and_written_only_when_the_run_goes_on(tmp_path, capfd):
    workdir.open(tmp_path, VALUES)
    workdir.open(tmp_path, changed(steps=20), accept_changes=True)
    assert capfd.readouterr().err == "changed from the run so far: loop.steps: 10 -> 20\n"
    assert workdir.config(tmp_path)["loop"]["steps"] == 10
    workdir.record(tmp_path, changed(steps=20), {})
    assert workdir.config(tmp_path)["loop"]["steps"] == 20


def test_the_tokenizer_of_a_run_never_changes(tmp_path):
    workdir.open(tmp_path, VALUES)
    other = VALUES | {"tokenizer": {"kind": "sentencepiece"}}
    for accept in (False, True):
        with pytest.raises(
            ValueError, match=r"tokenizer.kind: 'bytes' there, 'sentencepiece' here\nUse another --workdir; "
        ):
            workdir.open(tmp_path, other, accept_changes=accept)


def test_a_kill_while_the_config_is_written_leaves_a_directory_to_begin_in(tmp_path):
    (tmp_path / "config.tmp").write_text('{"a": ')
    assert workdir.config(workdir.open(tmp_path, {"a": 1})) == {"a": 1}


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    with workdir.held(tmp_path):
        with pytest.raises(ValueError, match="another process trains the run in .*: wait until it ends, or use anoth"):
            with workdir.held(tmp_path):
                pass
    with workdir.held(tmp_path):
        tokens.write_whole(tmp_path / "main", lambda partial: None)
    assert (tmp_path / "main").is_dir(), "a cache may lie in the run's own directory"


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for accept in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no config.json of a run; use another --workdir"):
            workdir.open(tmp_path, VALUES, accept_changes=accept)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        workdir.open(tmp_path / "file", VALUES)
    assert (tmp_path / "file").read_text() == "in the way"


def test_where_no_run_is_the_error_says_what_to_give(tmp_path):
    for ask in (workdir.config, workdir.load):
        with pytest.raises(
            FileNotFoundError, match="no run in .*nowhere: config.json is missing; name a directory that"
        ):
            ask(tmp_path / "nowhere")


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"config.json is damaged \(.*\): write it again"):
        workdir.config(tmp_path)


def test_the_environment_names_versions_device_commit_command_and_data(tmp_path):
    workdir.record(tmp_path, VALUES, {"main": {"num_documents": 3}})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"].keys() == set(workdir.PACKAGES) and environment["packages"]["jax"] == jax.__version__
    assert environment["python"] == sys.version.split()[0] and environment["command"] == sys.argv
    assert environment["devices"] == 8 and environment["device"] == jax.devices()[0].device_kind
    assert environment["data"] == {"main": {"num_documents": 3}} and "commit" in environment


def test_a_run_that_goes_on_elsewhere_keeps_what_it_began_under(tmp_path, monkeypatch):
    for version in ("1", "1", "2", "2"):
        monkeypatch.setattr(workdir.platform, "python_version", lambda version=version: version)
        workdir.record(tmp_path, VALUES, {})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["python"] == "2" and [each["python"] for each in environment["earlier"]] == ["1"]
    assert environment["earlier"][0]["packages"] == environment["packages"]


def test_the_commit_is_that_of_the_code_and_empty_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert workdir.environment()["commit"] == ""
    monkeypatch.setenv("PATH", "")
    assert workdir.environment()["commit"] == ""


def test_an_evaluation_is_written_whole(tmp_path):
    workdir.write_evaluation(tmp_path, {"tokens": 3, "nats_per_token": 0.1})
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"tokens": 3, "nats_per_token": 0.1}
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_an_evaluation_is_read_again_and_without_one_is_empty(tmp_path):
    assert workdir.evaluation(tmp_path) == {}
    workdir.write_evaluation(tmp_path, {"tokens": 3})
    assert workdir.evaluation(tmp_path) == {"tokens": 3}


def test_the_items_of_a_suite_are_written_anew_beside_those_of_others(tmp_path):
    workdir.write_evaluation_items(tmp_path, "a", [{"item": 0}, {"item": 1}])
    workdir.write_evaluation_items(tmp_path, "b", [{"item": 0, "text": "é\u2028"}])
    workdir.write_evaluation_items(tmp_path, "a", [{"item": 7}])
    lines = (tmp_path / "evaluation_items.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"suite": "b", "item": 0, "text": "é\u2028"},
        {"suite": "a", "item": 7},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation_items.jsonl"]


# ---- loading ----


@pytest.fixture
def saved_run(tmp_path):
    """A run directory of two checkpoints, made without training; the parameters of step s are all s."""
    sizes = dict(num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_width=4)
    config = common.llama(**sizes)
    directory = workdir.open(tmp_path / "run", {"model": config.to_dict()})
    byte_tokenizer().save(directory / "tokenizer")
    abstract = jax.eval_shape(build(section(DecoderConfig, config).with_vocabulary(288)).init, jax.random.key(0))
    with checkpoint.open(directory / "checkpoints") as checkpoints:
        for step in (1, 2):
            params = jax.tree.map(lambda x, s=step: jax.numpy.full(x.shape, s, x.dtype), abstract)
            checkpoints.save(step, {"params": params}, position=None, meta={})
    return directory


@pytest.mark.parametrize(("asked", "expected"), [(None, 2), (1, 1)])
def test_a_run_loads_as_its_model_the_parameters_of_a_step_and_its_tokenizer(saved_run, asked, expected):
    model, params, tokenizer = workdir.load(saved_run, step=asked)
    assert tokenizer.fingerprint == byte_tokenizer().fingerprint and model.config.vocab_size == 288
    assert {float(leaf.flatten()[0]) for leaf in jax.tree.leaves(params)} == {expected}
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert model.forward(params, np.ones((1, 3), np.int32)).shape == (1, 3, 288)


def test_parameters_lie_on_the_mesh_that_is_set(saved_run, make_mesh):
    mesh = make_mesh(1, 4, 1)
    with jax.set_mesh(mesh):
        model, params, _ = workdir.load(saved_run)
    assert jax.tree.map(lambda x: x.sharding, params) == placement(model, mesh)
    assert all(np.all(leaf == 2) for leaf in jax.tree.leaves(jax.device_get(params)))


def test_a_step_that_was_not_kept_is_named(saved_run):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*; it has \[2, 1\]"):
        workdir.load(saved_run, step=7)


def test_the_identity_of_a_runs_parameters_changes_with_the_checkpoint_and_with_nothing_else(saved_run):
    newest = workdir.saved(saved_run).identity
    assert newest == workdir.saved(saved_run).identity == workdir.saved(saved_run, step=2).identity
    assert newest != workdir.saved(saved_run, step=1).identity
    params = workdir.load(saved_run)[1]
    shutil.rmtree(saved_run / "checkpoints" / "2")
    with checkpoint.open(saved_run / "checkpoints") as checkpoints:
        checkpoints.save(2, {"params": params}, position=None, meta={})
    assert workdir.saved(saved_run, step=2).identity != newest
