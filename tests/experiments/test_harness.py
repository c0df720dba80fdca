import importlib.util
import json
import sys

import pytest


def test_without_the_package_one_message_says_what_to_install(script, untrained_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    status, *_ = script("harness.py", f"--workdir={untrained_run}", "--tasks=arc_easy")
    assert status == "ImportError: EleutherAI's harness is the package lm-eval: pip install lm-eval"


def test_every_flag_reaches_what_it_is_for(script, untrained_run, tmp_path, monkeypatch):
    from jaxllm.evaluate import harness

    asked = []
    monkeypatch.setattr(
        harness, "evaluated", lambda *given, **how: asked.append((given, how)) or {"one": {"acc": 0.25}}
    )
    flags = ("--include_path=here", "--limit=3", "--num_fewshot=2", "--chat", "--sequence_length=12", "--batch_size=2")
    out = tmp_path / "out.json"
    status, printed, _ = script(
        "harness.py", f"--workdir={untrained_run}", "--tasks=one,two", *flags, "--step=1", f"--out={out}"
    )
    assert status == 0 and json.loads(out.read_text()) == {"one": {"acc": 0.25}}
    assert printed.split() == ["one", "acc", "0.25"]
    (((run, tasks), how),) = asked
    assert run.label == f"{untrained_run}@1" and run.length == 12 and tasks == ["one", "two"]
    assert how == dict(batch_size=2, include_path="here", limit=3, num_fewshot=2, apply_chat_template=True)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the optional package lm-eval is not installed")
def test_a_task_of_ones_own_is_measured(script, untrained_run, tmp_path):
    record = {"question": "a", "choices": ["b", "c"], "answer": 0}
    (tmp_path / "mine.jsonl").write_text(json.dumps(record) + "\n")
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/mine.jsonl"}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    status, printed, _ = script(
        "harness.py", f"--workdir={untrained_run}", "--tasks=mine", f"--include_path={tmp_path}"
    )
    assert status == 0 and "acc,none" in printed
