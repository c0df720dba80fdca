import builtins

import pytest

from jaxllm.generate import SamplerConfig
from jaxllm.serve import chat

GREEDY = chat.Manner(SamplerConfig(temperature=0.0), max_new_tokens=8)
FLAGS = ("--temperature=0", "--max_new_tokens=8", "--context=64")


@pytest.fixture
def speaker(untrained_run):
    """The run as the script loads it, at a context where its questions fit."""
    return chat.load(untrained_run)._replace(context=64)


def typing(monkeypatch, *lines):
    """Plays the keyboard, up to Ctrl-D."""

    def keyboard():
        yield from lines
        raise EOFError

    typed = keyboard()
    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed))


def test_one_question_is_answered_on_standard_output_alone(script, untrained_run, speaker):
    shown = []
    chat.ask(speaker, "Who?", GREEDY, system="s", show=shown.append)
    status, printed, said = script("chat.py", f"--workdir={untrained_run}", "--ask=Who?", "--system=s", *FLAGS)
    assert (status, printed) == (0, "".join(shown)) and "temperature=0.0" in said and "max_new_tokens=8" in said


def test_a_talk_goes_on_until_the_end_of_the_input(script, untrained_run, speaker, monkeypatch):
    shown = []
    chat.talk(speaker, ["a", "/system s", "b"], GREEDY, show=shown.append)
    typing(monkeypatch, "a", "/system s", "b")
    status, printed, _ = script("chat.py", f"--workdir={untrained_run}", *FLAGS)
    assert (status, printed) == (0, "".join(shown) + "\n")


def test_several_runs_answer_side_by_side_from_a_file_a_flag_or_the_keyboard(
    script, untrained_run, tmp_path, monkeypatch
):
    other = tmp_path / "other"
    other.symlink_to(untrained_run)
    (tmp_path / "questions.txt").write_text("Who?\n\nWhere?\n")
    monkeypatch.setenv("COLUMNS", "300")
    runs = ("--compare", untrained_run, other)
    typing(monkeypatch, "Who?", "Where?")
    printed = {}
    for flags in ((f"--questions={tmp_path}/questions.txt",), ("--ask=Who?",), ()):
        status, printed[flags], said = script("chat.py", *runs, *FLAGS, *flags)
        assert status == 0, (status, said)
    for text in printed.values():
        assert str(untrained_run) in text and str(other) in text and "Who?" in text
    assert ["Where?" in text for text in printed.values()] == [True, False, True]
    assert [text.count("question") for text in printed.values()] == [1, 1, 2]
    assert script("chat.py", f"--compare={untrained_run},{other}", *FLAGS, "--ask=Who?")[1] == printed["--ask=Who?",]


def test_the_step_and_the_seed_decide_who_answers_and_how(script, untrained_run):
    say = lambda *flags: script("chat.py", f"--workdir={untrained_run}", "--ask=a", "--max_new_tokens=8", *flags)[1]  # noqa: E731
    assert say("--seed=1") == say("--seed=1") != say("--seed=2")
    assert say("--temperature=0") == say("--temperature=0", "--step=2") != say("--temperature=0", "--step=1")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ask=a", "--top_p=0"], "ValueError: top_p=0.0 must be in (0, 1]"),
        (["--ask=a", "--max_new_tokens=0"], "ValueError: max_new_tokens=0 must be at least 1"),
        (["--ask=a question of some length"], "ValueError: the question makes a prompt of"),
        (["--ask=a", "--step=9"], "no checkpoint of step 9"),
        (["--questions=nowhere.txt"], "FileNotFoundError"),
    ],
)
def test_what_cannot_be_answered_is_named_in_one_message(script, untrained_run, flags, message):
    assert message in script("chat.py", f"--workdir={untrained_run}", *flags)[0]


def test_a_directory_without_a_run_is_named_and_one_is_required(script, tmp_path):
    assert script("chat.py", f"--workdir={tmp_path}")[0].startswith("FileNotFoundError: no run in ")
    status, _, said = script("chat.py")
    assert status == 2 and "one of the arguments --workdir --compare is required" in said


def test_the_help_names_every_flag(script):
    status, printed, _ = script("chat.py", "--help")
    names = "workdir compare ask questions system temperature top_k top_p min_p max_new_tokens context seed step"
    assert status == 0 and all(f"--{name}" in printed for name in names.split())
