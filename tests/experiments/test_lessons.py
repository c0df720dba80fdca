import json

from jaxllm.data import lessons

SMALL = dict(seed=3, people=22, heldout=2, biographies=1, talks=1, sums=5, demonstrations=5)


def test_the_files_hold_the_lessons_of_the_seed(script, tmp_path):
    status, printed, said = script(
        "lessons.py", f"--out={tmp_path}", *(f"--{key}={value}" for key, value in SMALL.items())
    )
    assert status == 0, said
    for name, records in lessons.lessons(lessons.Plan(**SMALL)).items():
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == json.loads(json.dumps(list(records)))
        assert f"{tmp_path}/{name}.jsonl: {len(lines)}\n" in printed


def test_the_help_names_every_flag_and_an_impossible_world_is_one_message(script, tmp_path):
    status, printed, _ = script("lessons.py", "--help")
    assert status == 0 and all(f"--{name}" in printed for name in lessons.Plan._fields)
    status, *_ = script("lessons.py", f"--out={tmp_path}/none", "--people=7")
    assert status.startswith("ValueError: people=7") and not (tmp_path / "none").exists()
    status, *_ = script("lessons.py", f"--out={tmp_path}/none", "--talks=-1")
    assert status == "ValueError: talks=-1 must be at least 0" and not (tmp_path / "none").exists()
