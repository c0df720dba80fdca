import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from configs import quickstart
from jaxllm import run_config, workdir

ROOT = pathlib.Path(workdir.__file__).parents[1]
SCRIPT = ROOT / "experiments" / "quickstart.py"
CLOCKS = {"seconds", "mfu", "command", "directory"}
STAGES = quickstart.get_config("tiny").order


def start(directory):
    """The tiny pipeline, started as a user starts it, in one device's process."""
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(SCRIPT), "--config=configs/quickstart.py:tiny", f"--workdir={directory}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def lived(directory):
    process = start(directory)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said.decode()[-3000:]
    return said.decode()


def numbers(directory):
    """What the stages came to, without clocks and places."""
    summary = json.loads((directory / "summary.json").read_text())
    stages = [{key: value for key, value in stage.items() if key not in CLOCKS} for stage in summary["stages"]]
    records = [json.loads((directory / "attempts" / f"{name}_1.json").read_text()) for name in STAGES]
    return stages, [(record["numbers"], record["row"]) for record in records]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A pipeline that nothing disturbed, and what it said."""
    directory = tmp_path_factory.mktemp("straight") / "life"
    return directory, lived(directory)


@pytest.mark.slow
def test_every_stage_is_run_in_order_and_told_in_a_summary_and_a_page(straight):
    directory, said = straight
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["ok"] and tuple(stage["name"] for stage in summary["stages"]) == STAGES
    wanted = {"name", "metric", "value", "threshold", "passed", "attempts", "seconds", "tokens", "flops"}
    assert all(wanted <= stage.keys() and stage["value"] is not None for stage in summary["stages"])
    trained = {stage["name"]: stage["tokens"] for stage in summary["stages"] if stage["tokens"]}
    assert trained.keys() == {"pretrain", "sft", "reward", "ppo", "dpo", "grpo"}
    page = (directory / "report.html").read_text()
    assert all(name in page for name in STAGES) and "http" not in page.replace("http-equiv", "")
    assert all(f"{place}/{len(STAGES)} {name}" in said for place, name in enumerate(STAGES, 1))


@pytest.mark.slow
def test_each_run_is_the_one_that_its_command_names(straight, monkeypatch):
    """What the page tells a reader to type is what was run."""
    checked = []
    for stage in json.loads((straight[0] / "summary.json").read_text())["stages"]:
        python, script, *given = shlex.split(stage["command"])
        assert python == "python" and (ROOT / script).is_file()
        if script.endswith("train.py"):
            monkeypatch.setattr(sys, "argv", [script, *given])  # where the flags of a config look for themselves
            values = flags.FlagValues()
            config_flags.DEFINE_config_file("config", flag_values=values)
            flags.DEFINE_string("workdir", None, "", flag_values=values)
            values(sys.argv)
            assert values.workdir == stage["directory"]
            named = run_config.resolved(values.config.to_dict())
            assert json.loads(json.dumps(named)) == workdir.config(stage["directory"])
            checked.append(stage["name"])
    assert tuple(checked) == STAGES[-7:]


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["pretrain", "dpo", "grpo"])
def test_a_pipeline_that_is_killed_goes_on_to_the_same_numbers(straight, tmp_path, stage):
    directory = tmp_path / "life"
    with start(directory) as process:
        while not (directory / stage / "metrics.jsonl").exists():
            assert process.poll() is None, process.stdout.read().decode()[-3000:]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (directory / "attempts" / f"{stage}_1.json").exists()
    lived(directory)
    assert numbers(directory) == numbers(straight[0])
