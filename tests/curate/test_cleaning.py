import gzip
import json

import pytest

from jaxllm import curate, figures
from jaxllm.curate import cleaning
from jaxllm.data import lessons, world
from jaxllm.data.noise import noise

THINGS = ("red trunk", "pier"), ("old cart", "mill"), ("blue boat", "bridge"), ("small ladder", "church")
PROSE = [f"The {thing} stood near the {place} and nobody knew whose it was." for thing, place in THINGS]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(directory, name):
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What would be drawn, and where: a list of the paths."""
    paths = []
    monkeypatch.setattr(figures, "bars", lambda panels, path: paths.append(path))
    return paths


@pytest.fixture
def cleaned(tmp_path):
    """A function: texts or records, thresholds -> (records kept, records dropped, report)."""

    def cleaned(records, **thresholds):
        records = [{"text": each} if isinstance(each, str) else each for each in records]
        out = tmp_path / "out"
        report = curate.clean(files=write(tmp_path / "raw.jsonl", records), out=out, **thresholds)
        assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert not list(out.glob("*.partial"))
        return read(out, "clean"), read(out, "dropped"), report

    return cleaned


def test_records_are_kept_whole_in_order_and_the_others_say_why_they_are_not(cleaned):
    records = [{"id": n, "text": text, "é": [1]} for n, text in enumerate([PROSE[0], "no", PROSE[1], PROSE[0].upper()])]
    kept, dropped, report = cleaned(records)
    assert kept == [records[0], records[2]]
    short, again = dropped
    assert short == {"reason": "too_short", "record": records[1]}
    assert again == {"reason": "duplicate", "duplicate_of": 0, "record": records[3]}
    size = [len(record["text"]) for record in records]
    assert report["documents"] == 4 and report["bytes"] == sum(size)
    assert report["kept"] == {"documents": 2, "bytes": size[0] + size[2], "examples": PROSE[:2]}
    assert report["dropped"]["too_short"] == {"documents": 1, "bytes": 2, "examples": ["no"]}
    assert report["removed"] == {} and "planted" not in report


def test_the_report_is_drawn(tmp_path, monkeypatch, drawn):
    files = write(tmp_path / "raw.jsonl", [{"text": text} for text in PROSE])
    curate.clean(files=files, out=tmp_path / "a")
    assert drawn == [tmp_path / "a" / "figures" / "curate.png"]
    monkeypatch.undo()
    curate.clean(files=files, out=tmp_path / "b")
    figure = tmp_path / "b" / "figures" / "curate.png"
    size = figure.stat().st_size
    assert size > 1000
    figure.unlink()
    curate.clean(files=files, out=tmp_path / "b")
    assert figure.stat().st_size == size, "done but for the figure"


def test_boilerplate_and_lines_that_recur_are_removed_from_what_is_kept(cleaned):
    header = "You are here: Home > Tales"
    records = [f"{header}\nWe use cookies.\n{text}" for text in PROSE] + ["Sign up for tales now. Read more."]
    kept, dropped, report = cleaned(records, max_recurring=3)
    assert [record["text"] for record in kept] == PROSE
    assert [record["reason"] for record in dropped] == ["boilerplate"]
    assert report["removed"] == {
        "boilerplate": {"lines": 4, "bytes": 60, "examples": ["We use cookies."] * 3},
        "recurring_lines": {"lines": 4, "bytes": 4 * len(header), "examples": [header] * 3},
    }


@pytest.mark.parametrize("most, texts", [(4, 4), (0, 4), (3, 2)])
def test_a_document_of_which_too_little_is_left_is_dropped(cleaned, most, texts):
    header = "You are here: Home > Tales"
    # The last two say nothing else of their own, but for a word.
    kept, dropped, report = cleaned([f"{header}\n{text}" for text in (*PROSE[:2], "yes", "none")], max_recurring=most)
    assert len(kept) == texts
    assert [(record["reason"], record["record"]["text"]) for record in dropped] == [
        ("recurring_lines", f"{header}\n{text}") for text in ("yes", "none")[: 4 - texts]
    ]


def test_a_line_counts_once_for_documents_that_are_there_already(cleaned):
    kept, dropped, _ = cleaned([PROSE[0]] * 9 + PROSE[1:], max_recurring=3)
    assert [record["text"] for record in kept] == PROSE and len(dropped) == 8


def test_filters_see_a_text_without_its_boilerplate(cleaned):
    text = f"{PROSE[0]}\nA boy sat on it for most of the morning, and then an old man with a newspaper."
    kept, *_ = cleaned(["We use cookies.\n" * 3 + text])
    assert kept == [{"text": text}]


def test_files_of_any_kind_are_read_and_a_text_without_fields_gets_one(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text(PROSE[0])
    with gzip.open(tmp_path / "raw" / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": PROSE[1], "text": 7}) + "\n")
    curate.clean(files=str(tmp_path / "raw"), out=tmp_path / "out", field="body")
    assert read(tmp_path / "out", "clean") == [{"body": PROSE[0]}, {"body": PROSE[1], "text": 7}]


def test_a_record_without_a_text_is_named_and_nothing_is_written(tmp_path):
    path = write(tmp_path / "raw.jsonl", [{"text": PROSE[0]}, {"body": "x"}])
    with pytest.raises(ValueError, match=f"{path}, line 2: no field 'text' in \\['body'\\]"):
        curate.clean(files=path, out=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="missing.jsonl does not exist: give a file"):
        curate.clean(files=str(tmp_path / "missing.jsonl"), out=tmp_path / "out")
    with pytest.raises(ValueError, match="mi_words is no threshold; did you mean 'min_words'"):
        curate.clean(files=path, out=tmp_path / "out", mi_words=2)
    assert not (tmp_path / "out").exists()


def test_a_record_that_cannot_be_written_is_named_and_nothing_is_written(tmp_path):
    path = write(tmp_path / "raw.jsonl", [{"text": PROSE[0]}, {"text": PROSE[1], "title": "\ud800"}])
    with pytest.raises(ValueError, match=f"{path}, line 2: field 'title' holds '.ud800', which JSON cannot .*leave it"):
        curate.clean(files=path, out=tmp_path / "out")
    with pytest.raises(ValueError, match=f"{path}, line 2: lone surrogate at character 0 of 'title'"):
        curate.clean(
            files=write(tmp_path / "raw.jsonl", [{"title": "a"}, {"title": "\ud800"}]), out=tmp_path, field="title"
        )
    assert [each.name for each in tmp_path.iterdir()] == ["raw.jsonl"]


def test_what_fails_while_it_writes_leaves_nothing_half_written(cleaned, tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "planted", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cleaned(PROSE)
    assert not list((tmp_path / "out").iterdir())


def test_a_reason_of_the_records_own_stays_beside_ours(cleaned):
    record = {"text": "no", "reason": "mine", "duplicate_of": "x", "record": 1}
    assert cleaned([*PROSE, record])[1] == [{"reason": "too_short", "record": record}]


@pytest.mark.parametrize(
    "texts, reasons",
    [
        (["a", "b", "<<<< >>>> {}"], "{'too_short': 2, 'symbols': 1}"),
        (["You are here: Home\nyes", "You are here: Home\nno"], "{'recurring_lines': 2}"),
    ],
)
def test_a_corpus_of_which_nothing_is_kept_is_an_error_that_says_why(cleaned, tmp_path, texts, reasons):
    with pytest.raises(ValueError, match=f"none of the {len(texts)} documents is kept: {reasons}; change the limits"):
        cleaned(texts, max_recurring=1)
    assert not list((tmp_path / "out").iterdir())


def test_done_again_it_does_nothing_and_says_so(cleaned, tmp_path, capsys):
    first = cleaned([*PROSE, "no"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert "already" not in capsys.readouterr().err
    assert cleaned([*PROSE, "no"]) == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert f"{tmp_path}/out holds these documents already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "records, thresholds", [(PROSE[:3], {}), (PROSE, {"min_words": 4}), (PROSE, {"preset": "web"})]
)
def test_a_result_of_other_documents_or_limits_is_not_replaced(cleaned, tmp_path, records, thresholds):
    cleaned(PROSE)
    before = (tmp_path / "out" / "clean.jsonl").read_bytes()
    with pytest.raises(ValueError, match="report.json is of other documents, or of other limits: give --out another"):
        cleaned(records, **thresholds)
    assert (tmp_path / "out" / "clean.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["clean.jsonl", "dropped.jsonl"])
def test_files_that_say_something_else_are_not_replaced(cleaned, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine\n")
    with pytest.raises(ValueError, match=f"{name} exists and says something else: give --out another folder"):
        cleaned(PROSE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine\n"


def test_what_was_stopped_before_its_report_is_taken_up(cleaned, tmp_path):
    first = cleaned([*PROSE, "no"])
    (tmp_path / "out" / "report.json").unlink()
    (tmp_path / "out" / "clean.jsonl.partial").write_text("cut sho")
    assert cleaned([*PROSE, "no"]) == first


def test_the_result_depends_on_the_documents_alone_not_on_where_they_lie(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "raw.jsonl", [{"text": text} for text in [*PROSE, *PROSE]])
        curate.clean(files=path, out=tmp_path / name / "out")
    for name in ("clean.jsonl", "dropped.jsonl", "report.json"):
        assert (tmp_path / "a" / "out" / name).read_bytes() == (tmp_path / "b" / "out" / name).read_bytes()


@pytest.mark.parametrize("seed", range(2))
def test_planted_noise_is_caught_and_lives_of_one_person_are_not(cleaned, seed):
    drawn = world.create(seed, people=24, heldout=4)
    lives = list(world.documents([*drawn.asked, *drawn.heldout], seed=seed, biographies=40))
    kept, dropped, report = cleaned(lessons.mixed(lives, noise(lives, seed=seed, share=0.15), seed=seed))
    assert sum(of for _, of in report["planted"].values()) == round(len(lives) * 0.15 / 0.85)
    assert report["clean"]["documents"] == len(lives) == 960
    numbers = curate.numbers(report)
    assert numbers["caught"] >= 0.95 and numbers["lost"] <= 0.005
    assert abs(len(kept) - len(lives)) <= 0.005 * len(lives)
