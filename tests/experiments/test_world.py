import json

from jaxllm.data import conversations, world
from jaxllm.data.sources import DocumentSource

SMALL = ("--people=22", "--heldout=2", "--biographies=2", "--answers=1", "--pairs=1")


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_files_hold_the_world_of_the_seed_and_can_be_read(script, tmp_path):
    out = tmp_path / "new" / "world"
    status, printed, said = script("world.py", f"--out={out}", "--seed=5", *SMALL, "--polite=1")
    assert status == 0, said
    made = world.create(5, people=22, heldout=2)
    assert records(out, "documents") == list(world.documents([*made.asked, *made.heldout], seed=5, biographies=2))
    shares = world.Manner(1, 0.5, 0.5)
    assert records(out, "instructions") == list(
        world.instructions(world.questions(made.asked), seed=5, answers=1, manners=shares)
    )
    for prefix, people in (("", made.asked), ("heldout_", made.heldout)):
        asked = world.questions(people)
        assert records(out, f"{prefix}preferences") == list(world.preferences(asked, seed=5, pairs=1))
        assert records(out, f"{prefix}judgements") == list(world.judgements(asked, seed=5, pairs=1))
    assert records(out, "heldout_questions") == list(world.facts(world.questions(made.heldout), seed=5))
    for path in sorted(out.iterdir()):
        assert f"{path}: {len(records(out, path.stem))}\n" in printed
    for name in ("instructions", "judgements", "heldout_questions", "heldout_judgements"):
        for record in DocumentSource(f"{out}/{name}.jsonl").records():
            assert conversations.detected(record.value) == "prompt_response"
            record.parsed(lambda value: conversations.conversation(value, "prompt_response"))
    assert all(document.text for document in DocumentSource(f"{out}/documents.jsonl").documents())


def test_the_help_names_every_flag_and_an_impossible_world_is_one_message(script, tmp_path):
    status, printed, _ = script("world.py", "--help")
    flags = "out seed people heldout biographies answers pairs polite concise on_topic".split()
    assert status == 0 and all(f"--{name}" in printed for name in flags)
    status, *_ = script("world.py", f"--out={tmp_path}/none", "--people=7")
    assert status.startswith("ValueError: people=7") and not (tmp_path / "none").exists()
    for flag, message in (("--answers=0", "answers=0 must be at least 1"), ("--polite=5", "Manner(polite=5.0")):
        status, *_ = script("world.py", f"--out={tmp_path}/none", *SMALL, flag)
        assert status.startswith(f"ValueError: {message}") and not (tmp_path / "none").exists()


def test_no_file_that_says_something_else_is_replaced(script, tmp_path):
    own = tmp_path / "documents.jsonl"
    own.write_text("mine\n")
    status, *_ = script("world.py", f"--out={tmp_path}", *SMALL)
    assert status == f"ValueError: {own} exists and says something else: give --out another folder"
    assert own.read_text() == "mine\n"
    own.unlink()
    assert [script("world.py", f"--out={tmp_path}", *SMALL)[0] for _ in range(2)] == [0, 0]
