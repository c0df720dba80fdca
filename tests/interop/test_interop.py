import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxllm import interop, workdir
from jaxllm.evaluate.continuations import continuations
from jaxllm.generate import SamplerConfig


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.fixture(scope="module")
def run(untrained):
    return untrained(16)


@pytest.fixture
def exported(run, tmp_path):
    """A function: format -> where the run was exported to, in float32."""

    def exported(format):
        out = tmp_path / ("model.gguf" if format == "gguf" else "folder")
        interop.save(out, *interop.load(run), format=format, dtype="float32")
        return out

    return exported


def test_a_run_is_loaded_as_it_is(run):
    (model, params, tokenizer), found = interop.load(run), workdir.load(run)
    assert model.config == found[0].config and same(params, found[1])
    assert tokenizer.fingerprint == found[2].fingerprint and interop.kind(run) == "run"


@pytest.mark.parametrize("format", interop.FORMATS)
def test_what_is_saved_is_loaded_with_the_same_numbers_ids_and_answers(run, exported, format):
    path = exported(format)
    assert interop.kind(path) == format
    (model, params, tokenizer), (model_there, params_there, tokenizer_there) = interop.load(run), interop.load(path)
    assert same(params, params_there)
    assert tokenizer_there.encode("é x\n") == tokenizer.encode("é x\n")
    assert tokenizer_there.bos_ids == tokenizer.bos_ids and set(tokenizer_there.stop_ids) == set(tokenizer.stop_ids)
    greedy = dict(max_new_tokens=12, sampler=SamplerConfig(temperature=0.0))
    texts = [
        continuations(each, numbers, tokens, ["é start"], jax.random.key(0), **greedy)
        for each, numbers, tokens in ((model, params, tokenizer), (model_there, params_there, tokenizer_there))
    ]
    assert texts[0] == texts[1]


def test_it_says_how_it_is_computed_unless_told(exported, run):
    assert interop.load(exported("gguf"), operand_dtype="bfloat16")[0].config.operand_dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"is a run, .*: leave out \['operand_dtype'\]"):
        interop.load(run, operand_dtype="float32")


@pytest.mark.parametrize(
    "how, error, message",
    [
        (dict(format="onnx"), ValueError, r"format='onnx' must be one of \('hf', 'gguf'\)"),
        (dict(format="hf", dtype="q8_0"), ValueError, r"dtype='q8_0' must be one of .* where format='hf'"),
        (dict(format="gguf"), FileExistsError, "exists; remove it"),
        (dict(format="hf"), FileExistsError, "exists; remove it"),
    ],
)
def test_what_cannot_be_written_is_refused(run, tmp_path, how, error, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(error, match=message):
        interop.save(tmp_path / "out", *interop.load(run), **how)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("format", interop.FORMATS)
def test_a_model_that_a_format_cannot_say_leaves_nothing(run, tmp_path, format):
    model, params, tokenizer = interop.load(run)
    model = model._replace(config=dataclasses.replace(model.config, logit_soft_cap=3.0))
    with pytest.raises(ValueError, match="logit_soft_cap"):
        interop.save(tmp_path / "out", model, params, tokenizer, format=format)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("format", interop.FORMATS)
def test_a_save_that_fails_leaves_nothing_and_its_own_advice_works(run, tmp_path, format):
    model, params, tokenizer = interop.load(run)
    params["embedding"]["table"] = params["embedding"]["table"].at[0, 0].set(1e6)
    with pytest.raises(ValueError, match=r"has numbers up to 1e\+06, float16 up to 65504; use"):
        interop.save(tmp_path / "out", model, params, tokenizer, format=format, dtype="float16")
    assert [*tmp_path.iterdir()] == []
    interop.save(tmp_path / "out", model, params, tokenizer, format=format, dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and interop.kind(tmp_path / "out") == format


def test_an_empty_folder_is_filled_and_what_an_end_halfway_left_is_replaced(run, tmp_path):
    for name in ("out", ".out.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.partial" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    interop.save(tmp_path / "link", *interop.load(run), format="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]
    assert interop.kind(tmp_path / "link") == "hf" and not (tmp_path / "out" / "old").exists()


def test_what_holds_no_model_is_refused_with_the_mend(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*give a run directory, a Hugging Face folder or a GGUF"):
        interop.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model: it has no config.json"):
        interop.load(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"PK")
    with pytest.raises(ValueError, match="a.gguf is no GGUF file"):
        interop.load(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"holds no model: give one of \['a.gguf'\]"):
        interop.load(tmp_path)


def test_its_package_is_not_needed_before_a_file_is_read():
    code = "import sys; sys.modules['gguf'] = sys.modules['tokenizers'] = None; import jaxllm.interop.runs"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=interop.__path__[0] + "/../..")
