import copy
import json

import pytest

from configs import pipeline
from jaxllm.configure import section
from jaxllm.pipeline import story
from jaxllm.pipeline.config import PipelineConfig
from jaxllm.pipeline.story import Lived

CONFIG = section(PipelineConfig, pipeline.get_config().to_dict())


def record(stage, directory, value=2.0, passed=True, **more):
    """An attempt as ``life`` keeps it."""
    gates = {
        metric: {"value": value, "low": 1.0, "high": 3.0, "passed": passed, "threshold": gate.value}
        | {"bound": gate.bound, "over": gate.over}
        for metric, gate in CONFIG.stages[stage].gates.items()
    }
    done = {"numbers": {}, "said": [], "seconds": 4.0, "tokens": None, "flops": None, "mfu": None, "command": "x"}
    found = {"stage": stage, "attempt": 1, "changes": {}, "directory": str(directory), "gates": gates, "passed": passed}
    return copy.deepcopy(done | found | more)


@pytest.fixture
def told(monkeypatch, tmp_path):
    """A function: stages -> (what is in the report, summary)."""

    def told(*lived):
        seen = {}
        monkeypatch.setattr(story.report, "html", lambda data: seen.update(data) or "<html></html>")
        return seen, story.write(CONFIG, str(tmp_path), lived)

    return told


def test_the_time_of_all_attempts_counts_and_the_numbers_of_the_one_that_was_chosen(told, tmp_path):
    first, second = record("pretrain", tmp_path, 9.0, False), record("pretrain", tmp_path, 2.0, attempt=2)
    _, summary = told(Lived([first, second], second))
    (stage,) = summary["stages"]
    assert stage["seconds"] == 8.0 and stage["value"] == 2.0 and stage["attempts"] == 2 and stage["best"] == "min"
    assert [each["value"] for each in stage["tried"]] == [9.0, 2.0]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_pipeline_is_not_ok_before_its_last_stage_has_passed(told, tmp_path):
    records = [record(name, tmp_path) for name in CONFIG.order]
    lived = [Lived([each], each) for each in records]
    assert not told(*lived[:-1])[1]["ok"] and told(*lived)[1]["ok"]
    failed = record("clean", tmp_path, 0.1, False)
    seen, summary = told(Lived([failed], failed), *lived[1:])
    assert not summary["ok"] and seen["failures"] == ["clean: kept 0.1 ≥ 0.5 fell short"]


def test_the_same_questions_stand_beside_what_each_model_answered(told, tmp_path):
    def answered(name, text):
        said = [{"prompt": "2+2?", "kind": "chat", "expected": ["4"], "answer": text}]
        one = record(name, tmp_path, said=said)
        return Lived([one], one)

    silent = record("reward", tmp_path)
    seen, _ = told(answered("random", "xq"), answered("sft", "4"), Lived([silent], silent))
    assert seen["questions"] == [{"prompt": "2+2?", "kind": "chat", "expected": ["4"]}]
    assert seen["transcript"] == {"random": ["xq"], "sft": ["4"]}


def test_the_scoreboard_has_the_measures_alone_and_the_curves_what_was_trained(told, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    numbers = {"text": {"value": 1.0, "low": 0.5, "high": 2.0, "count": 3}, "validation_loss": 7.0}
    one, other = record("sft", tmp_path / "sft", numbers=numbers), record("reward", tmp_path / "none")
    seen, _ = told(Lived([one], one), Lived([other], other))
    assert seen["board"] == [{"stage": "sft", "from": "pretrain", "values": {"text": numbers["text"]}}]
    assert seen["curves"] == {"sft": [{"step": 1, "loss": 2.0}]}


def test_a_verdict_says_each_gate_with_its_bound_the_metric_first():
    one = record("ppo", "x", 0.25, False)
    lines = list(story.verdict(CONFIG.stages["ppo"], one))
    assert lines[0].startswith("  wins 0.25 ≥ 0.55 ") and "fell short" in lines[0] and "drift 0.25 ≤ 20" in lines[1]
