import copy
import json
import os
import shlex

import pytest

from configs.pipeline import behind, least, measure, most, stage
from jaxllm.configure import section
from jaxllm.pipeline import life
from jaxllm.pipeline.config import PipelineConfig, StageConfig, flat
from jaxllm.pipeline.kinds import Kind

DOUBLE = {"loop": {"steps": 2.0}}


def config(**stages):
    """A pipeline of stages that say what they must reach; nothing is measured."""
    return {
        "title": "",
        "seed": 5,
        "order": tuple(stages),
        "stages": {name: each.to_dict() for name, each in stages.items()},
        "measures": {},
        "files": {"raw": "raw.txt"},
        "prompts": (),
    }


def part(start="{raw}", reach=1.0, gates=None, **changes):
    """A stage whose number is its steps over 100."""
    made = stage("train", "does something")
    made.run = {"start": start, "seed": 0, "loop": {"steps": 100, "rate": 0.5}}
    behind(made, **(gates or {"reached": least(reach)}))
    made.update(changes)
    return made


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The (values, directory) of every stage that was run, whose results are kept on the disk."""
    calls = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.txt").write_text("raw")

    def run(values, directory):
        calls.append((copy.deepcopy(values), directory))
        os.makedirs(directory, exist_ok=True)
        if run.fails and run.fails.pop(0):
            raise run.error
        return {"reached": flat(values)["loop.steps"] / 100, "rate": flat(values)["loop.rate"]}

    run.fails, run.error = [], KeyboardInterrupt()
    calls_of = Kind(run, lambda directory: {"tokens": 10, "flops": 1e6, "mfu": None}, "do.py", prefix="config.")
    monkeypatch.setitem(life.KINDS, "train", calls_of)
    calls.clear()
    run.calls = calls
    return run


def lived(values, directory):
    return life.live(values, str(directory), untold=lambda config: {})


def test_stages_run_in_order_each_on_what_the_one_before_it_left(ran, tmp_path):
    summary = lived(config(one=part(), two=part("{one}")), tmp_path / "run")
    assert [directory for _, directory in ran.calls] == [f"{tmp_path}/run/one", f"{tmp_path}/run/two"]
    assert [values["start"] for values, _ in ran.calls] == ["raw.txt", f"{tmp_path}/run/one"]
    assert all(values["seed"] == 5 for values, _ in ran.calls)
    assert summary["ok"] and [each["name"] for each in summary["stages"]] == ["one", "two"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert "</html>" in (tmp_path / "run" / "report.html").read_text()


def test_the_summary_has_what_others_read_of_it(ran, tmp_path):
    summary = lived(config(one=part()), tmp_path / "run")
    assert {"ok", "seconds", "stages"} <= summary.keys()
    wanted = {"name": "one", "metric": "reached", "value": 1.0, "threshold": 1.0, "passed": True, "attempts": 1}
    (found,) = summary["stages"]
    assert {key: found[key] for key in wanted} == wanted
    assert found["tokens"] == 10 and found["flops"] == 1e6 and found["seconds"] >= 0


def test_what_falls_short_is_adjusted_and_run_again_in_a_directory_of_its_own(ran, tmp_path):
    adjust = {"loop": {"steps": 1.5, "rate": 0.5}}
    summary = lived(config(one=part(reach=2.0, attempts=3, adjust=adjust), two=part("{one}")), tmp_path / "run")
    loops = [values["loop"] for values, _ in ran.calls]
    assert loops[:3] == [{"steps": n, "rate": rate} for n, rate in ((100, 0.5), (150, 0.25), (225, 0.125))]
    assert [os.path.basename(directory) for _, directory in ran.calls] == ["one", "one_2", "one_3", "two"]
    assert ran.calls[-1][0]["start"].endswith("one_3")
    one = summary["stages"][0]
    assert one["attempts"] == 3 and one["passed"] and one["value"] == 2.25 and summary["ok"]
    assert [each["value"] for each in one["tried"]] == [1.0, 1.5, 2.25]
    assert one["tried"][2]["changes"]["loop.steps"] == [100, 225]


def test_attempts_are_bounded_and_then_the_nearest_counts_and_the_report_says_so(ran, tmp_path):
    adjust = {"loop": {"steps": 0.5}}
    summary = lived(config(one=part(reach=2.0, attempts=2, adjust=adjust), two=part("{one}")), tmp_path / "run")
    assert len(ran.calls) == 3 and not summary["ok"]
    assert (
        summary["stages"][0]["value"] == 1.0 and not summary["stages"][0]["passed"] and summary["stages"][1]["passed"]
    )
    assert ran.calls[-1][0]["start"] == f"{tmp_path}/run/one"


def test_a_missed_gate_says_itself_what_another_attempt_changes(ran, tmp_path):
    steps, rate = {"loop": {"steps": 0.8}}, {"loop": {"rate": 0.5}}
    gates = {"reached": most(0.7, adjust=steps), "rate": most(0.4)}
    summary = lived(config(one=part(gates=gates, attempts=4, adjust=rate)), tmp_path / "run")
    loops = [values["loop"] for values, _ in ran.calls]
    # The first missed both; the second its steps alone.
    assert loops == [{"steps": n, "rate": rate} for n, rate in ((100, 0.5), (80, 0.25), (64, 0.25))] and summary["ok"]
    assert summary["stages"][0]["tried"][2]["changes"] == {"loop.steps": [100, 64], "loop.rate": [0.5, 0.25]}


def test_nothing_is_tried_again_where_nothing_would_change(ran, tmp_path):
    up, down = ({"loop": {"steps": factor}} for factor in (2.0, 0.5))
    gates = {"reached": least(2.0, adjust=up), "rate": most(0.4, adjust=down)}
    summary = lived(config(one=part(gates=gates, attempts=3, adjust=up)), tmp_path / "run")
    assert len(ran.calls) == 1 and not summary["ok"] and summary["stages"][0]["attempts"] == 1


def test_what_several_gates_ask_for_happens_once():
    gates = {name: least(1.0) for name in ("a", "b")} | {"c": least(1.0, adjust={"loop": {"steps": 3.0}})}
    made = section(StageConfig, part(gates=gates, adjust={"loop": {"steps": 2.0}}).to_dict())
    assert made.factors(("a", "b")) == made.factors(("a",)) == made.factors(()) == {"loop.steps": 2.0}
    assert made.factors(("b", "c")) == {"loop.steps": 6.0} and made.factors(("c",)) == {"loop.steps": 3.0}


def test_every_gate_must_pass(ran, tmp_path):
    both = part(gates={"reached": least(0.5), "other": most(0.5)})
    with pytest.raises(ValueError, match="a gate is about 'other', but the numbers of the stage are"):
        lived(config(one=both), tmp_path / "run")
    narrow = part(gates={"reached": least(0.5)})
    narrow.gates.reached.bound = "most"
    assert not lived(config(one=narrow), tmp_path / "other")["ok"]


def test_a_gate_over_another_stage_is_about_the_difference(ran, tmp_path):
    two = part("{one}", gates={"reached": least(0.5, over="one")})
    two.run.loop.steps = 140
    summary = lived(config(one=part(), two=two), tmp_path / "run")
    assert summary["stages"][1]["value"] == pytest.approx(0.4) and not summary["stages"][1]["passed"]


def test_a_gate_over_a_stage_that_has_no_such_number_says_what_it_has(ran):
    made = section(PipelineConfig, config(one=part(), two=part("{one}", gates={"reached": least(0.5, over="one")})))
    with pytest.raises(ValueError, match=r"about 'reached' over 'one', which has \['documents'\]"):
        life.held(made.stages["two"], {"reached": 1.0}, {"one": {"documents": 3}})


def test_a_killed_pipeline_goes_on_with_the_stage_that_was_not_finished(ran, tmp_path):
    values = config(one=part(), two=part("{one}", attempts=2, adjust={"loop": {"steps": 2.0}}, reach=2.0), three=part())
    values["stages"]["two"]["gates"]["reached"]["value"] = 2.0
    ran.fails = [False, False, True]
    with pytest.raises(KeyboardInterrupt):
        lived(values, tmp_path / "run")
    before = [directory for _, directory in ran.calls]
    ran.calls.clear()
    summary = lived(values, tmp_path / "run")
    assert [os.path.basename(each) for each in before] == ["one", "two", "two_2"]
    assert [os.path.basename(directory) for _, directory in ran.calls] == ["two_2", "three"]
    ran.calls.clear()
    assert lived(values, tmp_path / "run") == summary and not ran.calls


def test_another_pipeline_is_refused_where_one_lies(ran, tmp_path):
    values = config(one=part())
    lived(values, tmp_path / "run")
    values["stages"]["one"]["run"]["loop"]["steps"] = 90
    said = "stages.one.run.loop.steps: 100 there, 90 here\n.* stays as it is, and only gates and measures may change"
    with pytest.raises(ValueError, match=said):
        lived(values, tmp_path / "run")


def test_a_directory_with_another_gate_is_judged_again_and_nothing_is_run_twice(ran, tmp_path):
    values = config(one=part(reach=0.5), two=part("{one}"))
    values["stages"]["one"]["gates"] = {"raeched": values["stages"]["one"]["gates"]["reached"]}
    values["stages"]["one"]["metric"] = "raeched"
    with pytest.raises(ValueError, match="a gate is about 'raeched', but the numbers of the stage are"):
        lived(values, tmp_path / "run")
    assert lived(config(one=part(reach=0.5), two=part("{one}")), tmp_path / "run")["ok"] and len(ran.calls) == 2
    tighter = lived(config(one=part(reach=2.0, attempts=2, adjust=DOUBLE), two=part("{one}")), tmp_path / "run")
    assert not tighter["ok"] and [stage["passed"] for stage in tighter["stages"]] == [False, True]
    assert (
        len(ran.calls) == 2
        and json.loads((tmp_path / "run" / "config.json").read_text())["stages"]["one"]["attempts"] == 2
    )


def test_an_attempt_that_stages_went_on_from_still_counts_where_gates_are_looser(ran, tmp_path):
    def of(reach, **changes):
        return config(one=part(reach=reach, attempts=2, adjust=DOUBLE, **changes), two=part("{one}"))

    assert lived(of(2.0), tmp_path / "run")["ok"] and len(ran.calls) == 3
    looser = lived(of(0.5), tmp_path / "run")
    assert looser["ok"] and len(ran.calls) == 3 and looser["stages"][0]["value"] == 2.0
    with pytest.raises(
        ValueError, match="'two' went on from .*start: 'one_2' there, 'one' here.*, or another --workdir"
    ):
        lived(of(1.0, gates={"reached": most(1.5)}), tmp_path / "run")
    assert lived(of(2.0), tmp_path / "run")["ok"] and len(ran.calls) == 3


def test_a_directory_may_be_moved_before_or_after_it_is_done(ran, tmp_path):
    values = config(one=part(reach=2.0, attempts=2, adjust=DOUBLE), two=part("{one}"))
    ran.fails = [False, False, True]
    with pytest.raises(KeyboardInterrupt):
        lived(values, tmp_path / "run")
    for number in (1, 2):
        os.rename(tmp_path / ("run" if number == 1 else "moved_1"), tmp_path / f"moved_{number}")
        (tmp_path / f"moved_{number}" / "one_2" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        summary = lived(values, tmp_path / f"moved_{number}")
        assert [stage["directory"] for stage in summary["stages"]] == [
            f"{tmp_path}/moved_{number}/{name}" for name in ("one_2", "two")
        ]
        place, said = f"{tmp_path}/moved_{number}", summary["stages"][1]["command"]
        assert f"--out={place}/two " in said and said.endswith(f"start={place}/one_2") and len(ran.calls) == 4
        assert "Loss, nats" in (tmp_path / f"moved_{number}" / "report.html").read_text()
    assert ran.calls[-1][0]["start"] == f"{tmp_path}/moved_1/one_2"
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "moved_2" / "attempts").iterdir())


def test_what_is_measured_of_a_model_is_measured_again_where_it_is_something_else(ran, tmp_path, monkeypatch):
    taken = []

    def row(directory, places, *, measures, prompts, seed):
        taken.append((os.path.basename(directory), places["one"]))
        return life.board.Row({name: {"value": 0.7, "low": 0.6, "high": 0.8, "count": 9} for name in measures}, [])

    monkeypatch.setattr(life.board, "row", row)
    values = config(one=part(measured=True), two=part("{one}"))
    values["measures"] = {"bits": measure("perplexity", "bits_per_byte", "bits", "min", file="raw.txt").to_dict()}
    lived(values, tmp_path / "run")
    values["measures"]["bits"]["about"] = "Only told"
    lived(values, tmp_path / "run")
    assert taken == [("one", f"{tmp_path}/run/one")]
    values["measures"]["right"] = measure("tasks", "accuracy", "share", "max", task="addition").to_dict()
    values["stages"]["one"]["gates"] = {"right": least(0.5).to_dict()}
    values["stages"]["one"]["metric"] = "right"
    for _ in range(2):
        summary = lived(values, tmp_path / "run")
        assert summary["ok"] and (summary["stages"][0]["value"], summary["stages"][0]["low"]) == (0.7, 0.6)
    assert len(taken) == 2 and len(ran.calls) == 2


def test_what_is_wrong_is_said_before_anything_is_made(ran, tmp_path):
    values = config(one=part(), two=part("{one}", gates={"reached": least(0.5)}))
    values["measures"] = {"sums": measure("tasks", "acuracy", "share", "max", task="addition").to_dict()}
    with pytest.raises(
        ValueError, match="config.measures.sums.metric='acuracy' is none of .*; did you mean 'accuracy'"
    ):
        lived(values, tmp_path / "run")
    with pytest.raises(ValueError, match="config.files.raw='no.txt' is not there"):
        lived({**config(one=part()), "files": {"raw": "no.txt"}}, tmp_path / "run")
    assert not ran.calls and not (tmp_path / "run").exists()


def test_files_that_were_read_may_be_gone(ran, tmp_path):
    lived(config(one=part()), tmp_path / "run")
    (tmp_path / "raw.txt").unlink()
    assert lived(config(one=part()), tmp_path / "run")["ok"]


def test_a_stage_that_diverges_is_adjusted_like_one_that_falls_short(ran, tmp_path):
    ran.fails, ran.error = [True], FloatingPointError("the loss is nan at step 3")
    summary = lived(config(one=part(attempts=2, adjust={"loop": {"rate": 0.5}})), tmp_path / "run")
    assert summary["ok"] and [each["value"] for each in summary["stages"][0]["tried"]] == [None, 1.0]
    ran.fails = [True]
    with pytest.raises(ValueError, match="'one' has no result in 1 attempts: the loss is nan at step 3"):
        lived(config(one=part()), tmp_path / "other")


def test_the_command_says_what_differs_and_nothing_else(ran, tmp_path):
    kind = Kind(None, None, "experiments/train.py", out="workdir", prefix="config.")
    values = {"loop": {"steps": 7, "prompts": ("a b", "c")}, "start": "runs/a b", "seed": 0}
    said = life.command(kind, values, {"loop": {"steps": 3}, "seed": 0}, "runs/x", "configs/a.py")
    words = ["python", "experiments/train.py", "--config=configs/a.py", "--workdir=runs/x", "--config.loop.steps=7"]
    assert shlex.split(said) == [*words, "--config.loop.prompts=('a b', 'c')", "--config.start=runs/a b"]


def test_the_clock_counts_what_a_killed_process_spent_until_it_last_wrote(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(life.time, "time", lambda: now[0])
    out = tmp_path / "stage"
    out.mkdir()
    with life.clock(tmp_path / "times", out):
        now[0] += 30
        (out / "metrics.jsonl").write_text("")
        os.utime(out / "metrics.jsonl", (1030, 1030))
        os.utime(out, (900, 900))
    now[0] = 5000.0  # it was killed after 30 seconds, and started again much later
    with life.clock(tmp_path / "times", out) as seconds:
        now[0] += 7
        assert seconds() == pytest.approx(37)
