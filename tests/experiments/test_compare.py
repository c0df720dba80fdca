import json


def write_run(directory, values):
    directory.mkdir()
    rows = [json.dumps({"step": step, "validation_loss": value}) for step, value in values.items()]
    (directory / "metrics.jsonl").write_text("\n".join(rows) + "\n")


def test_groups_are_compared_at_their_last_step_and_drawn(script, tmp_path):
    for seed, last in ((0, 1.0), (1, 3.0)):
        write_run(tmp_path / f"a_{seed}", {10: 4.0, 20: last})
    write_run(tmp_path / "b_0", {10: 4.0, 20: 2.5})
    out = tmp_path / "figures" / "all.png"
    status, printed, _ = script("compare.py", f"--out={out}", f"first={tmp_path}/a_*", f"second={tmp_path}/b_*")
    assert status == 0 and out.stat().st_size > 5000
    rows = [line.replace("│", " ").split() for line in printed.splitlines() if "first" in line or "second" in line]
    assert rows == [["first", "2", "2.0000", "1.0000", "3.0000"], ["second", "1", "2.5000", "2.5000", "2.5000"]]


def test_a_group_without_runs_and_runs_of_different_steps_are_refused(script, tmp_path):
    status, *_ = script("compare.py", f"none={tmp_path}/nothing_*")
    assert "names no run directory: give LABEL=GLOB" in status
    write_run(tmp_path / "a_0", {10: 4.0, 20: 1.0})
    write_run(tmp_path / "a_1", {10: 4.0})
    status, *_ = script("compare.py", f"uneven={tmp_path}/a_*")
    assert "the runs have it at steps [[10, 20], [10]]; compare like with like" in status


def test_metrics_are_drawn_against_the_root_of_a_divergence(script, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    rows = [{"step": step, "kl": 0.5 * step, "proxy": float(step), "gold": -float(step)} for step in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "over.png"
    status, printed, _ = script(
        "compare.py", f"--out={out}", "--metric=proxy,gold", "--root_of=kl", f"free={directory}"
    )
    assert status == 0 and out.stat().st_size > 5000
    assert "proxy at the last step" in printed and "gold at the last step" in printed
