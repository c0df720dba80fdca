import json

from jaxllm.data import conversations, problems, tasks
from jaxllm.data.sources import DocumentSource
from jaxllm.rewards import verifiers
from jaxllm.text.chat import Conversation

SMALL = ("--count=30", "--heldout=9")


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_files_hold_demonstrations_and_problems_of_the_other_side(script, tmp_path):
    out = tmp_path / "new" / "sums"
    flags = ("--task=addition,logic", "--level=2", "--share=0.3", "--correct=0.5", "--seed=4")
    status, printed, said = script("tasks.py", f"--out={out}", *flags, *SMALL)
    assert status == 0, said
    levels = {"addition": 2, "logic": 2}
    assert records(out, "demonstrations") == list(tasks.demonstrations(levels, 4, 30, correct=0.5, share=0.3))
    assert f"{out}/demonstrations.jsonl: 30\n" in printed and f"{out}/heldout.jsonl: 9\n" in printed
    held = records(out, "heldout")
    assert {record["task"] for record in held} == set(levels)
    for record in held:
        prompt = Conversation(({"role": "user", "content": record["prompt"]},))
        assert tasks.is_held_out(prompt, 0.3)
        assert verifiers.accuracy(prompt, record["answer"], record)["score"] == 1
    for record in DocumentSource(f"{out}/demonstrations.jsonl").records():
        record.parsed(lambda value: conversations.conversation(value, "messages"))
    source = {"kind": "file", "path": f"{out}/heldout.jsonl"}
    read = problems.problems({"a": source}, validation=0).batch(0, 9)
    assert sorted(problem.record["answer"] for problem in read) == sorted(record["answer"] for record in held)


def test_demonstrations_may_call_a_tool(script, tmp_path):
    status, _, said = script("tasks.py", f"--out={tmp_path}", "--tool=calculator", *SMALL)
    assert status == 0, said
    shown = records(tmp_path, "demonstrations")
    assert len({record["messages"][0]["content"] for record in shown}) > 25
    assert all(record["messages"][1]["tool_calls"] and record["tools"] for record in shown)
    held = {record["prompt"] for record in records(tmp_path, "heldout")}
    assert not held & {record["messages"][0]["content"] for record in shown}


def test_the_help_names_every_flag_and_what_is_impossible_is_one_message(script, tmp_path):
    status, printed, _ = script("tasks.py", "--help")
    flags = "task level count heldout share correct tool seed out".split()
    assert status == 0 and all(f"--{name}" in printed for name in flags)
    out = f"--out={tmp_path}/none"
    assert script("tasks.py", out, "--task=adition")[0].startswith("ValueError: 'adition' is no task; did you mean")
    assert script("tasks.py", out, "--task=logic", "--tool=calculator")[0].startswith(
        "ValueError: a problem of 'logic'"
    )
    for flags in (["--heldout=-2"], ["--count=-3"], ["--count=-3", "--tool=calculator"]):
        status, *_ = script("tasks.py", out, *flags)
        assert status == f"ValueError: {flags[0][2:]} must be at least 0"
    assert not (tmp_path / "none").exists()
    own = tmp_path / "heldout.jsonl"
    own.write_text("mine\n")
    status, *_ = script("tasks.py", f"--out={tmp_path}", *SMALL)
    assert status == f"ValueError: {own} exists and says something else: give --out another folder"
    assert own.read_text() == "mine\n"
