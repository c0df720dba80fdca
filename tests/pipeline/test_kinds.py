import json
import shutil
from fnmatch import fnmatch

import pytest

from configs import pretrain
from jaxllm import workdir
from jaxllm.model import flops_per_token
from jaxllm.pipeline.kinds import KINDS

RUN = pretrain.get_config().to_dict()
SMALL = dict(seed=1, people=22, heldout=2, biographies=2, talks=1, sums=30, demonstrations=5, introductions=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the lessons, the clean documents and the tokenizer of a small world lie, and their numbers."""
    home = tmp_path_factory.mktemp("life")
    values = {
        "lessons": SMALL,
        "clean": {"files": f"{home}/lessons/documents.jsonl"},
        "tokenizer": {"files": f"{home}/clean/clean.jsonl", "vocab_size": 400},
    }
    return home, values, {name: KINDS[name].run(given, str(home / name)) for name, given in values.items()}


def test_data_are_made_cleaned_and_cut_into_tokens_each_from_the_one_before(made):
    home, _, numbers = made
    lines = (home / "lessons" / "documents.jsonl").read_text().splitlines()
    assert numbers["lessons"]["documents"] == len(lines)
    assert numbers["clean"]["report"]["documents"] == len(lines)
    assert numbers["clean"]["caught"] > 0.5 > numbers["clean"]["lost"]
    assert numbers["clean"]["documents"] == len((home / "clean" / "clean.jsonl").read_text().splitlines()) < len(lines)
    assert numbers["tokenizer"]["vocab_size"] == 400 and 1 < numbers["tokenizer"]["bytes_per_token"] < 5


def test_the_numbers_of_a_stage_are_those_that_a_gate_may_be_about(made):
    for name, found in made[2].items():
        known = {number for number in found if any(fnmatch(number, pattern) for pattern in KINDS[name].numbers)}
        assert found.keys() - known <= {"report"}
        assert all(any(fnmatch(number, pattern) for number in found) for pattern in KINDS[name].numbers)


@pytest.mark.parametrize(
    "kind, values, said",
    [
        ("lessons", {"poeple": 30}, "of.it.poeple is not a known key; did you mean 'people'"),
        ("lessons", {"people": 20}, "people=20"),
        ("clean", {"files": "x", "min_wrds": 3}, "of.it.min_wrds is not a known key; did you mean 'min_words'"),
        ("clean", {"files": "x", "preset": "wbe"}, "preset='wbe' is not one of"),
        ("clean", {"preset": "web"}, "of.it.files is missing"),
        ("tokenizer", {"files": "x", "vocab_size": 9, "fild": "text"}, "fild is not .*; did you mean 'field'"),
        ("tokenizer", {"files": "x"}, "of.it.vocab_size is missing"),
        ("train", {**RUN, "stgae": "sft"}, "of.it.stgae is not a known key; did you mean 'stage'"),
        ("train", {**RUN, "loop": {**RUN["loop"], "typo": 3}}, "of.it.loop.typo is not a known key"),
        ("train", {**RUN, "stage": "pretrian"}, "stage='pretrian' is not a stage; did you mean 'pretrain'"),
    ],
)
def test_what_is_wrong_with_a_stage_is_known_before_it_is_run(kind, values, said):
    with pytest.raises(ValueError, match=said):
        KINDS[kind].check(values, "of.it")


def test_what_is_done_is_found_again_and_left_alone(made):
    home, values, numbers = made
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert json.dumps({name: KINDS[name].run(given, str(home / name)) for name, given in values.items()}) == json.dumps(
        numbers
    )
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_tokens_flops_and_mfu_are_those_of_the_run(untrained, tmp_path):
    shutil.copytree(untrained(16), tmp_path / "run")
    rows = [
        {"step": 1, "tokens": 10, "compile_seconds": 9.0},
        {"step": 2, "tokens": 110, "seconds": 1.0, "tokens_per_second": 100, "mfu": 0.1},
        {"step": 3, "tokens": 310, "seconds": 3.0, "tokens_per_second": 67, "mfu": 0.3},
        {"step": 3, "validation_loss": 2.0},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spent = KINDS["train"].spent(str(tmp_path / "run"))
    model = workdir.saved(untrained(16)).model.config
    assert spent["tokens"] == 310 and spent["mfu"] == pytest.approx(0.25)
    assert model.vocab_size == 288 and spent["flops"] == 310 * flops_per_token(model, 16)
