import builtins
import json

import pytest

from jaxllm.data import preferences

FLAGS = ("--max_new_tokens=6", "--seed=3", "--voter=ann")


@pytest.fixture
def voting(script, untrained_run, tmp_path, monkeypatch):
    """A function: what is typed, and flags -> (exit status or message, what is printed, what is said)."""
    (tmp_path / "questions.txt").write_text("a\n\nb\nc\n")
    monkeypatch.setenv("COLUMNS", "300")

    def voting(typed, *flags, runs=(f"{untrained_run}@1", untrained_run)):
        keys = iter(typed)
        monkeypatch.setattr(builtins, "input", lambda prompt: next(keys))
        asked = (f"--questions={tmp_path}/questions.txt", "--runs", *runs)
        return script("vote.py", f"--database={tmp_path}/votes.db", *FLAGS, *asked, *flags)

    return voting


def test_votes_are_asked_kept_exported_and_ranked(script, voting, untrained_run, tmp_path):
    status, printed, _ = voting(["b", "q"])
    assert (
        status == 0 and "6 answers, 0 prompts too long; 3 questions for ann" in printed and "{'second': 1}" in printed
    )
    assert "untrained" not in printed
    status, printed, _ = voting(["t", "a"], f"--export={tmp_path}/votes.jsonl")
    assert status == 0 and "2 questions for ann" in printed and "votes.jsonl: {'decided': 2, 'ties': 1}" in printed
    records = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["tie"] for record in records] == [False, True, False]
    assert all(preferences.preferences(record, "pairs")[0].annotator == "ann" for record in records)
    figure = tmp_path / "ranking.png"
    status, printed, _ = script("vote.py", f"--database={tmp_path}/votes.db", "--ranking", f"--figure={figure}")
    assert status == 0 and f"{untrained_run}@1" in printed and f"{untrained_run}@2" in printed and "Elo" in printed
    assert figure.stat().st_size > 3000


def test_what_cannot_be_asked_is_named_in_one_message(script, voting, untrained_run, tmp_path):
    status, _, said = script("vote.py")
    assert status == 2 and "nothing to do: give --questions to vote on, --export, --ranking or --figure" in said
    assert "a vote is between two players or more" in voting([], runs=(untrained_run,))[0]
    assert (
        "whole checkpoints of steps [1, 2]; name one as DIRECTORY@STEP" in voting([], runs=(f"{untrained_run}@7",))[0]
    )
    status, *_ = script("vote.py", f"--database={tmp_path}/new.db", "--ranking")
    assert status.startswith("ValueError: no game to rank by")


def test_the_help_names_every_flag(script):
    status, printed, _ = script("vote.py", "--help")
    names = "database runs questions limit voter temperature top_k top_p max_new_tokens seed export ranking figure"
    assert status == 0 and all(f"--{name}" in printed for name in names.split())
