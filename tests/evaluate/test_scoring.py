import jax
import numpy as np
import pytest

from jaxllm.evaluate.duels import answer_logps
from jaxllm.evaluate.scoring import Span, answer_nlls, span_logps, text_span
from jaxllm.text.chat import Conversation, render
from jaxllm.text.special_tokens import BOS_ID
from jaxllm.text.tokenizer import byte_tokenizer, train


def conversation(question, answer):
    return Conversation(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


CHATS = [conversation("a", "yes"), conversation("longer " * 3, "no no"), conversation("b", "z")]


@pytest.fixture(scope="module")
def scores(tiny, built):
    model, params = built(tiny(vocab_size=288))

    def scores(conversations, **how):
        return list(answer_nlls(model, params, byte_tokenizer(), conversations, **{"sequence_length": 40} | how))

    return scores, model, params


def test_a_score_is_the_mean_over_the_answer_and_its_end_whatever_the_batch(scores):
    scores, model, params = scores
    expected = []
    for rendered in render(CHATS, byte_tokenizer()):
        ids = rendered.tokens
        logp_TV = np.float64(jax.nn.log_softmax(jax.jit(model.forward)(params, ids[None, :-1])[0]))
        taken = [-logp_TV[place - 1, ids[place]] for place in np.flatnonzero(rendered.supervised)]
        expected.append(np.mean(taken))
    np.testing.assert_allclose(scores(CHATS), expected, atol=1e-5)
    np.testing.assert_allclose(scores(CHATS, batch_size=2), expected, atol=1e-5)


def test_an_answer_beyond_what_is_read_has_no_score(scores):
    found = scores[0](CHATS, sequence_length=8)
    assert np.isnan(found).tolist() == [False, True, False]


# ---- spans ----


def test_packed_spans_are_scored_as_answers_are_alone_whatever_the_batch(scores):
    _, model, params = scores
    draw = np.random.default_rng(0)
    spans = [Span(draw.integers(0, 288, size).tolist(), int(start)) for size, start in
             [(2, 1), (9, 4), (16, 15), (5, 1), (7, 6), (3, 2)]]  # fmt: skip
    before, after = [span.ids[: span.start] for span in spans], [span.ids[span.start :] for span in spans]
    expected = answer_logps(model, params, before, after, batch_size=1)
    for batch_size in (1, 8, 64):
        found = span_logps(model, params, spans, length=16, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert len(set(expected)) == 6


def test_blanks_at_the_end_of_a_context_belong_to_what_follows():
    """A tokenizer that joins a blank to the word after it would never meet the other cut in training."""
    tokenizer = train(["the cat sat on the mat and the cat ran"] * 50, vocab_size=320)
    joined = text_span(tokenizer, "the cat", " sat")
    assert text_span(tokenizer, "the cat ", "sat") == text_span(tokenizer, "the cat ", "sat") == joined
    assert joined.ids == [BOS_ID, *tokenizer.encode("the cat"), *joined.ids[joined.start :]]
    assert tokenizer.decode(joined.ids[joined.start :]) == " sat"
    assert tokenizer.encode("the cat ") != tokenizer.encode("the cat")


def test_without_a_context_what_opens_a_document_comes_before(theirs):
    assert text_span(byte_tokenizer(), "", "a") == Span([BOS_ID, *byte_tokenizer().encode("a")], 1)
    tokenizer = theirs("qwen")
    assert not tokenizer.bos_ids
    span = text_span(tokenizer, "", "word")
    assert span == Span([tokenizer.eos_id, *tokenizer.encode("word")], 1)
    assert text_span(tokenizer, "a", " b").ids == tokenizer.encode("a b")


def test_a_continuation_without_a_token_is_refused():
    with pytest.raises(ValueError, match="the continuation '' has no token of its own after 'abc'"):
        text_span(byte_tokenizer(), "abc", "")


def test_a_span_is_cut_at_its_left():
    span = Span([1, 2, 3, 4, 5], 3)
    assert span.within(4) == span and span.within(3) == Span([2, 3, 4, 5], 2, 1) and span.within(2).start == 1
    with pytest.raises(ValueError, match="2 tokens to score are more than 1 that are read"):
        span.within(1)
