import json
import shutil

import pytest

from jaxllm import workdir
from jaxllm.model import flops_per_token
from jaxllm.pipeline.kinds import KINDS

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
