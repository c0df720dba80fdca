import io
import json
import math

import pytest
from rich.console import Console

from jaxllm.evaluate.measures import mean, share
from jaxllm.evaluate.reporting import bars, report, rows, suite, table
from jaxllm.evaluate.suites import Asking, Evaluation, Settings

ITEMS = {
    "one@2": [
        {"group": "qa", "prompt": "a", "scores": {"right": 1.0, "size": 2.0}},
        {"group": "qa", "prompt": "b", "scores": {"right": 1.0, "size": 4.0}},
        {"group": "", "prompt": "c", "scores": {}, "too_long": True},
    ],
    "two@1": [
        {"group": "qa", "prompt": "a", "scores": {"right": 0.0, "size": 1.0}},
        {"group": "qa", "prompt": "b", "scores": {"right": 1.0, "size": 1.0}},
        {"group": "", "prompt": "c", "scores": {}},
    ],
}
METRICS = [share("right"), mean("size"), share("never")]


def evaluation(*labels):
    return Evaluation(METRICS, {label: ITEMS[label] for label in labels}, {"all": [0, 1, 2], "qa": [0, 1]})


def printed(shown):
    console = Console(width=200, file=io.StringIO())
    console.print(shown)
    return console.file.getvalue()


def test_a_report_has_every_measure_and_what_was_left_out():
    made = report(evaluation("one@2"), Settings(count=3))
    assert made["run"] == "one@2" and made["settings"]["count"] == 3 and made["too_long"] == 1 and made["cut"] == 0
    assert made["groups"]["all"]["right"][0] == 1.0 and made["groups"]["all"]["right"].count == 2
    assert "compared" not in made and made["groups"]["qa"]["size"].value == 3.0


def test_two_runs_stand_beside_each_other_with_their_differences():
    made = report(evaluation("one@2", "two@1"), Settings())
    other = made["compared"]
    assert other["run"] == "two@1" and other["groups"]["qa"]["right"].value == 0.5
    found = other["differences"]["all"]["right"]
    assert (found.first, found.second, found.difference, found.test) == (1.0, 0.5, 0.5, "mcnemar")


def test_the_table_shows_values_intervals_and_counts_and_what_there_is_none_of():
    text = printed(table(report(evaluation("one@2"), Settings())))
    lines = {tuple(line.split("│")[1:3]): line for line in text.splitlines() if "│" in line}
    cells = {tuple(cell.strip() for cell in key): line for key, line in lines.items()}
    assert "0.3424 to 1" in cells["all", "right"] and cells["all", "right"].rstrip(" │").endswith("2")
    assert cells["all", "never"].count("n/a") == 2 and "3" in cells["qa", "size"] and "one@2" in text


def test_the_table_of_two_shows_both_and_the_test():
    text = printed(table(report(evaluation("one@2", "two@1"), Settings())))
    assert "first: one@2, second: two@1" in text and "difference" in text
    line = next(line for line in text.splitlines() if "right" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")][:5] == ["all", "right", "1", "0.5", "0.5"]
    never = next(line for line in text.splitlines() if "never" in line)
    assert never.count("n/a") == 5


def test_bars_are_drawn_of_what_has_a_value():
    panels = bars(report(evaluation("one@2", "two@1"), Settings()))
    assert list(panels) == ["right", "size"] and list(panels["right"]) == ["one@2", "two@1"]
    assert panels["size"]["one@2"]["all"][0] == 3.0 and panels["right"]["two@1"]["qa"][0] == 0.5
    alone = Evaluation(METRICS[1:2], {"one": ITEMS["one@2"][:1]}, {"all": [0]})
    assert bars(report(alone, Settings()))["size"]["one"]["all"] == [2.0, None, None]


def test_the_rows_are_every_runs_items_numbered():
    found = rows(evaluation("one@2", "two@1"))
    assert [(row["run"], row["item"], row["prompt"]) for row in found[2:4]] == [("one@2", 2, "c"), ("two@1", 0, "a")]


@pytest.fixture
def choices(tmp_path):
    records = [{"prompt": "q", "choices": ["a", "b"], "answer": number % 2} for number in range(4)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Settings(files={"": f"{tmp_path}/c.jsonl"}, asking=Asking())


def test_suites_stand_side_by_side_in_the_run(untrained, choices, capsys, tmp_path):
    directory = untrained(32)
    (tmp_path / "t.txt").write_text("some text")
    suite("perplexity", str(directory), Settings(files={"": f"{tmp_path}/t.txt"}))
    suite("choice", str(directory), choices, compare=f"{directory}@1")
    written = json.loads((directory / "evaluation.json").read_text())
    assert written["bytes"] == 9 and list(written["suites"]) == ["choice", "perplexity"]
    assert written["suites"]["perplexity"]["groups"]["all"]["nats_per_token"]["value"] == written["nats_per_token"]
    assert written["suites"]["perplexity"]["groups"]["all"]["nats_per_token"]["low"] is None
    assert written["suites"]["choice"]["compared"]["run"] == f"{directory}@1"
    items = [json.loads(line) for line in (directory / "evaluation_items.jsonl").read_text().splitlines()]
    assert [item["suite"] for item in items] == ["perplexity"] + ["choice"] * 8
    assert items[0]["scores"]["bytes"] == 9 and math.isfinite(items[1]["logps"][0])
    assert (directory / "figures" / "evaluation.png").stat().st_size > 5000
    assert "accuracy_per_byte" in capsys.readouterr().out


def test_a_run_is_not_compared_with_itself_however_it_is_spelled(untrained, choices, monkeypatch):
    run = untrained(32)
    monkeypatch.chdir(run.parent)
    for other in (str(run), f"{run}@2", "run", f"../{run.parent.name}/run"):
        with pytest.raises(ValueError, match="is the same checkpoint: name another one, as DIR@STEP"):
            suite("choice", str(run), choices, compare=other)
    with pytest.raises(ValueError, match="is the same checkpoint"):
        suite("choice", str(run), choices, step=1, compare="run@1")
