"""Batches and streams against the forward pass, their neighbours and themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate import SamplerConfig, generate, stream
from jaxllm.losses import token_logprobs
from jaxllm.text.special_tokens import BOS_ID, EOS_ID, PAD_ID
from jaxllm.text.tokenizer import byte_tokenizer

GREEDY = SamplerConfig(temperature=0.0)
KEY = jax.random.key(7)


def prompts(B, T, seed=0, vocab_size=40):
    return np.random.default_rng(seed).integers(0, vocab_size, (B, T)).astype(np.int32)


# ---- batches ----


def test_low_temperature_and_top_k_of_one_are_greedy(tiny, built):
    model, params = built(tiny())
    options = dict(max_new_tokens=12, stop_ids=())
    expected = generate(model, params, prompts(3, 5), [5] * 3, KEY, sampler=GREEDY, **options).tokens_BT
    for sampler in (SamplerConfig(temperature=1e-4), SamplerConfig(top_k=1), SamplerConfig(top_p=1e-6)):
        tokens_BT = generate(model, params, prompts(3, 5), [5] * 3, KEY, sampler=sampler, **options).tokens_BT
        np.testing.assert_array_equal(tokens_BT, expected)


def test_greedy_tokens_of_ragged_rows_are_those_of_each_row_alone_and_of_the_forward_pass(tiny, built):
    model, params = built(tiny())
    lengths = np.arange(1, 41)
    tokens = prompts(40, 40)
    batch = generate(model, params, tokens, lengths, KEY, max_new_tokens=6, sampler=GREEDY, stop_ids=())
    for row in (0, 1, 6, 17, 39):
        one = generate(
            model,
            params,
            tokens[row : row + 1],
            lengths[row : row + 1],
            KEY,
            max_new_tokens=6,
            sampler=GREEDY,
            stop_ids=(),
        )
        np.testing.assert_array_equal(one.tokens_BT[0], batch.tokens_BT[row])
    forward = jax.jit(model.forward)
    full = np.zeros((40, 46), np.int32)
    for row, length in enumerate(lengths):
        full[row, : length + 6] = [*tokens[row, :length], *batch.tokens_BT[row]]
    best = np.asarray(forward(params, full).argmax(-1))
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(best[row, length - 1 : length + 5], batch.tokens_BT[row])


def test_a_rows_sample_depends_on_its_number_and_the_key_only(tiny, built):
    model, params = built(tiny())
    options = dict(max_new_tokens=10, stop_ids=())
    tokens, lengths = prompts(4, 9), np.array([3, 9, 5, 1])
    base = generate(model, params, tokens, lengths, KEY, **options)
    other = np.where(np.arange(9) < lengths[:, None], tokens, 39 - tokens)
    other[2] = 1
    changed = generate(model, params, np.tile(other, (2, 1)), [3, 9, 7, 1] * 2, KEY, **options)
    for row in (0, 1, 3):
        np.testing.assert_array_equal(changed.tokens_BT[row], base.tokens_BT[row])
    # The same prompt in another row, or with another key, draws otherwise.
    assert (changed.tokens_BT[4] != base.tokens_BT[0]).any()
    assert (generate(model, params, tokens, lengths, jax.random.key(8), **options).tokens_BT != base.tokens_BT).any()


def test_a_row_ends_with_its_stop_token_and_changes_no_other(tiny, built):
    model, params = built(tiny())
    tokens, lengths = prompts(6, 5), np.full(6, 5)
    free = generate(model, params, tokens, lengths, KEY, max_new_tokens=12, stop_ids=())
    stops = (int(free.tokens_BT[0, 4]), int(free.tokens_BT[3, 7]))
    stopped = generate(model, params, tokens, lengths, KEY, max_new_tokens=12, stop_ids=stops, pad_id=39)
    for row in range(6):
        is_stop = np.isin(free.tokens_BT[row], stops)
        end = is_stop.argmax() + 1 if is_stop.any() else 12
        np.testing.assert_array_equal(stopped.mask_BT[row], np.arange(12) < end)
        np.testing.assert_array_equal(stopped.tokens_BT[row, :end], free.tokens_BT[row, :end])
        np.testing.assert_array_equal(stopped.logp_BT[row, :end], free.logp_BT[row, :end])
        assert (stopped.tokens_BT[row, end:] == 39).all() and (stopped.logp_BT[row, end:] == 0).all()
    assert 0 < stopped.mask_BT.sum() < 72


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logp_is_the_forward_pass_at_the_temperature_before_any_filter(temperature, tiny, built):
    model, params = built(tiny())
    tokens, lengths = prompts(3, 6), np.array([6, 2, 4])
    sampler = SamplerConfig(temperature=temperature, top_k=5, top_p=0.8)
    new = generate(model, params, tokens, lengths, KEY, max_new_tokens=8, sampler=sampler, stop_ids=())
    assert new.logp_BT.dtype == np.float32
    for row, length in enumerate(lengths):
        full = np.concatenate([tokens[row, :length], new.tokens_BT[row]])[None]
        logits_BTV = jax.jit(model.forward)(params, full[:, :-1]) / (temperature or 1.0)
        logp_BT = token_logprobs(logits_BTV, full[:, 1:])
        np.testing.assert_allclose(new.logp_BT[row], logp_BT[0, length - 1 :], atol=1e-4)


def test_the_returned_ids_are_the_sampled_ones_even_where_text_would_not_give_them_back(tiny, built):
    model, params = built(tiny(vocab_size=288))
    tokenizer = byte_tokenizer()
    new = generate(model, params, prompts(8, 4, vocab_size=288), [4] * 8, KEY, max_new_tokens=24, stop_ids=())
    again = [tokenizer.encode(tokenizer.decode(row)) for row in new.tokens_BT.tolist()]
    assert any(ids != row for ids, row in zip(again, new.tokens_BT.tolist(), strict=True))
    # Decoding one more token from exactly these ids gives their log-probabilities: they are what the model saw.
    full = np.concatenate([prompts(8, 4, vocab_size=288), new.tokens_BT], axis=1)
    logp_BT = token_logprobs(jax.jit(model.forward)(params, full[:, :-1]), full[:, 1:])
    np.testing.assert_allclose(new.logp_BT, logp_BT[:, 3:], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lengths_B=[0, 2]), r"lengths_B=\[0, 2\] must be 2 numbers from 1 to 4"),
        (dict(lengths_B=[5, 2]), r"lengths_B=\[5, 2\] .* the width of prompts_BT"),
        (dict(lengths_B=[2]), "must be 2 numbers"),
        (dict(prompts_BT=[[1, 2, 3, 40], [1, 2, 3, 4]]), "request 0 has ids from 1 to 40, but model.vocab_size=40"),
        (dict(prompts_BT=[[1, 2, 3, -1], [1, 2, 3, 4]]), "request 0 has ids from -1 to 3"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(prompts_BT=np.zeros((0, 4), int), lengths_B=[]), r"prompts_BT of shape \(0, 4\) must be rows of ids"),
        (dict(prompts_BT=[1, 2, 3, 4]), r"prompts_BT of shape \(4,\) must be rows of ids, at least one"),
    ],
)
def test_prompts_that_cannot_be_continued_raise(change, message, tiny, built):
    model, params = built(tiny())
    arguments = dict(prompts_BT=[[1, 2, 3, 4]] * 2, lengths_B=[4, 4], max_new_tokens=3) | change
    with pytest.raises(ValueError, match=message):
        generate(model, params, arguments.pop("prompts_BT"), arguments.pop("lengths_B"), KEY, **arguments)


# ---- streams ----


def streamed(model, params, chunk, **options):
    options = dict(max_new_tokens=40, stop_ids=(EOS_ID,), chunk=chunk) | options
    return list(stream(model, params, byte_tokenizer(), np.array([BOS_ID, 40, 41]), KEY, **options))


def scripted(model, ids):
    """``model``, but the token after position p is ``ids[p]``, nearly surely."""
    ids = jnp.array(ids)

    def extend(params, cache, tokens_BT, lengths_B):
        _, cache = model.extend(params, cache, tokens_BT, lengths_B)
        return 50.0 * jax.nn.one_hot(ids[cache["length_B"] - 1], model.config.vocab_size), cache

    return model._replace(
        extend=extend,
        decode=lambda params, cache, tokens_B: extend(params, cache, tokens_B[:, None], jnp.ones_like(tokens_B)),
    )


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_streamed_pieces_join_to_the_decoded_completion(chunk, tiny, built):
    model, params = built(tiny(vocab_size=288))
    whole = generate(model, params, np.array([[BOS_ID, 40, 41]]), [3], KEY, max_new_tokens=40, stop_ids=())
    assert "".join(streamed(model, params, chunk, stop_ids=())) == byte_tokenizer().decode(whole.tokens_BT[0])


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_stream_never_cuts_a_character_and_ends_before_its_stop_token(chunk, tiny, built):
    model, params = built(tiny(vocab_size=288))
    text = "\u00e9\u4f60\U0001f600 ok"
    ids = [0, 0, *byte_tokenizer().encode(text), EOS_ID, *[100] * 40]
    pieces = streamed(scripted(model, ids), params, chunk)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) > 12 // chunk


def test_a_character_that_never_ends_shows_as_the_replacement_mark(tiny, built):
    model, params = built(tiny(vocab_size=288))
    ids = [0, 0, *byte_tokenizer().encode("a\u4f60")[:-1], EOS_ID, *[100] * 40]
    assert "".join(streamed(scripted(model, ids), params, 2)) == "a\ufffd"


def test_a_stream_in_pieces_of_no_tokens_is_refused(tiny, built):
    with pytest.raises(ValueError, match="chunk=0 must be at least 1 token"):
        streamed(*built(tiny(vocab_size=288)), chunk=0)


def test_rows_of_the_model_that_the_tokenizer_has_not_are_streamed_as_nothing(tiny, built):
    model, params = built(tiny(vocab_size=300))
    ids = [0, 0, *byte_tokenizer().encode("a"), 299, *byte_tokenizer().encode("b"), EOS_ID, *[100] * 40]
    assert "".join(streamed(scripted(model, ids), params, 8)) == "ab"


def test_pads_of_finished_rows_are_the_pad_token(tiny, built):
    model, params = built(tiny(vocab_size=288))
    ids = [50, 51, EOS_ID, *[100] * 40]
    how = dict(max_new_tokens=5, stop_ids=(EOS_ID,))
    new = generate(scripted(model, ids), params, np.array([[BOS_ID], [BOS_ID]]), [1, 1], KEY, **how)
    assert new.tokens_BT.tolist() == [[50, 51, EOS_ID, PAD_ID, PAD_ID]] * 2
    assert new.mask_BT.tolist() == [[True, True, True, False, False]] * 2
