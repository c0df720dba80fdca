import json

import pytest

from jaxllm.text import prepare, tokenizer

TEXTS = [f"The {a} {b} of {c} number {n} stood there." for n, (a, b, c) in enumerate(
    (a, b, c) for a in ("red", "old", "blue", "small", "wide") for b in ("boat", "cart", "gate", "lamp")
    for c in ("Anna", "Boris", "Clara", "David", "Edith", "Felix")
)]  # fmt: skip
SIZE = 350


def test_it_is_measured_on_texts_that_it_did_not_learn_from(tmp_path, monkeypatch):
    learned = []
    train = tokenizer.train
    monkeypatch.setattr(tokenizer, "train", lambda texts, **how: train(learned.extend(texts) or learned, **how))
    found = prepare.learn(iter([*TEXTS, "", *TEXTS[:30]]), out=tmp_path / "new", vocab_size=SIZE, held_out=0.1)
    held_out = [text for text in [*TEXTS, *TEXTS[:30]] if text not in learned]
    assert len(learned) + len(held_out) == 150 and 5 < len(held_out) < 30
    assert not set(learned) & set(held_out)
    saved = tokenizer.load(tmp_path / "new")
    tokens = sum(len(saved.encode(text)) for text in held_out)
    assert found == {
        "vocab_size": SIZE,
        "bytes_per_token": pytest.approx(sum(map(len, held_out)) / tokens),
        "documents": len(learned),
        "bytes": sum(map(len, learned)),
        "held_out_documents": len(held_out),
        "held_out_bytes": sum(map(len, held_out)),
    }
    assert 1 < found["bytes_per_token"] and saved.vocab_size == SIZE


def test_the_side_of_a_text_depends_on_it_alone():
    learned, held_out = prepare._split(TEXTS, 0.2)
    less, fewer = prepare._split(TEXTS[::-3], 0.2)
    assert set(less) <= set(learned) and set(fewer) <= set(held_out) and fewer
    assert set(prepare._split(TEXTS, 0.1)[1]) < set(held_out)


def test_of_few_texts_one_is_held_out_and_one_alone_is_not_enough(tmp_path):
    learned, held_out = prepare._split(["a", "b", "c", "a"], 1e-9)
    assert len(set(held_out)) == 1 and {*learned, *held_out} == {"a", "b", "c"}
    for texts in ([], ["a", "a", ""]):
        with pytest.raises(ValueError, match=f"texts={len(set(texts) - {''})}: one to learn from and another"):
            prepare.learn(texts, out=tmp_path, vocab_size=SIZE)
    with pytest.raises(ValueError, match="held_out=1.0 must be a share of the texts above 0 and below 1"):
        prepare.learn(TEXTS, out=tmp_path, vocab_size=SIZE, held_out=1.0)
    assert not list(tmp_path.iterdir())


def test_no_more_is_read_than_is_learned_from(monkeypatch):
    monkeypatch.setattr(prepare, "MAX_BYTES", 100)
    read = []
    learned, held_out = prepare._split((read.append(text) or text for text in TEXTS), 0.2)
    assert len(read) == len(learned) + len(held_out) == 3 and sum(map(len, read)) >= 100


def test_done_again_it_is_not_learned_again(tmp_path, monkeypatch):
    first = prepare.learn(TEXTS, out=tmp_path, vocab_size=SIZE)
    monkeypatch.setattr(tokenizer, "train", None)
    assert prepare.learn(TEXTS, out=tmp_path, vocab_size=SIZE) == first
    for changed in ({"vocab_size": SIZE + 1}, {"held_out": 0.3}):
        with pytest.raises(ValueError, match="learned.json is of other texts, or of another vocab_size: give --out"):
            prepare.learn(TEXTS, out=tmp_path, **{"vocab_size": SIZE, **changed})
    with pytest.raises(ValueError, match="learned.json is of other texts"):
        prepare.learn(TEXTS[1:], out=tmp_path, vocab_size=SIZE)


def test_files_that_say_something_else_are_not_replaced_and_what_was_stopped_is_taken_up(tmp_path):
    prepare.learn(TEXTS, out=tmp_path, vocab_size=SIZE)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(whole) == {"tokenizer.json", "tokenizer.model", "byte_lengths.npy", "learned.json"}
    for name in ("learned.json", "tokenizer.json", "byte_lengths.npy"):
        (tmp_path / name).unlink()
    prepare.learn(TEXTS, out=tmp_path, vocab_size=SIZE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    (tmp_path / "learned.json").unlink()
    (tmp_path / "tokenizer.model").write_text("mine")
    with pytest.raises(ValueError, match="tokenizer.model exists and says something else: give --out another folder"):
        prepare.learn(TEXTS, out=tmp_path, vocab_size=SIZE)
    assert (tmp_path / "tokenizer.model").read_text() == "mine" and not (tmp_path / "learned.json").exists()


def test_a_run_takes_what_was_learned(tmp_path):
    prepare.learn(TEXTS, out=tmp_path / "learned", vocab_size=SIZE)
    config = prepare.TokenizerConfig("sentencepiece", 4096, str(tmp_path / "learned"))
    taken = prepare.prepare(config, iter(()), directory=tmp_path / "run")
    assert taken.vocab_size == SIZE
    said = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    assert said == json.loads((tmp_path / "learned" / "tokenizer.json").read_text())
