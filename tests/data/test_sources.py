import datetime
import gzip
import json
import re
import sys

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from jaxllm.data.sources import DocumentSource, json_line
from jaxllm.text.chat import Malformed

TEXTS = ["one\r\ntwo\n", "é ▁ 漢", "", " \t"]
LINES = "".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(TEXTS)).encode()


def read(path, field="text"):
    return [document.text for document in DocumentSource(str(path), field).documents()]


def written(path, data):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data)
    return path


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    assert read(written(tmp_path / "a.txt", "a\r\nb\0\ufeff\n".encode())) == ["a\r\nb\0\ufeff\n"]


def test_one_byte_order_mark_at_the_start_of_a_file_is_no_text(tmp_path):
    mark = "\ufeff".encode()
    assert read(written(tmp_path / "a.txt", mark * 2 + b"a")) == ["\ufeffa"]
    written(tmp_path / "a.jsonl", mark + LINES)
    written(tmp_path / "a.json", mark + b"[" + LINES.strip().replace(b"\n", b",") + b"]")
    written(tmp_path / "a.jsonl.gz", gzip.compress(mark + LINES))
    for suffix in ("json", "jsonl", "jsonl.gz"):
        assert read(tmp_path / f"a.{suffix}") == TEXTS, suffix
    with pytest.raises(ValueError, match="b.txt is empty"):
        read(written(tmp_path / "b.txt", mark))
    with pytest.raises(ValueError, match="b.jsonl, line 2: not JSON"):
        read(written(tmp_path / "b.jsonl", b'{"text": "a"}\n' + mark + b'{"text": "b"}\n'))


def test_every_kind_of_records_gives_the_same_texts(tmp_path):
    written(tmp_path / "a.jsonl", LINES + b"\n  \n")
    written(tmp_path / "a.json", b" [" + LINES.strip().replace(b"\n", b"\n,\n") + b"\n] \n")
    written(tmp_path / "a.jsonl.gz", gzip.compress(LINES))
    frames = zstandard.ZstdCompressor().compress(LINES[:40]) + zstandard.ZstdCompressor().compress(LINES[40:])
    written(tmp_path / "a.jsonl.zst", frames)
    parquet.write_table(pyarrow.table({"id": range(4), "text": TEXTS}), tmp_path / "a.parquet")
    for suffix in ("json", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"):
        assert read(tmp_path / f"a.{suffix}") == TEXTS, suffix


def test_another_field_may_hold_the_text(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"text": "no", "content": "yes"}')
    assert read(path, "content") == ["yes"]


def test_a_folder_is_read_to_its_depths_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "c.md"):
        written(tmp_path / name, name.encode())
    assert read(tmp_path) == ["a/b/c.txt", "a/z.txt", "b.txt"]
    assert read(f"{tmp_path}/*.txt") == ["b.txt"]
    assert read(f"{tmp_path}/**/c.*") == ["a/b/c.txt"]


def test_what_is_hidden_in_a_folder_is_none_of_it(tmp_path):
    root = tmp_path / ".corpus"
    for name in ("a.txt", "b/.c.txt", ".ipynb_checkpoints/a.txt", "b/.git/d/e.txt"):
        written(root / name, name.encode())
    assert read(root) == ["a.txt"]
    assert read(root / "b" / ".c.txt") == ["b/.c.txt"]


def test_files_of_other_kinds_beside_those_that_are_read_are_named_once(tmp_path, capsys):
    for name in ("a.txt", "b.jsonl.xz", "x.csv", ".hidden.md"):
        written(tmp_path / name, b"x")
    for path in (tmp_path, f"{tmp_path}/*"):
        assert read(path) == read(path) == ["x"]
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{path}: not read, for its kind is none of .txt, .json" in said
        assert f": {tmp_path}/b.jsonl.xz, {tmp_path}/x.csv\n" in said


def test_progress_ends_at_the_size_of_the_source(tmp_path):
    written(tmp_path / "a.jsonl", LINES)
    written(tmp_path / "b.txt", b"x")
    written(tmp_path / "c.jsonl.gz", gzip.compress(LINES))
    source = DocumentSource(str(tmp_path))
    progress = [document.read for document in source.documents()]
    assert progress == sorted(progress) and progress[-1] == source.num_bytes


def test_the_fingerprint_is_of_content_order_and_field_not_of_place(tmp_path):
    fingerprints = {}
    for name, files in {
        "a": {"x.txt": b"1", "y.txt": b"2"},
        "same": {"u.txt": b"1", "v.txt": b"2"},
        "changed": {"x.txt": b"1", "y.txt": b"3"},
        "moved": {"x.txt": b"2", "y.txt": b"1"},
        "joined": {"x.txt": b"12"},
    }.items():
        for file, data in files.items():
            written(tmp_path / name / file, data)
        fingerprints[name] = DocumentSource(str(tmp_path / name)).fingerprint
    assert fingerprints["a"] == fingerprints["same"]
    assert len(set(fingerprints.values())) == 4
    assert DocumentSource(str(tmp_path / "a"), "body").fingerprint != fingerprints["a"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a.txt is empty: remove it"),
        ("a.txt", b"one\ntwo\nth\xffree", r"a.txt, line 3: invalid UTF-8, byte 0xff; convert the file to UTF-8"),
        ("a.jsonl", b"\n \n", r"a.jsonl is empty"),
        ("a.jsonl.gz", b"", r"a.jsonl.gz is empty"),
        ("{a}.txt", b"\xff", r"{a}.txt, line 1: invalid UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a.jsonl, line 2: invalid UTF-8, byte 0xe9"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a.jsonl, line 3: not JSON \(.*\); mend or remove the line"),
        ("a.jsonl", b'{"body": "a"}\n', r"a.jsonl, line 1: no field 'text' in \['body'\]; set field to the one that"),
        ("a.jsonl", b'"text"\n', r"a.jsonl, line 1: str is not an object with named fields"),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl, line 1: field 'text' holds int 5, not text"),
        ("a.jsonl", b'{"text": null}\n', r"a.jsonl, line 1: field 'text' holds NoneType None"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', r"a.jsonl, line 1: lone surrogate at character 1 of 'text'"),
        ("a.json", b"", r"a.json is empty"),
        ("a.json", b"[ ]", r"a.json is empty"),
        ("a.json", b'[{"text": "a"},\n\n {"text": "b"},\n {"text": 1}]', r"a.json, line 4: field 'text' holds int 1"),
        ("a.json", b'[\n{\n"text": "a"\n},\n{\n"text": 1\n}]', r"a.json, line 5: field 'text' holds int 1"),
        ("a.json", b'[{"text": "a"},\n 5]', r"a.json, line 2: int is not an object with named fields"),
        ("a.json", b'[{"text": "a"},\n\n{"text": "b"', r"a.json, line 3: not JSON \(Expecting ',' delimiter\); mend"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', r"a.json, line 1: not JSON \(Expecting ',' or '\]'\); mend"),
        ("a.json", b'[{"text": "a"}]\n]', r"a.json, line 2: not JSON \(Extra data\)"),
        ("a.json", b'{"text": "a"}', r"a.json, line 1: not JSON \(Expecting an array of objects: '\['\)"),
        ("a.json", b'[\n{"text": "\xe9"}]', r"a.json, line 2: invalid UTF-8, byte 0xe9"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], r"a.jsonl.gz is damaged or cut short .*: fetch it again"),
        ("a.jsonl.gz", b"plain", r"a.jsonl.gz is damaged or cut short"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(LINES)[:-9], r"a.jsonl.zst is damaged or cut short"),
        ("a.jsonl.zst", b"plain text", r"a.jsonl.zst is damaged or cut short"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet is damaged or cut short .*: fetch it again"),
        ("a.md", b"text", r"a.md is of no kind that can be read: .txt, .json, .jsonl, .jsonl.gz, .jsonl.zst, .parquet"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_cannot_be_read_is_named_with_its_place_and_the_mend(tmp_path, name, data, message):
    path = written(tmp_path / name, data)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_parquet_file_without_the_column_or_with_other_values_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"a.parquet: no column 'text' in \['body', 'n'\]; set field to one"):
        read(path)
    with pytest.raises(ValueError, match=r"a.parquet, row 1: field 'n' holds int 1, not text"):
        read(path, "n")


@pytest.mark.parametrize("size, message", [(300, "Invalid"), (9, "utf-8")])
def test_a_parquet_file_that_is_damaged_inside_is_named(tmp_path, size, message):
    path = tmp_path / "a.parquet"
    texts = [f"{number:09}" * 9 for number in range(99)]
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    start = data.index(texts[50].encode())
    path.write_bytes(data[:start] + b"\xff" * size + data[start + size :])
    with pytest.raises(ValueError, match=f"a.parquet is damaged or cut short .*{message}.*: fetch it again"):
        read(path)


def test_a_path_without_files_is_named(tmp_path):
    written(tmp_path / "a.md", b"x")
    with pytest.raises(FileNotFoundError, match=r"missing.txt does not exist: give a file, a folder, a glob"):
        read(tmp_path / "missing.txt")
    for path in (tmp_path, f"{tmp_path}/*.txt"):
        with pytest.raises(FileNotFoundError, match=r"matches no file of a kind that can be read: .txt, .json, .jsonl"):
            read(path)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{name} needs the package {package}: pip install {package}"):
        read(written(tmp_path / name, b"x"))


def test_the_embedded_source_is_the_embedded_corpus(monkeypatch, tmp_path):
    from jaxllm.data import embedded

    path = written(tmp_path / "a.py", b"12")
    monkeypatch.setattr(embedded, "files", lambda: (path,))
    monkeypatch.setattr(embedded, "documents", lambda: ("a", "b"))
    source = DocumentSource("embedded")
    assert [tuple(document) for document in source.documents()] == [("a", 1), ("b", 2)]
    fingerprint = source.fingerprint
    path.write_bytes(b"13")
    assert DocumentSource("embedded").fingerprint != fingerprint


def test_records_come_whole_with_their_place_and_raise_only_when_they_are_parsed(tmp_path):
    path = written(tmp_path / "a.jsonl", b'{"a": 1, "b": [2]}\n\n{\n[]\n{"a": 3}\n')
    records = list(DocumentSource(str(path)).records())
    assert [record.where for record in records] == [f"{path}, line {line}" for line in (1, 3, 4, 5)]
    assert records[0].parsed(dict.copy) == {"a": 1, "b": [2]} and records[3].parsed(len) == 1
    for record, reason in ((records[1], "not_json"), (records[2], "not_an_object")):
        with pytest.raises(Malformed, match=f"{record.where}: ") as error:
            record.parsed(dict.copy)
        assert error.value.reason == reason


def test_a_record_is_a_line_of_json_or_its_field_is_named():
    value = {"a": "é ▁", "b": [None, {"c": 1.5}]}
    assert json_line(value) == json.dumps(value, ensure_ascii=False) + "\n"
    for field, held, why in (
        ("day", datetime.date(2020, 1, 2), "not JSON serializable"),
        ("raw", b"x", "not JSON serializable"),
        ("title", ["\ud800"], "surrogates not allowed"),
        ("\ud800", 1, "surrogates not allowed"),
    ):
        with pytest.raises(Malformed, match=re.escape(f"field {field!r} holds {held!r}, which JSON") + f".*{why}"):
            json_line({"text": "a", field: held})


def test_a_parquet_file_gives_the_columns_that_are_asked_for_or_all(tmp_path):
    turns = [{"role": "user", "content": "a", "tool_calls": None}]
    parquet.write_table(pyarrow.table({"id": [1], "messages": [turns]}), tmp_path / "a.parquet")
    source = DocumentSource(str(tmp_path))
    assert [record.value for record in source.records()] == [{"id": 1, "messages": turns}]
    assert [record.value for record in source.records(("id",))] == [{"id": 1}]
