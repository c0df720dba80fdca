import jax
import numpy as np
import pytest

from jaxllm.evaluate.scoring import answer_nlls
from jaxllm.text.chat import Conversation, render
from jaxllm.text.tokenizer import byte_tokenizer


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
