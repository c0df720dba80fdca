import json

RECORDS = [{"prompt": f"say {n}", "response": "x" * (n + 1), "tag": n} for n in range(3)]


def test_records_keep_their_fields_and_gain_a_score(script, untrained_run, tmp_path):
    data, out = tmp_path / "chat.jsonl", tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in [*RECORDS, {"prompt": "p" * 30, "response": "r"}]))
    flags = f"--workdir={untrained_run}", f"--data={data}", f"--out={out}"
    status, printed, _ = script("score_data.py", *flags)
    assert status == 0 and "3 of 4 written" in printed and "1 have no answer in 16 tokens" in printed
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in row if key != "nats"} for row in written] == RECORDS
    assert all(0 < row["nats"] < 20 for row in written)
    data.write_text("".join(json.dumps(record) + "\n" for record in [RECORDS[0], {**RECORDS[1], "by": "\ud800"}]))
    status, *_ = script("score_data.py", *flags[:2], f"--out={tmp_path}/none.jsonl")
    assert f"{data}, line 2: field 'by' holds" in status and not (tmp_path / "none.jsonl").exists()
    status, *_ = script("score_data.py", *flags)
    assert f"{out} exists: give --out another name" in status
