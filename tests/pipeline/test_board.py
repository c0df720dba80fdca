import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest

from configs.pipeline import measure
from jaxllm.configure import section
from jaxllm.pipeline import board as boards
from jaxllm.pipeline.config import MeasureConfig

QUESTIONS = [{"prompt": f"{letter}?", "references": [letter]} for letter in "abcdef"]


def board(seed=0, prompts=(), **measures):
    made = {name: section(MeasureConfig, each.to_dict()) for name, each in measures.items()}
    return SimpleNamespace(row=partial(boards.row, measures=made, prompts=prompts, seed=seed))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n{"text": "and others"}\n')
    return {"asked": str(tmp_path / "questions.jsonl"), "text": str(tmp_path / "text.jsonl")}


def short(*args, **changes):
    return measure(*args, max_new_tokens=4, batch_size=4, **changes)


def test_a_row_has_each_measure_with_its_interval_and_count(untrained, files):
    row = board(
        bits=short("perplexity", "bits_per_byte", "bits", "min", file="{text}"),
        nats=short("perplexity", "nats_per_token", "nats", "min", file="{text}"),
        right=short("answers", "exact_match", "share", "max", file="{asked}", count=4),
        sums=short("tasks", "accuracy", "share", "max", task="addition", level=1, count=3),
    ).row(str(untrained(64)), files)
    counts = {name: value["count"] for name, value in row.values.items()}
    assert counts == {"bits": 2, "nats": 2, "right": 4, "sums": 3}
    # Ids are bytes here, and each document has one more to end it.
    nats, bits = row.values["nats"], row.values["bits"]
    assert bits["value"] == pytest.approx(nats["value"] * 22 / 20 / 0.6931472, rel=1e-6)
    assert nats["low"] <= nats["value"] <= nats["high"] and row.said == []
    assert row.values["right"]["value"] == 0.0 < row.values["right"]["high"]


def test_what_is_said_of_a_measure_decides_no_row():
    one = section(MeasureConfig, short("answers", "exact_match", "share", "max", file="{asked}").to_dict())

    def wanted(prompts=("Once",), **changes):
        return boards.wanted({"one": dataclasses.replace(one, **changes)}, prompts)

    assert wanted() == json.loads(json.dumps(wanted())) == wanted(about="x", best="min", unit="points")
    assert all(each != wanted() for each in (wanted(shown=1), wanted(metric="rouge_l"), wanted(count=3), wanted(())))


def test_a_suite_measures_what_it_says(untrained, files):
    names = ("perplexity", "{text}", ""), ("answers", "{asked}", ""), ("tasks", "", "addition")
    for suite, file, task in names:
        made = section(MeasureConfig, short(suite, "", "number", "max", file=file, task=task, count=2).to_dict())
        measures = dict.fromkeys(boards.metrics(made), made)
        each = {name: dataclasses.replace(made, metric=name) for name in measures}
        assert boards.row(str(untrained(64)), files, measures=each).values.keys() == measures.keys() > set()


def test_the_transcript_has_continuations_and_answers_that_are_spread_over_the_items(untrained, files):
    asked = short("answers", "exact_match", "share", "max", file="{asked}", shown=3)
    row = board(prompts=("Once",), right=asked).row(str(untrained(64)), files)
    assert [(each["prompt"], each["kind"], each["expected"]) for each in row.said] == [
        ("Once", "text", []), ("b?", "chat", ["b"]), ("d?", "chat", ["d"]), ("f?", "chat", ["f"]),
    ]  # fmt: skip
    assert all(isinstance(each["answer"], str) for each in row.said)


def test_measures_of_the_same_answers_are_taken_once(untrained, files, monkeypatch):
    taken, asked = [], boards._asked
    monkeypatch.setattr(boards, "_asked", lambda *given: taken.append(given[2]) or asked(*given))
    board(
        one=short("answers", "exact_match", "share", "max", file="{asked}", about="x"),
        two=short("answers", "rouge_l", "share", "max", file="{asked}", shown=1),
        three=short("answers", "exact_match", "share", "max", file="{asked}", temperature=1.0),
    ).row(str(untrained(64)), files)
    assert [each.temperature for each in taken] == [0.0, 1.0]


def test_a_win_rate_is_taken_once_there_is_whom_to_win_against(untrained, files):
    wins = short("win_rate", "win_rate", "share", "max", file="{asked}", against="sft", temperature=1.0)
    drift = short("win_rate", "kl", "nats", "min", file="{asked}", against="sft", temperature=1.0)
    made, run = board(wins=wins, drift=drift), str(untrained(64))
    assert made.row(run, files).values == {}
    assert boards.metrics(section(MeasureConfig, wins.to_dict())) == ["win_rate", "kl"]
    itself = made.row(run, files | {"sft": run}).values
    assert itself["wins"]["value"] == 0.5 and itself["drift"]["value"] == 0.0
    other = made.row(run, files | {"sft": f"{run}@1"}).values
    assert other["drift"]["value"] > 0 and other["drift"]["low"] < other["drift"]["value"] < other["drift"]["high"]
    assert 0 <= other["wins"]["low"] <= other["wins"]["value"] <= other["wins"]["high"] <= 1


def test_the_same_seed_gives_the_same_row(untrained, files):
    asked = short("answers", "rouge_l", "share", "max", file="{asked}", temperature=1.0, shown=6)
    rows = [board(seed, right=asked).row(str(untrained(64)), files) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] and rows[0].said != rows[2].said
