import json

import pytest

from jaxllm.evaluate import duels, judges
from jaxllm.evaluate.duels import Player, Sampling
from jaxllm.generate import SamplerConfig
from jaxllm.text.chat import Conversation


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("a\nbe\nsee\nmore\n")
    return f"--questions={path}"


def test_runs_are_compared_in_a_table_a_file_and_a_figure(script, untrained_run, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out, figure = tmp_path / "out.json", tmp_path / "new" / "figure.png"
    runs = (f"--reference={untrained_run}@1", f"other={untrained_run}@2", "--best_of=2")
    flags = ("--judge", "rule:concise", "rule:style", f"--out={out}", f"--figure={figure}", "--ranking")
    status, printed, said = script("win_rate.py", *runs, *flags, questions, "--limit=3", "--max_new_tokens=4")
    assert status == 0, said
    content = json.loads(out.read_text(encoding="utf-8"))
    assert [row["label"] for row in content["players"]] == ["reference", "other", "best of 2"]
    players = [f"{untrained_run}@1", f"{untrained_run}@2", "best of 2"]
    assert [row["player"] for row in content["players"]] == players and sorted(content["ranking"]) == sorted(players)
    assert content["prompts"] == len(content["answers"]) == 3 and list(content["answers"][0]) == ["prompt", *players]
    assert list(content["players"][1]["judges"]) == ["rule:concise", "rule:style"] and content["command"][1] == runs[0]
    row = content["players"][1]
    assert f"{row['kl']:.2f} ± {row['kl_error']:.2f}" in printed and "at most 0.19" in printed and "Elo" in printed
    assert "wins by rule:concise" in printed and f"{row['judges']['rule:concise']['win_rate']:.1%}" in printed
    assert figure.stat().st_size > 5000


def test_every_flag_reaches_what_it_is_for(script, untrained_run, questions, monkeypatch):
    asked = []
    monkeypatch.setattr(judges, "load", lambda spec: f"the judge {spec}")
    monkeypatch.setattr(duels, "contest", lambda *given, **how: asked.append((given, how)) or duels.Contest({}, [], {}))
    monkeypatch.setattr(duels, "table", str)
    runs = (f"--reference={untrained_run}@1", f"other={untrained_run}")
    flags = ("--temperature=0.5", "--max_new_tokens=4", "--seed=3", "--limit=2", "--best_of=2", "--by=b")
    assert script("win_rate.py", *runs, *flags, questions, "--judge", "a", "c")[0] == 0
    assert script("win_rate.py", *runs, *flags[:-1], questions)[0] == 0
    (given, how), (_, plain) = asked
    run = str(untrained_run)
    prompts = [Conversation(({"role": "user", "content": word},)) for word in ("a", "be")]
    assert given[:3] == (Player(run, 1), {"other": [Player(run, 2)]}, prompts)
    assert given[3] == {"a": "the judge a", "c": "the judge c"}
    assert given[4] == Sampling(SamplerConfig(temperature=0.5), max_new_tokens=4, seed=3)
    assert how == dict(best_of=2, by="the judge b") and plain["by"] == "the judge rule:style"


def test_what_cannot_be_compared_is_named_in_one_message(script, untrained_run, questions, tmp_path):
    run = f"--reference={untrained_run}"
    assert "nobody is compared with" in script("win_rate.py", run, questions)[0]
    assert "no run in" in script("win_rate.py", run, questions, f"other={tmp_path}/nowhere_*")[0]
    status, *_ = script("win_rate.py", run, questions, f"other={untrained_run}@1", "--judge", "rule:kind")
    assert "rule:kind is not a known judge" in status
    status, _, said = script("win_rate.py")
    assert status == 2 and "the following arguments are required: --reference" in said


def test_the_help_names_every_flag(script):
    status, printed, _ = script("win_rate.py", "--help")
    names = "reference judge questions limit best_of by ranking temperature max_new_tokens seed out figure"
    assert status == 0 and all(f"--{name}" in printed for name in names.split())
