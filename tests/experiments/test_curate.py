import dataclasses
import json

from jaxllm import curate

PROSE = [f"The {thing} stood near the pier and nobody knew whose it was." for thing in ("trunk", "cart", "ladder")]
LONG = f"{PROSE[0]} A boy sat on it for most of the morning, and then an old man with a newspaper."


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_the_table_says_what_was_dropped_and_why(script, tmp_path):
    records = [{"body": PROSE[0]}, {"body": "!" * 99, "noise": "cries"}, {"body": "no"}, {"body": PROSE[1]}]
    flags = f"--files={write(tmp_path / 'raw.jsonl', records)}", f"--out={tmp_path}/out", "--field=body"
    status, printed, said = script("curate.py", *flags)
    assert status == 0, said
    for shown in ("kept", "too short", "repeated characters", "50.00%", "25.00%", "cries: 1 of 1 caught"):
        assert shown in printed
    assert "clean documents dropped wrongly: 1 of 3" in printed
    assert f"2 of 4 documents are in {tmp_path}/out/clean.jsonl" in printed
    kept = (tmp_path / "out" / "clean.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == [records[0], records[3]]
    status, again, said = script("curate.py", *flags)
    assert (status, again) == (0, printed) and "already" in said


def test_thresholds_change_those_of_the_preset(script, tmp_path):
    raw = write(tmp_path / "raw.jsonl", [{"text": text} for text in [*PROSE, LONG]])
    flags = f"--files={raw}", f"--out={tmp_path}/out", "--preset=web", "--min_words=20", "--min_lettered=0.5"
    status, printed, said = script("curate.py", *flags)
    assert status == 0, said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    changed = dataclasses.replace(curate.PRESETS["web"], min_words=20, min_lettered=0.5)
    assert report["from"]["limits"] == dataclasses.asdict(changed)
    assert report["dropped"]["too_short"]["documents"] == 3 and "1 of 4 documents" in printed


def test_the_help_names_every_threshold_with_its_defaults_and_what_is_impossible_is_one_message(script, tmp_path):
    status, printed, _ = script("curate.py", "--help")
    assert status == 0 and all(f"--{field.name}" in printed for field in dataclasses.fields(curate.Limits))
    assert "(any 3, web 50)" in printed
    raw = write(tmp_path / "raw.jsonl", [{"text": PROSE[0]}])
    status, *_ = script("curate.py", f"--files={raw}", f"--out={tmp_path}/out", "--similarity=2")
    assert status == "ValueError: similarity=2.0 is a share: it must be at most 1"
    status, *_ = script("curate.py", f"--files={tmp_path}/none.jsonl", f"--out={tmp_path}/out")
    assert status.startswith(f"FileNotFoundError: {tmp_path}/none.jsonl does not exist")
