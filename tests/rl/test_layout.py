import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.rl.layout import Sample, Shape, filled, layout

SHAPE = Shape(micro_batches=3, rows=2, length=12)


def sample(prompt, length, *, seed=0, tool=()):
    draw = np.random.default_rng([seed, length, *prompt])
    sampled = np.array([place not in tool for place in range(length)])
    logp = np.where(sampled, -draw.random(length), 0).astype(np.float32)
    return Sample(tuple(prompt), draw.integers(5, 40, length).astype(np.int32), sampled, logp)


SAMPLES = [
    *(sample([2, 7, 8], length, seed=length) for length in (3, 2, 4)),  # 2 + 3 + 2 + 4 places of a row of 12
    sample([2, 7, 8], 5, tool=(1, 2)),  # no room left: the prompt comes again
    sample([2], 3),  # a prompt of one token has no piece of its own
]


def test_each_sample_lies_whole_behind_the_last_token_of_its_prompt():
    found = layout(SAMPLES, SHAPE)
    rows = {name: array.reshape(-1, SHAPE.length) for name, array in found.batch.items()}
    for each, (row, start) in zip(SAMPLES, found.places, strict=True):
        here = (row, slice(start, start + len(each.tokens)))
        assert rows["targets_BT"][here].tolist() == each.tokens.tolist()
        assert rows["tokens_BT"][here].tolist() == [each.prompt[-1], *each.tokens[:-1].tolist()]
        assert rows["positions_BT"][here].tolist() == [
            len(each.prompt) - 1 + place for place in range(len(each.tokens))
        ]
        assert rows["mask_BT"][here].tolist() == each.sampled.tolist()
        own, parent = rows["segments_BT"][here], rows["parents_BT"][here]
        assert len(set(own.tolist())) == len(set(parent.tolist())) == 1
        piece = rows["segments_BT"][row] == parent[0]
        if len(each.prompt) > 1:
            assert parent[0] != own[0] and rows["tokens_BT"][row][piece].tolist() == list(each.prompt[:-1])
            assert rows["positions_BT"][row][piece].tolist() == list(range(len(each.prompt) - 1))
        else:
            assert parent[0] == own[0]
    assert sum(rows["mask_BT"].sum(axis=1)) == sum(each.sampled.sum() for each in SAMPLES)


def test_a_prompt_is_read_once_in_a_row():
    found = layout(SAMPLES, SHAPE)
    assert [row for row, _ in found.places] == [0, 0, 0, 1, 1]
    assert np.count_nonzero(found.batch["segments_BT"]) == (2 + 3 + 2 + 4) + (2 + 5) + 3


def test_micro_batches_that_nothing_fills_come_last_and_are_told():
    found = layout(SAMPLES, SHAPE)
    assert int(filled({name: jnp.asarray(x) for name, x in found.batch.items()})) == 1
    assert not found.batch["segments_BT"][1:].any() and not found.batch["mask_BT"][1:].any()


def test_columns_that_were_laid_are_read_back():
    found, lengths = layout(SAMPLES, SHAPE), [len(each.tokens) for each in SAMPLES]
    values_NW = np.zeros((len(SAMPLES), 6), np.float32)
    for values_W, each in zip(values_NW, SAMPLES, strict=True):
        values_W[: len(each.tokens)] = each.logp
    laid = found.lay({"sampled_logp_BT": values_NW}, lengths)["sampled_logp_BT"]
    assert laid.shape == tuple(SHAPE) and np.all(laid[~found.batch["mask_BT"]] == 0)
    np.testing.assert_array_equal(found.read(laid, lengths, 6), values_NW)


def test_what_is_said_of_a_completion_is_what_is_said_of_it_alone(tiny, built):
    model, params = built(tiny(layer_pattern=("global", "local"), sliding_window=4))
    found = layout(SAMPLES, SHAPE)
    names = ("tokens_BT", "positions_BT", "segments_BT", "parents_BT")
    batch = {name: array.reshape(-1, SHAPE.length) for name, array in found.batch.items()}
    together = jax.jit(lambda p, b: model.forward(p, b["tokens_BT"], **{name: b[name] for name in names[1:]}))
    logits_BTV = np.asarray(together(params, batch))
    width = max(len(each.prompt) + len(each.tokens) for each in SAMPLES)
    alone_BT = np.zeros((len(SAMPLES), width), np.int32)
    for alone_T, each in zip(alone_BT, SAMPLES, strict=True):
        alone_T[: len(each.prompt) + len(each.tokens)] = [*each.prompt, *each.tokens]
    wanted_BTV = np.asarray(jax.jit(model.forward)(params, alone_BT))
    for number, (each, (row, start)) in enumerate(zip(SAMPLES, found.places, strict=True)):
        first, n = len(each.prompt) - 1, len(each.tokens)
        wanted, got = wanted_BTV[number, first : first + n], logits_BTV[row, start : start + n]
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_what_does_not_fit_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match="a sample has 13 pairs of tokens, a row 12: raise data.sequence_length"):
        layout([sample([2, 7, 8], 11)], SHAPE)
    with pytest.raises(ValueError, match="7 samples may need as many rows, and there are 6: raise loop.batch_size"):
        layout([sample([2], 2)] * 7, SHAPE)
