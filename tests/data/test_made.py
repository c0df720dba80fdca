import json

import pytest

from jaxllm.data import made


def test_a_file_is_written_once_and_never_over_another(tmp_path):
    records = [{"a": 1}, {"a": "é"}]
    assert list(made.write(tmp_path / "new", {"one": records, "none": []})) == [
        (tmp_path / "new" / "one.jsonl", 2),
        (tmp_path / "new" / "none.jsonl", 0),
    ]
    assert [json.loads(line) for line in (tmp_path / "new" / "one.jsonl").read_text().splitlines()] == records
    assert len(list(made.write(tmp_path / "new", {"one": iter(records)}))) == 1
    with pytest.raises(ValueError, match="one.jsonl exists and says something else: give --out another folder"):
        list(made.write(tmp_path / "new", {"one": records[:1]}))
    assert len((tmp_path / "new" / "one.jsonl").read_text().splitlines()) == 2


def test_nothing_is_written_where_a_record_cannot_be_made(tmp_path):
    with pytest.raises(ValueError, match="answers=0 must be at least 1"):
        list(made.write(tmp_path / "new", {"one": [{}], "two": (made.require(1, answers=0) for _ in range(1))}))
    assert not (tmp_path / "new").exists()
    made.require(0, answers=0, pairs=1)


def test_whoever_is_killed_while_writing_leaves_nothing_that_says_something_else(tmp_path, monkeypatch):
    records = {"one": [{"a": 1}]}
    with monkeypatch.context() as patch:
        patch.setattr(made.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(made.write(tmp_path, records))
    assert not (tmp_path / "one.jsonl").exists()
    assert [count for _, count in made.write(tmp_path, records)] == [1]
