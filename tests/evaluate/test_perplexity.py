import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.evaluate.perplexity import by_document, evaluator, likelihood, num_target_bytes, together, weighed
from jaxllm.metrics import Ratio
from jaxllm.model import parameter_rules
from jaxllm.text.tokenizer import byte_tokenizer
from jaxllm.train.objectives import ObjectiveConfig, next_token

ROWS, T = 7, 8


@pytest.fixture(scope="module")
def rows(packed_batch):
    return {name: x[0, :ROWS] for name, x in packed_batch(1, ROWS + 1, T).items() if name != "weight_BT"}


def batches(rows, batch_size, micro_batches=1):
    """Batches of so many rows, the last one filled with rows that count for nothing."""
    for start in range(0, ROWS, batch_size):
        part = {name: x[start : start + batch_size] for name, x in rows.items()}
        missing = batch_size - len(part["mask_BT"])
        part = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in part.items()}
        yield {name: x.reshape(micro_batches, -1, T) for name, x in part.items()}


@pytest.fixture(scope="module")
def evaluate(tiny, built):
    model, params = built(tiny())
    measure = evaluator(next_token(model, ObjectiveConfig(0.1)), weighed, lambda batch: batch)
    return lambda batches: measure(params, batches)["nll"]


@pytest.fixture(scope="module")
def dense(tiny, built, rows):
    """(nats, targets) from the logits, row by row, in float64."""
    model, params = built(tiny())
    nats = 0.0
    forward = jax.jit(model.forward)
    for row in range(ROWS):
        one = {name: x[row : row + 1] for name, x in rows.items()}
        logits = np.float64(
            forward(params, one["tokens_BT"], positions_BT=one["positions_BT"], segments_BT=one["segments_BT"])
        )[0]
        for t in np.flatnonzero(one["mask_BT"][0]):
            nats += np.log(np.exp(logits[t]).sum()) - logits[t, one["targets_BT"][0, t]]
    return nats, rows["mask_BT"].sum()


@pytest.mark.parametrize("batch_size, micro_batches", [(1, 1), (2, 2), (3, 1), (8, 1), (8, 4), (16, 2)])
def test_the_likelihood_does_not_depend_on_the_batch_size(evaluate, rows, dense, batch_size, micro_batches):
    nll = evaluate(batches(rows, batch_size, micro_batches))
    assert nll.count == dense[1]
    assert abs(nll.total / nll.count - dense[0] / dense[1]) <= 1e-6


def test_the_likelihood_does_not_depend_on_the_devices(tiny, built, rows, dense, make_mesh):
    model, params = built(tiny())
    on = make_mesh(1, 4, 2)
    with jax.set_mesh(on):
        placed = jax.tree.map(
            jax.device_put, params, sharding.parameter_shardings(parameter_rules(model.config), params, on)
        )
        measure = evaluator(
            next_token(model, ObjectiveConfig(0.0)), weighed, lambda batch: sharding.global_batch(batch, on)
        )
        nll = measure(placed, batches(rows, 4))["nll"]
    assert nll.count == dense[1] and abs(nll.total - dense[0]) / dense[1] <= 1e-6


def test_sums_over_many_batches_keep_their_digits():
    measure = evaluator(
        lambda _, batch: (0.0, {"nll": Ratio(jnp.sum(batch["x"]), jnp.float32(1))}), lambda _, x: x, lambda x: x
    )
    found = measure({}, ({"x": np.full((1, 1), value, np.float32)} for value in [2.0**25] + 64 * [1.0]))["nll"]
    assert (found.total, found.count) == (2.0**25 + 64, 65)


def test_likelihood_in_every_unit():
    found = likelihood(Ratio(60.0, 20.0), 50)
    expected = {
        "nats_per_token": 3.0,
        "perplexity": math.e**3,
        "bits_per_byte": 60 / math.log(2) / 50,
        "tokens": 20,
        "bytes": 50,
    }
    assert found == pytest.approx(expected)
    assert math.isfinite(likelihood(Ratio(1e6, 1.0), 1)["perplexity"])


def test_bytes_are_those_of_unmasked_targets():
    targets, mask = np.array([[[0, 1, 2], [2, 2, 1]]]), np.array([[[True, True, False], [True, False, False]]])
    assert num_target_bytes({"targets_BT": targets, "mask_BT": mask}, np.array([1, 10, 100])) == 1 + 10 + 100


def test_weights_of_a_batch_sum_to_one_over_all_its_micro_batches(packed_batch):
    batch = packed_batch(4, 8, T)
    found = weighed(None, {name: x for name, x in batch.items() if name != "weight_BT"})
    np.testing.assert_allclose(found["weight_BT"], batch["weight_BT"], rtol=1e-6)
    np.testing.assert_allclose(np.sum(found["weight_BT"]), 1.0, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_byte_of_the_files_is_counted_once(tiny, built, tmp_path, batch_size):
    texts = ["plain", "é▁\n😀 more than one row of tokens", "end"]
    (tmp_path / "texts.jsonl").write_text(
        "".join(f'{{"body": "{text}"}}\n'.replace("\n😀", "\\n😀") for text in texts), encoding="utf-8"
    )
    model, params = built(tiny(vocab_size=288))
    how = dict(path=str(tmp_path / "texts.jsonl"), field="body", sequence_length=16, batch_size=batch_size)
    found = together(by_document(model, params, byte_tokenizer(), **how))
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found["bytes"] == num_bytes and found["tokens"] == num_bytes + len(texts)
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] * found["tokens"] / math.log(2) / num_bytes)
    assert 3 < found["nats_per_token"] < 12


def test_where_nothing_opens_a_document_its_first_token_is_not_predicted_and_its_bytes_do_not_count(
    tiny, built, tmp_path, theirs
):
    texts = ["plain words", "The value of an expression", "end"]
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    how = dict(path=str(tmp_path / "texts.jsonl"), field="text", sequence_length=16, batch_size=2)
    model, params = built(tiny(vocab_size=640))
    for name in ("qwen", "llama3"):
        tokenizer = theirs(name)
        ids = [tokenizer.encode(text) for text in texts]
        first = [0 if tokenizer.bos_ids else len(tokenizer.token_bytes(each[0])) for each in ids]
        found = together(by_document(model, params, tokenizer, **how))
        assert found["bytes"] == sum(map(len, texts)) - sum(first)
        assert found["tokens"] == sum(map(len, ids)) + len(texts) * len(tokenizer.bos_ids)


@pytest.fixture
def read(tiny, built, tmp_path):
    """A function: texts, options -> what a tiny model reads in a file of them, at most sixteen tokens at a time."""

    def read(texts, **how):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
        how = dict(path=str(path), field="text", sequence_length=16, batch_size=8) | how
        return by_document(*built(tiny(vocab_size=288)), byte_tokenizer(), **how)

    return read


TEXTS = ["plain", "", "a longer text than two rows of sixteen tokens hold", "end", "é☃"]


def test_each_document_has_its_own_nats_whatever_the_batch_size(tiny, built, read):
    model, params = built(tiny(vocab_size=288))
    tokenizer, forward = byte_tokenizer(), jax.jit(model.forward)
    found = {size: read(TEXTS, batch_size=size) for size in (1, 8, 64)}
    for number, text in enumerate(TEXTS):
        ids, nats = tokenizer.documents([text])[0], 0.0
        for start in range(0, len(ids) - 1, 16):
            after = ids[start + 1 : start + 17]
            logp_TV = np.float64(jax.nn.log_softmax(forward(params, ids[None, start : start + len(after)])[0]))
            nats -= logp_TV[np.arange(len(after)), after].sum()
        for documents in found.values():
            assert documents[number].nats == pytest.approx(nats, rel=1e-6)
            assert documents[number][2:] == (len(ids) - 1, len(text.encode())) and documents[number].text == text


def test_no_documents_nats_depend_on_the_documents_beside_it(read):
    alone = {text: one for text in TEXTS for one in read([text])}
    for texts in (TEXTS, TEXTS[::-1], ["one before it", *TEXTS]):
        for one in read(texts)[-len(TEXTS) :]:
            assert one.nats == pytest.approx(alone[one.text].nats, rel=1e-6)


def test_a_count_limits_the_documents_that_are_read(read):
    assert [one.text for one in read(TEXTS, count=3)] == TEXTS[:3]


def test_documents_without_a_token_to_predict_are_refused(tmp_path, theirs):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    how = dict(path=str(tmp_path / "empty.jsonl"), field="text", sequence_length=16, batch_size=2)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no token to predict: give documents that are not empty"):
        by_document(None, {}, theirs("qwen"), **how)


def test_files_without_a_byte_have_no_bits_per_byte():
    found = likelihood(Ratio(2.0, 1.0), 0)
    assert math.isnan(found["bits_per_byte"]) and found["nats_per_token"] == 2.0
