import json
import pydoc_data.topics
import shutil

import jax
import numpy as np
import pytest

from configs import common
from jaxllm import checkpoint, interop, workdir
from jaxllm.interop import gguf, runs
from jaxllm.run_config import resolved, run_config
from jaxllm.text.tokenizer import train


@pytest.fixture(scope="module")
def source(untrained, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.gguf"
    interop.save(path, *interop.load(untrained(16)), format="gguf", dtype="float32")
    return path


@pytest.fixture
def values():
    config = common.get_config()
    config.model.update(operand_dtype="float32", unroll=1)
    config.data.sequence_length = 24
    return config.to_dict()


@pytest.mark.parametrize("format", interop.FORMATS)
def test_what_is_made_is_an_ordinary_run(untrained, source, values, tmp_path, format):
    if format == "hf":
        source = tmp_path / "folder"
        interop.save(source, *interop.load(untrained(16)), format="hf")
    made = runs.make(tmp_path / "run", values, source)
    model, params, tokenizer = workdir.load(tmp_path / "run")
    theirs = interop.load(source)
    jax.tree.map(np.testing.assert_array_equal, params, theirs[1])
    assert made.parameters == sum(x.size for x in jax.tree.leaves(params)) and made.config == model.config
    assert tokenizer.fingerprint == theirs[2].fingerprint == made.tokenizer.fingerprint
    assert model.config.unroll == 1 and model.config.vocab_size == 288
    assert [*checkpoint.whole_steps(tmp_path / "run" / "checkpoints")] == [0]
    said = workdir.config(tmp_path / "run")
    assert said["tokenizer"] == {"kind": "huggingface", "vocab_size": 288, "path": ""}
    assert said["data"]["sequence_length"] == 24 and run_config(said).model == model.config


def test_a_stage_starts_from_it_with_nothing_but_its_name(source, values, tmp_path):
    runs.make(tmp_path / "run", values, source)
    config = common.get_config()
    config.start = str(tmp_path / "run")
    found = run_config(resolved(config.to_dict()))
    assert found.model.width == 16 and found.tokenizer.path == str(tmp_path / "run" / "tokenizer")


def test_the_same_source_is_imported_once_and_another_refused(source, values, tmp_path):
    assert runs.make(tmp_path / "run", values, source) is not None
    before = workdir.config(tmp_path / "run")
    assert runs.make(tmp_path / "run", values, source) is None and workdir.config(tmp_path / "run") == before
    shutil.copy(source, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="holds something else than .*other.gguf; use another --workdir"):
        runs.make(tmp_path / "run", values, tmp_path / "other.gguf")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="mine exists and holds something else"):
        runs.make(tmp_path / "mine", values, source)
    (tmp_path / "empty").mkdir()
    assert runs.make(tmp_path / "empty", values, source) is not None


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(source, values, tmp_path, monkeypatch):
    bigger = train(pydoc_data.topics.topics.values(), vocab_size=600)
    monkeypatch.setattr(interop, "read_tokenizer", lambda path: bigger)
    with pytest.raises(ValueError, match="vocab_size=288 is smaller than the tokenizer's 600"):
        runs.make(tmp_path / "run", values, source)
    assert [*tmp_path.iterdir()] == []


def test_a_run_is_not_imported(untrained, values, tmp_path):
    with pytest.raises(ValueError, match="is a run directory already: name it as --workdir"):
        runs.make(tmp_path / "run", values, untrained(16))


@pytest.mark.parametrize("moment", ["read", "save"])
def test_an_import_that_ends_halfway_leaves_no_run(source, values, tmp_path, monkeypatch, moment):
    def ended(*_, **__):
        raise KeyboardInterrupt

    where = {"read": (gguf, "read"), "save": (checkpoint.Checkpoints, "save")}[moment]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*where, ended)
        runs.make(tmp_path / "run", values, source)
    assert [*tmp_path.iterdir()] == []
    # A harder end leaves its scratch folder, which is no run and is replaced.
    (tmp_path / ".run.partial").mkdir()
    (tmp_path / ".run.partial" / "config.json").write_text(json.dumps({"model": {}}))
    runs.make(tmp_path / "run", values, source)
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and workdir.load(tmp_path / "run")
