import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxllm import checkpoint, metrics

ROOT = pathlib.Path(checkpoint.__file__).parents[1]
SCRIPT = ROOT / "experiments" / "train.py"
TIMES = {"compile_seconds", "seconds", "tokens_per_second", "mfu"}

CONFIG = """
from configs import common


def get_config(arg=""):
    config = common.get_config()
    config.model = common.llama(num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_width=8)
    config.model.operand_dtype = "float32"
    config.tokenizer.kind = "bytes"
    config.data.sources.main.path = "{path}"
    config.data.update(dict(validation=0.2, sequence_length=32))
    config.optimizer.warmup = 2
    config.loop.update(dict(steps=8, batch_size=8, micro_batches=2, log_every=2, evaluate_every=4, save_every=4))
    config.loop.update(dict(sample_every=8, sample_tokens=4))
    {more}
    return config
"""


@pytest.fixture
def config(tmp_path):
    """A function: lines of Python that change the config -> the path of a config file of a run of seconds."""
    source = tmp_path / "text.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"document {i} of é some words" * (1 + i % 3)}) + "\n" for i in range(60))
    )

    def config(more="", name="config.py"):
        (tmp_path / name).write_text(CONFIG.format(path=source, more=more))
        return tmp_path / name

    return config


def start(config, workdir, *flags, devices=1):
    """The script, started as a user starts it."""
    environment = os.environ | {
        "XLA_FLAGS": re.sub("device_count=[0-9]+", f"device_count={devices}", os.environ["XLA_FLAGS"]),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONWARNINGS": "error,ignore:the load_module:DeprecationWarning",  # by ml_collections 1.1.0, on Python 3.11
    }
    command = [sys.executable, str(SCRIPT), f"--config={config}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(config, workdir, *flags, **options):
    """Exit status and what it said."""
    process = start(config, workdir, *flags, **options)
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def rows(workdir):
    return [{name: row[name] for name in row.keys() - TIMES} for row in metrics.read(workdir / "metrics.jsonl")]


def wait_for(process, text):
    """Reads what the process says until a line holds the text."""
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said))


# ---- a run ----


def test_a_run_from_the_command_line_is_stopped_by_sigterm_and_continued_by_the_same_command(config, tmp_path):
    """Stopped as soon as the first row is out, wherever it is then: validating, saving, in a step."""
    path = config("config.loop.update(dict(steps=400, log_every=5, evaluate_every=200, save_every=200))")
    process = start(path, tmp_path / "run")
    wait_for(process, "step   5/400")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75 and "the same command continues" in said and "Traceback" not in said, said
    (step,) = [int(entry.name) for entry in (tmp_path / "run" / "checkpoints").iterdir() if entry.name.isdigit()]
    assert 5 <= step < 400 and f"saved at step {step}:" in said
    status, said = run(path, tmp_path / "run")
    assert status == 0 and f"resumed at step {step}" in said, said
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == list(range(5, 401, 5))
    assert (tmp_path / "run" / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "environment.json", "samples.jsonl", "tokenizer", "tokens"} <= {
        entry.name for entry in (tmp_path / "run").iterdir()
    }


@pytest.mark.slow
def test_the_help_names_every_flag_and_the_exit_statuses():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert all(name in done.stdout for name in ("--config", "--workdir", "accept_changes", "distributed", "75"))


# ---- what goes wrong ----


def assert_refused(answer, *parts):
    """Exit status 1, and one message without a stack of calls."""
    status, said = answer
    assert status == 1 and "Traceback" not in said, said
    assert all(part in said for part in parts), said


def test_a_missing_file_ends_with_status_1_and_one_message(config, tmp_path):
    answer = run(config('config.data.sources.main.path = "nowhere.txt"'), tmp_path / "run")
    assert_refused(
        answer, "FileNotFoundError: nowhere.txt does not exist: give a file, a folder, a glob, or 'embedded'"
    )


def written(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return f'config.data.sources.main.path = "{tmp_path / name}"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", b"", ("ValueError", "empty.txt is empty: remove it")),
        ("bad.txt", b"good\n\xff\n", ("bad.txt, line 2: invalid UTF-8, byte 0xff; convert the file to UTF-8",)),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', ("a.jsonl, line 2: no field 'text' in ['body']; set field",)),
        ("image.png", b"\x89PNG", ("image.png is of no kind that can be read: .txt, .json",)),
    ],
)
def test_text_that_cannot_be_read_names_its_place_and_the_mend(config, tmp_path, name, content, parts):
    assert_refused(run(config(written(tmp_path, name, content)), tmp_path / "run"), *parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config.data.sources.main.path=*.nothing"], ("*.nothing matches no file of a kind that can be read",)),
        (["--config.tokenizer.kind=sentencepiece"], ("vocab_size=4096 is larger than the corpus supports: at most",)),
        (["--config.data.sequence_length=1"], ("sequence_length=1 is too short: a row needs at least 2",)),
        (["--config.loop.batch_size=9"], ("batch_size=9 is not a multiple of micro_batches=2",)),
        (["--config.mesh.fsdp=3"], ("mesh.fsdp=3", "is 3 devices, but there are 1; make the product 1")),
        (["--config.optimizer.warmup=8"], ("optimizer.warmup of 8 steps leaves nothing of loop.steps=8; lower it",)),
        (["--distributed=auto,3"], ("--distributed=['auto', '3']", "give auto, or HOST:PORT,COUNT,INDEX")),
    ],
)
def test_values_that_cannot_run_are_named_with_the_mend(config, tmp_path, flags, parts):
    assert_refused(run(config(), tmp_path / "run", *flags), *parts)


@pytest.mark.slow
def test_rows_that_the_mesh_cannot_share_are_named(config, tmp_path):
    answer = run(config(), tmp_path / "run", devices=8)
    assert_refused(
        answer, "a micro-batch of 4 sequences is not a multiple of mesh replica x fsdp = 8; raise batch_size"
    )


@pytest.mark.slow
def test_an_unknown_key_in_the_file_names_the_nearest(config, tmp_path):
    answer = run(config("config.optimizer.learning_rat = 1.0"), tmp_path / "run")
    assert_refused(answer, "config.optimizer.learning_rat is not a known key; did you mean 'learning_rate'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_unknown_key_on_the_command_line_names_the_nearest(config, tmp_path):
    status, said = run(config(), tmp_path / "run", "--config.optimizer.learning_rat=1.0")
    assert status != 0 and "learning_rat" in said and "learning_rate" in said.replace("learning_rat=", ""), said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_of_another_run_or_of_something_else_is_refused_and_accepted_on_request(config, tmp_path):
    assert run(config(), tmp_path / "run")[0] == 0
    flag = "--config.loop.steps=10"
    assert_refused(run(config(), tmp_path / "run", flag), "loop.steps: 8 there, 10 here", "--accept_changes")
    status, said = run(config(), tmp_path / "run", flag, "--accept_changes")
    assert status == 0 and "loop.steps: 8 -> 10" in said and "resumed at step 8" in said, said
    assert rows(tmp_path / "run")[-1]["step"] == 10
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    assert_refused(run(config(), tmp_path / "thesis"), "is not empty and holds no config.json of a run")


# ---- two processes ----

TWO = "config.loop.update(dict(steps=9, log_every=1, sample_every=5))"


def run_two(config, workdir, *, ask_to_stop=False):
    """The same run by two processes of one device each: their exit statuses and what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(config, workdir, f"--distributed=localhost:{port},2,{index}") for index in range(2)]
    if ask_to_stop:
        wait_for(processes[0], "step     2/")
        processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_two_processes_train_as_one(config, tmp_path):
    path = config(TWO)
    statuses, said = run_two(path, tmp_path / "two")
    assert statuses == [0, 0], said
    assert run(path, tmp_path / "one")[0] == 0
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        # The perplexity is the loss's exponential, and its error the loss's times the loss.
        tolerance = {name: 1e-5 if name == "validation_perplexity" else 1e-6 for name in one}
        assert all(two[name] == pytest.approx(one[name], rel=tolerance[name]) for name in one), (one, two)
    first, second = (checkpoint.restore_params(tmp_path / name / "checkpoints") for name in ("one", "two"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), first, second)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on(config, tmp_path):
    """The second one alone is asked to stop."""
    path = config(
        "config.loop.update(dict(steps=10000, log_every=1, sample_every=0, evaluate_every=5000, save_every=5000))"
    )
    statuses, said = run_two(path, tmp_path / "run", ask_to_stop=True)
    assert statuses == [75, 75], said
    stopped = {line for text in said for line in text.splitlines() if "saved at step" in line}
    assert len(stopped) == 1
    step = rows(tmp_path / "run")[-1]["step"]
    assert f"saved at step {step}:" in stopped.pop()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()] == [str(step)]
