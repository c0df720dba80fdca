import jax
import numpy as np
import pytest

from jaxllm import interop, workdir


@pytest.mark.parametrize("flags", [(), ("--format=gguf", "--dtype=float32", "--max_positions=99")])
def test_a_run_that_is_exported_is_loaded_with_the_same_numbers(script, untrained_run, tmp_path, flags):
    status, printed, _ = script("export_model.py", f"--workdir={untrained_run}", f"--out={tmp_path / 'out'}", *flags)
    assert status == 0 and "bytes" in printed
    found = interop.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, found[1], workdir.load(untrained_run)[1])
    if flags:
        assert interop.kind(tmp_path / "out") == "gguf"
    else:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_the_step_decides_which_parameters_are_written(script, untrained_run, tmp_path):
    script("export_model.py", f"--workdir={untrained_run}", f"--out={tmp_path / 'out'}", "--step=1")
    first = workdir.load(untrained_run, step=1)[1]
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path / "out")[1], first)


def test_what_goes_wrong_is_one_line(script, untrained_run, tmp_path):
    (tmp_path / "out").touch()
    status, *_ = script("export_model.py", f"--workdir={untrained_run}", f"--out={tmp_path / 'out'}")
    assert status.startswith("FileExistsError") and "exists; remove it" in status
    status, *_ = script("export_model.py", f"--workdir={untrained_run}", f"--out={tmp_path / 'new'}", "--dtype=q8_0")
    assert "dtype='q8_0' must be one of" in status and not (tmp_path / "new").exists()
