import json
import math

import pytest

from jaxllm.evaluate import suites
from jaxllm.evaluate.measures import share
from jaxllm.evaluate.suites import (
    SUITES,
    Asking,
    Evaluation,
    Run,
    Settings,
    evaluated,
    loaded,
    named_files,
    named_levels,
)

TEXTS = ["A first text, longer than one row.", "é☃", "short"]
CHOICES = [
    {"question": "sky", "choices": ["blue", "a long green"], "answer": 0},
    {"question": "x", "choices": ["no", "yes"], "answer": 1},
]
ANSWERS = [{"prompt": "a", "references": ["x", "y"]}, {"prompt": "bcd", "answer": "4"}, {"prompt": "e"}]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def given(tmp_path):
    """A function: suite, options of asking -> the settings with something to ask."""

    def given(name, **asking):
        files = {
            "perplexity": {"one": jsonl(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS])},
            "choice": {"": jsonl(tmp_path / "c.jsonl", CHOICES)},
            "answers": {"qa": jsonl(tmp_path / "a.jsonl", ANSWERS)},
            "tasks": {},
        }[name]
        how = dict(max_new_tokens=4, workers=0, samples=2, temperature=1.0) | asking
        return Settings(files=files, tasks={"addition": 1, "bandit": 1}, count=3, asking=Asking(**how))

    return given


@pytest.fixture(scope="module")
def directory(untrained):
    return str(untrained(64))


@pytest.mark.parametrize("name", SUITES)
def test_no_number_depends_on_the_batch_size(directory, given, name):
    """C18"""
    found = [
        evaluated(name, [lambda: loaded(directory)], {}, given(name, batch_size=size)).measures(f"{directory}@2")
        for size in (1, 8, 64)
    ]
    for group, measures in found[0].items():
        for metric, measure in measures.items():
            for other in found[1:]:
                assert other[group][metric] == pytest.approx(measure, rel=1e-6, abs=1e-9, nan_ok=True), (group, metric)
    assert sum(not math.isnan(measure.value) for measure in found[0]["all"].values()) >= 3


def test_items_of_named_files_and_of_tasks_are_groups(directory, given):
    found = evaluated("tasks", [lambda: loaded(directory)], {}, given("tasks"))
    numbers = {"all": [0, 1, 2, 3, 4, 5], "addition:1": [0, 1, 2], "bandit:1": [3, 4, 5]}
    assert found.groups == numbers
    assert [metric.name for metric in found.metrics] == [
        "accuracy", "format", "pass@1", "pass@2", "answer_tokens", "answers_ended",
    ]  # fmt: skip
    assert list(evaluated("perplexity", [lambda: loaded(directory)], {}, given("perplexity")).groups) == ["all", "one"]
    assert list(evaluated("choice", [lambda: loaded(directory)], {}, given("choice")).groups) == ["all"]


def test_measures_and_differences_are_of_each_group():
    metric, other = share("x"), share("y")
    items = {
        "one": [{"group": "a", "scores": {"x": 1.0}}, {"group": "b", "scores": {"x": 0.0}}],
        "two": [{"group": "a", "scores": {"x": 0.0}}, {"group": "b", "scores": {"x": 0.0}}],
    }
    found = Evaluation([metric, other], items, {"all": [0, 1], "a": [0], "b": [1]})
    values = {group: measures["x"].value for group, measures in found.measures("one").items()}
    assert values == {"all": 0.5, "a": 1.0, "b": 0.0} and found.measures("one")["all"]["y"].count == 0
    gaps = {group: differences["x"].difference for group, differences in found.differences().items()}
    assert gaps == {"all": 0.5, "a": 1.0, "b": 0.0}


def test_every_run_is_asked_the_same_and_only_one_is_in_memory(monkeypatch):
    alive, asked = [], []

    def measure(run, questions, settings):
        asked.append((run.label, questions))
        return [{"group": "", "scores": {"x": 1.0}}] * 2

    def load(label):
        alive.append(label)
        return Run(label, None, None, None, 8)

    monkeypatch.setitem(
        SUITES, "own", suites.Suite(lambda settings, config: ["q", "r"], measure, lambda _: [share("x")])
    )
    found = evaluated("own", [lambda: load("one"), lambda: load("two")], {}, Settings())
    assert asked == [("one", ["q", "r"]), ("two", ["q", "r"])] and list(found.items) == ["one", "two"]


def test_a_run_is_loaded_at_its_newest_step_and_its_length_unless_told(directory):
    assert loaded(directory).label == f"{directory}@2" and loaded(directory).length == 64
    run = loaded(directory, step=1, sequence_length=5)
    assert (run.label, run.length) == (f"{directory}@1", 5)


def test_files_have_names_or_one_of_them_none(tmp_path):
    assert named_files([]) == {} and named_files(["a/*.txt"]) == {"": "a/*.txt"}
    assert named_files(["one=a=b.txt", "two=c,three=d/{x}"]) == {"one": "a=b.txt", "two": "c", "three": "d/{x}"}
    assert named_files(["a,b.txt"]) == {"": "a,b.txt"} and named_files(["a/b=c.txt"]) == {"": "a/b=c.txt"}
    (tmp_path / "seed=3").mkdir()
    assert named_files([f"{tmp_path}/seed=3"]) == {"": f"{tmp_path}/seed=3"}
    with pytest.raises(ValueError, match="--files names 'a' twice: b and c; give each a NAME= of its own"):
        named_files(["a=b", "a=c"])


def test_no_file_has_the_name_of_all_together():
    with pytest.raises(ValueError, match="--files=all=a.jsonl: so all files together are named; give another NAME="):
        Settings(files={"all": "a.jsonl", "b": "b.jsonl"})


def test_tasks_have_levels():
    assert named_levels("addition:2,counting") == {"addition": 2, "counting": 1} and named_levels("") == {}
    with pytest.raises(ValueError, match="'addition:x' is no task and level: write such as addition:2"):
        named_levels("addition:x")
    with pytest.raises(
        ValueError, match="--tasks names 'addition' twice, the second time as 'addition:2': ask for one"
    ):
        named_levels("addition:1,addition:2")


def test_what_is_missing_is_named(directory, given):
    runs = [lambda: loaded(directory)]
    with pytest.raises(ValueError, match="'choice' has nothing to ask: give it --files"):
        evaluated("choice", runs, {}, Settings())
    with pytest.raises(ValueError, match="no task is named: give --tasks"):
        evaluated("tasks", runs, {}, Settings())
    with pytest.raises(ValueError, match="no sources to hold conversations out of: give --files"):
        evaluated("answers", runs, {"data": {}}, Settings())


def test_a_count_limits_each_file(directory, given):
    from dataclasses import replace

    settings = replace(given("answers"), count=2)
    assert len(SUITES["answers"].ask(settings, {})) == 2
    assert len(SUITES["choice"].ask(replace(given("choice"), count=1), {})) == 1
    assert len(SUITES["choice"].ask(replace(given("choice"), count=0), {})) == 2
    found = evaluated("perplexity", [lambda: loaded(directory)], {}, replace(given("perplexity"), count=2))
    assert found.groups == {"all": [0, 1], "one": [0, 1]}


def test_no_count_and_no_length_is_below_nothing():
    with pytest.raises(ValueError, match="count=-1, sequence_length=0: each must be 0 or more"):
        Settings(count=-1)
    with pytest.raises(ValueError, match="count=0, sequence_length=-2: each must be 0 or more"):
        Settings(sequence_length=-2)
