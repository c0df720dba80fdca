import json
import re

from jaxllm.data import world
from jaxllm.text import tokenizer

WORLD = world.create(0)
LIVES = list(world.documents(WORLD.asked, seed=0, biographies=4))


def test_a_tokenizer_is_learned_measured_and_taken_by_its_folder(script, tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"body": record["text"]}) + "\n" for record in LIVES))
    flags = f"--files={raw}", f"--out={tmp_path}/new/tokenizer", "--vocab_size=400", "--field=body", "--held_out=0.2"
    status, printed, said = script("tokenizer.py", *flags)
    assert status == 0, said
    learned = tokenizer.load(tmp_path / "new" / "tokenizer")
    assert learned.vocab_size == 400 and f"--config.tokenizer.path={tmp_path}/new/tokenizer" in printed
    found = dict(re.findall(r"^(\w+) +([\d.,]+)$", printed, re.MULTILINE))
    assert found["vocab_size"] == "400" and 1.5 < float(found["bytes_per_token"]) < 4
    assert int(found["documents"]) + int(found["held_out_documents"]) == len(LIVES)
    assert 0.1 < int(found["held_out_documents"]) / len(LIVES) < 0.3
    assert script("tokenizer.py", *flags)[:2] == (0, printed)


def test_the_help_names_every_flag_and_what_is_impossible_is_one_message(script, tmp_path):
    status, printed, _ = script("tokenizer.py", "--help")
    assert status == 0 and all(f"--{name}" in printed for name in "files out vocab_size held_out field".split())
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(record) + "\n" for record in LIVES[:9]))
    status, *_ = script("tokenizer.py", f"--files={raw}", f"--out={tmp_path}/new", "--vocab_size=9999")
    assert status.startswith("ValueError: vocab_size=9999 is larger than the corpus supports")
    for size in (-1, 0, 1):
        status, *_ = script("tokenizer.py", f"--files={raw}", f"--out={tmp_path}/new", f"--vocab_size={size}")
        assert status.startswith(f"ValueError: vocab_size={size} is too small") and "raise vocab_size" in status
    status, *_ = script("tokenizer.py", f"--files={raw}", f"--out={tmp_path}/new", "--field=body")
    assert status.startswith(f"Malformed: {raw}, line 1: no field 'body' in ['text']")
    assert not (tmp_path / "new").exists()
