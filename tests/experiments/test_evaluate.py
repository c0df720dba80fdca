import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxllm import workdir
from jaxllm.text.special_tokens import BOS_ID, EOS_ID

CONTRACT = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes")
TEXTS = ["A first text, longer than one row of sixteen tokens.", "é☃", "short", ""]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path


def pieces_of(texts, length):
    """The stream of all pairs is cut every ``length``: where the pieces of each text begin and end."""
    position, cuts = 0, []
    for text in texts:
        count = len(text.encode()) + 1
        ends = [end for end in range(count) if (position + end) % length == 0 and end] + [count]
        cuts.append(list(zip([0, *ends[:-1]], ends, strict=True)))
        position += count
    return cuts


@pytest.mark.parametrize("length", [16, 64])
def test_the_evaluation_is_that_of_whole_distributions_over_every_token_and_byte(untrained_run, files, script, length):
    status, printed, said = script(
        "evaluate.py", f"--workdir={untrained_run}", f"--files={files}/*.jsonl", f"--sequence_length={length}"
    )
    assert status == 0, said
    result = json.loads((untrained_run / "evaluation.json").read_text())
    model, params, tokenizer = workdir.load(untrained_run)
    nats = []
    for text, pieces in zip(TEXTS, pieces_of(TEXTS, length), strict=True):
        tokens = np.array([BOS_ID, *tokenizer.encode(text), EOS_ID])
        for start, end in pieces:
            logp_BTV = jax.nn.log_softmax(model.forward(params, tokens[None, start:end]))
            nats += [-float(logp_BTV[0, t, tokens[start + t + 1]]) for t in range(end - start)]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result["tokens"] == len(nats) == num_bytes + len(TEXTS) and result["bytes"] == num_bytes
    assert result["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-5)
    assert all(name in result and name in printed for name in CONTRACT)


def test_the_batch_size_changes_nothing_and_the_step_does(untrained_run, files, script):
    found = {}
    for flags in ((), ("--batch_size=1",), ("--batch_size=3",), ("--step=1",)):
        assert script("evaluate.py", f"--workdir={untrained_run}", f"--files={files}", *flags)[0] == 0
        written = json.loads((untrained_run / "evaluation.json").read_text())
        found[flags] = {name: written[name] for name in CONTRACT}
    first, *same, other = found.values()
    assert all(result == pytest.approx(first, rel=1e-6) for result in same)
    assert other["nats_per_token"] != pytest.approx(first["nats_per_token"], rel=1e-3)


def test_another_field_is_read_on_request(untrained_run, tmp_path, script):
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": "words"}) + "\n")
    status, *_ = script("evaluate.py", f"--workdir={untrained_run}", f"--files={tmp_path}", "--field=body")
    assert status == 0 and json.loads((untrained_run / "evaluation.json").read_text())["bytes"] == 5
    status, *_ = script("evaluate.py", f"--workdir={untrained_run}", f"--files={tmp_path}")
    assert "b.jsonl, line 1: no field 'text' in ['body']" in status


def test_what_is_missing_is_named_in_one_message(untrained_run, files, tmp_path, script):
    status, *_ = script("evaluate.py", f"--workdir={tmp_path}/nowhere", f"--files={files}")
    assert status.startswith("FileNotFoundError: no run in ") and "give a --workdir that train.py made" in status
    status, *_ = script("evaluate.py", f"--workdir={untrained_run}", f"--files={tmp_path}/*.parquet")
    assert "matches no file of a kind that can be read" in status
    status, *_ = script("evaluate.py", f"--workdir={untrained_run}", f"--files={files}", "--step=9")
    assert "no checkpoint of step 9" in status and "it has [2, 1]" in status


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evaluate.py", "generate.py", "show_tokens.py"])
def test_a_script_started_from_any_directory_explains_itself(script, tmp_path, name):
    root = workdir.__file__.rsplit("/jaxllm/", 1)[0]
    command = [sys.executable, "-W", "error", f"{root}/experiments/{name}", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"python experiments/{name}" in done.stdout and done.stderr == ""


def test_the_help_names_every_flag(script):
    status, printed, _ = script("evaluate.py", "--help")
    flags = ("--workdir", "--suite", "--files", "--field", "--sequence_length", "--batch_size", "--step")
    assert status == 0 and all(flag in printed for flag in flags)
