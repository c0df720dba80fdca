import json

import pytest

from jaxllm import workdir
from jaxllm.data import conversations
from jaxllm.data.sources import DocumentSource
from jaxllm.generate import SamplerConfig
from jaxllm.serve import dataset
from jaxllm.text.tokenizer import byte_tokenizer

FLAGS = ("--max_new_tokens=4", "--batch_size=2", "--seed=3")
HOW = dict(max_new_tokens=4, sampler=SamplerConfig(), stop_ids=byte_tokenizer().stop_ids, batch_size=2, seed=3)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"instruction": f"Say {word}.", "output": word} for word in ("a", "be", "see")]))
    return path


def lines(path):
    return sorted(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []


def test_texts_are_continued_by_the_teacher_and_another_run_of_the_command_changes_nothing(
    script, untrained_run, tmp_path
):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"body": word * 9}) + "\n" for word in ("a", "be", "é")))
    flags = (f"--texts={texts}", "--field=body", "--prefix_tokens=6", f"--out={tmp_path}/out.jsonl", *FLAGS)
    status, printed, said = script("distill_data.py", f"--workdir={untrained_run}", *flags)
    assert (status, printed) == (0, f"{tmp_path}/out.jsonl: 3 written\n"), said
    model, params, tokenizer = workdir.load(untrained_run)
    tasks = dataset.prefixes(str(texts), tokenizer, field="body", length=6)
    dataset.write(tmp_path / "expected.jsonl", tasks, model, params, made_by={}, **HOW)
    before = lines(tmp_path / "out.jsonl")
    assert before == lines(tmp_path / "expected.jsonl")
    assert [document.text[:3] for document in DocumentSource(f"{tmp_path}/out.jsonl").documents()]
    assert script("distill_data.py", f"--workdir={untrained_run}", *flags)[:2] == (0, printed)
    assert lines(tmp_path / "out.jsonl") == before
    status, *_ = script("distill_data.py", f"--workdir={untrained_run}", *flags, "--seed=4")
    assert status.startswith("ValueError") and "seed: 3 there, 4 here" in status
    status, *_ = script("distill_data.py", f"--workdir={untrained_run}", *flags, "--step=1")
    assert "step: 2 there, 1 here" in status
    texts.write_text(json.dumps({"body": "another text"}) + "\n")
    assert "source: '" in script("distill_data.py", f"--workdir={untrained_run}", *flags)[0]


def test_answers_that_end_are_conversations_to_train_on_and_the_others_are_counted(
    script, untrained_run, prompts, tmp_path, monkeypatch
):
    out, dropped = tmp_path / "out.jsonl", tmp_path / "out.jsonl.dropped"
    flags = (f"--prompts={prompts}", f"--out={out}", *FLAGS)
    ended = lambda answer: answer._replace(tokens=answer.tokens + [6], ended=len(answer.tokens) % 2 == 0)  # noqa: E731
    answered = dataset.answered
    monkeypatch.setattr(
        dataset, "answered", lambda *x, **y: ((number, ended(answer)) for number, answer in answered(*x, **y))
    )
    status, printed, said = script("distill_data.py", f"--workdir={untrained_run}", *flags)
    assert status == 0, said
    assert f"{len(lines(out))} written" in printed and len(lines(out)) + len(lines(dropped)) == 3 and lines(out)
    for record in DocumentSource(str(out)).records():
        conversation = record.parsed(lambda value: conversations.conversation(value, conversations.detected(value)))
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    limited = (f"--prompts={prompts}", f"--out={tmp_path}/one.jsonl", "--limit=1", *FLAGS)
    script("distill_data.py", f"--workdir={untrained_run}", *limited)
    assert len(lines(tmp_path / "one.jsonl")) + len(lines(tmp_path / "one.jsonl.dropped")) == 1


def test_what_is_missing_is_named_in_one_message(script, untrained_run, prompts, tmp_path):
    out = f"--out={tmp_path}/out.jsonl"
    assert (
        "FileNotFoundError: no run in"
        in script("distill_data.py", f"--workdir={tmp_path}", f"--prompts={prompts}", out)[0]
    )
    status, *_ = script("distill_data.py", f"--workdir={untrained_run}", f"--prompts={tmp_path}/no.json", out)
    assert "no.json does not exist" in status
    status, _, said = script("distill_data.py", f"--workdir={untrained_run}", out)
    assert status == 2 and "one of the arguments --prompts --texts is required" in said


def test_the_help_names_every_flag(script):
    status, printed, _ = script("distill_data.py", "--help")
    names = "workdir prompts texts out format field prefix_tokens limit temperature top_k top_p min_p max_new_tokens"
    assert status == 0 and all(f"--{name}" in printed for name in (names + " batch_size seed step").split())
