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


@pytest.mark.parametrize("length", [16, 64])
def test_the_evaluation_is_that_of_whole_distributions_over_every_token_and_byte(untrained_run, files, script, length):
    status, printed, said = script(
        "evaluate.py", f"--workdir={untrained_run}", f"--files={files}/*.jsonl", f"--sequence_length={length}"
    )
    assert status == 0, said
    result = json.loads((untrained_run / "evaluation.json").read_text())
    model, params, tokenizer = workdir.load(untrained_run)
    nats = []
    for text in TEXTS:
        tokens = np.array([BOS_ID, *tokenizer.encode(text), EOS_ID])
        for start in range(0, len(tokens) - 1, length):
            end = min(start + length, len(tokens) - 1)
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
    assert status.startswith("FileNotFoundError: no run in ") and "name a directory that train.py made" in status
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
    names = (
        "workdir suite files compare tasks count chat samples temperature max_new_tokens seed workers ensemble field"
    )
    flags = [f"--{name}" for name in f"{names} sequence_length batch_size step".split()]
    assert status == 0 and all(flag in printed for flag in flags)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_answers_are_compared_in_a_table_a_file_and_a_figure(script, untrained, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = untrained(48)
    records = [{"prompt": f"q{number}", "references": ["x"], "answer": str(number)} for number in range(4)]
    flags = ("--max_new_tokens=4", "--samples=2", "--temperature=1", "--workers=0", "--seed=3", "--batch_size=2")
    files = f"--files=one={jsonl(tmp_path / 'a.jsonl', records)},two={jsonl(tmp_path / 'b.jsonl', records[:2])}"
    status, printed, said = script(
        "evaluate.py", f"--workdir={run}", "--suite=answers", files, f"--compare={run}@1", "--count=3", *flags
    )
    assert status == 0, said
    written = json.loads((run / "evaluation.json").read_text())["suites"]["answers"]
    assert {name: group["bleu"]["count"] for name, group in written["groups"].items()} == {"all": 5, "one": 3, "two": 2}
    assert written["settings"]["asking"] == {
        "samples": 2, "temperature": 1.0, "max_new_tokens": 4, "batch_size": 2, "seed": 3, "workers": 0,
        "time_limit": 10.0,
    }  # fmt: skip
    assert written["compared"]["differences"]["all"]["pass@2"]["test"] == "mcnemar"
    assert "pass@2" in printed and "difference" in printed and f"second:{run}@1" in "".join(printed.split())
    assert (run / "figures" / "evaluation.png").exists()


def test_tasks_and_choices_are_measured_at_a_step(script, untrained, tmp_path):
    run = untrained(48)
    flags = (f"--workdir={run}", "--step=1", "--workers=0", "--max_new_tokens=4")
    assert script("evaluate.py", *flags, "--suite=tasks", "--tasks=addition:2,bandit", "--count=2")[0] == 0
    records = [{"prompt": [{"role": "user", "content": "q"}], "choices": ["a", "b"], "answer": 0}]
    files = f"--files={jsonl(tmp_path / 'c.jsonl', records)}"
    assert script("evaluate.py", *flags, "--suite=choice", files, "--chat", "--sequence_length=20")[0] == 0
    written = json.loads((run / "evaluation.json").read_text())["suites"]
    assert list(written["tasks"]["groups"]) == ["addition:2", "all", "bandit:1"]
    assert written["tasks"]["run"] == written["choice"]["run"] == f"{run}@1"
    assert written["choice"]["settings"]["form"] == "chat" and written["choice"]["settings"]["sequence_length"] == 20


def test_the_likelihood_of_each_domain_has_its_interval(script, untrained_run, files, tmp_path):
    other = jsonl(tmp_path / "other.jsonl", [{"text": "other words"}])
    flags = (f"--files=mine={files}/a.jsonl", f"--files=theirs={other}")
    assert script("evaluate.py", f"--workdir={untrained_run}", *flags)[0] == 0
    written = json.loads((untrained_run / "evaluation.json").read_text())
    groups = written["suites"]["perplexity"]["groups"]
    assert groups["all"]["nats_per_token"]["count"] == 5 and groups["mine"]["bits_per_byte"]["count"] == 4
    assert groups["mine"]["nats_per_token"]["low"] < groups["mine"]["nats_per_token"]["value"]
    assert groups["theirs"]["nats_per_token"]["low"] is None
    assert groups["all"]["bits_per_byte"]["value"] == pytest.approx(written["bits_per_byte"])


def test_reward_models_are_measured_beside_the_other_suites(script, untrained_run, monkeypatch):
    from jaxllm.evaluate import rewarding
    from jaxllm.evaluate.ranking import calibration

    asked = []
    report = {"pairs": 3, "accuracy": {"value": 0.5}}
    monkeypatch.setattr(
        rewarding, "accuracy", lambda *given, **how: asked.append((given, how)) or (report, calibration([1.0]))
    )
    flags = ("--suite=reward", "--files=pairs.jsonl", "--step=1", "--ensemble", "other")
    status, printed, _ = script("evaluate.py", f"--workdir={untrained_run}", *flags)
    assert status == 0 and asked == [(([str(untrained_run), "other"],), {"path": "pairs.jsonl", "step": 1})]
    written = json.loads((untrained_run / "evaluation.json").read_text())
    assert written["suites"]["reward"] == report and written["pairs"] == 3 and "accuracy" in printed
    assert (untrained_run / "figures" / "calibration.png").exists()


@pytest.mark.parametrize("flags", [["--compare=a"], ["--count=3"], ["--files=a", "--files=b"], ["--files=one=a"]])
def test_what_the_suite_reward_cannot_do_is_refused(script, tmp_path, flags):
    status, *_ = script("evaluate.py", f"--workdir={tmp_path}", "--suite=reward", *flags)
    assert status.startswith(
        "ValueError: --suite=reward takes one --files=GLOB without a NAME=, and no --compare and no"
    )
