import importlib.util
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm.evaluate.harness import Harness, harness
from jaxllm.evaluate.scoring import Span, spoken
from jaxllm.evaluate.suites import Run
from jaxllm.rewards.answers import TAGS
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import BOS_ID
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
LENGTH = 24


def requests(*args):
    return [SimpleNamespace(args=each) for each in args]


@pytest.fixture(scope="module")
def adapter(tiny, built):
    model, params = built(tiny(vocab_size=288))
    return Harness(Run("run@1", model, params, TOKENIZER, LENGTH), batch_size=2)


@pytest.fixture(scope="module")
def forward(adapter):
    program = jax.jit(adapter.run.model.forward)

    def forward(ids):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.float64(jax.nn.log_softmax(program(adapter.run.params, padded)[0]))[: len(ids)]

    return forward


def oracle(forward, before, after):
    logp_TV = forward([*before, *after])
    places = range(len(before) - 1, len(before) + len(after) - 1)
    taken = [logp_TV[place, token] for place, token in zip(places, after, strict=True)]
    greedy = all(logp_TV[place].argmax() == token for place, token in zip(places, after, strict=True))
    return sum(taken), greedy


PAIRS = [("one", " two"), ("one  ", "two"), ("", "alone"), (" \n", "x"), ("é", "☃"), ("a" * 40, " end")]


def test_a_pair_is_scored_as_whole_distributions_score_it(adapter, forward):
    found = adapter.loglikelihood(requests(*PAIRS))
    for (context, continuation), (logp, greedy) in zip(PAIRS, found, strict=True):
        bare = context.rstrip()
        after = TOKENIZER.encode(context[len(bare) :] + continuation)
        before = [BOS_ID, *TOKENIZER.encode(bare)]
        before = before[max(0, len(before) + len(after) - LENGTH - 1) :]
        expected, is_greedy = oracle(forward, before, after)
        assert logp == pytest.approx(expected, abs=1e-4) and greedy == is_greedy
    assert all(isinstance(logp, float) and isinstance(greedy, bool) for logp, greedy in found)


def test_only_what_greedy_decoding_writes_is_greedy(adapter, forward):
    ids = [BOS_ID, *TOKENIZER.encode("go")]
    for _ in range(3):
        ids.append(int(np.argmax(forward(ids)[-1])))
    spans = [Span(ids, 3), Span([*ids[:-1], (ids[-1] + 1) % 288], 3), Span([*ids[:3], ids[3] - 1, *ids[4:]], 4)]
    found = spoken(adapter.run.model, adapter.run.params, spans, length=LENGTH, batch_size=2)
    assert found.greedy[:2].tolist() == [True, False]
    assert found.greedy[2] == oracle(forward, spans[2].ids[:4], spans[2].ids[4:])[1]


def test_the_batch_size_changes_nothing(adapter):
    alone = Harness(adapter.run, batch_size=1).loglikelihood(requests(*PAIRS))
    many = Harness(adapter.run, batch_size=64).loglikelihood(requests(*PAIRS))
    np.testing.assert_allclose(alone, many, rtol=1e-6)


def test_a_rolling_text_is_scored_whole_in_windows(adapter, forward):
    texts = ["short", "x" * 5 + "a longer text than one window holds, and another" + "y" * 9, "z" * LENGTH, ""]
    found = adapter.loglikelihood_rolling(requests(*[(text,) for text in texts]))
    for text, logp in zip(texts, found, strict=True):
        ids, expected, start = [BOS_ID, *TOKENIZER.encode(text)], 0.0, 0
        while start < len(ids) - 1:
            window = ids[start + 1 : start + LENGTH + 1]
            end = start + 1 + len(window)
            expected += oracle(forward, ids[max(0, end - LENGTH - 1) : start + 1], window)[0]
            start += LENGTH
        assert logp == pytest.approx(expected, abs=1e-4)


def test_writing_ends_before_the_first_stop_and_has_no_control_token_but_tags(adapter, forward):
    ids = [BOS_ID, *TOKENIZER.encode("tell")]
    said = []
    while len(said) < 12 and (not said or said[-1] not in TOKENIZER.stop_ids):
        said.append(int(forward([*ids, *said])[-1].argmax()))
    text = TOKENIZER.decode(
        token for token in said if token not in TOKENIZER.special_ids or TOKENIZER.special_tokens[token] in TAGS
    )
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    stop = text[len(text) // 2]
    found = adapter.generate_until(
        requests(("tell", options), ("other", options), ("tell", options | {"until": ["never", stop]}))
    )
    assert found[0] == text and found[2] == text[: text.index(stop)] and len(text) > 3
    assert adapter.generate_until(requests(("tell", options | {"until": stop}))) == [found[2]]


def test_tags_stay_other_control_tokens_go_and_the_first_stop_counts(adapter, monkeypatch):
    from jaxllm.evaluate import harness as module
    from jaxllm.evaluate.answers import Answer
    from jaxllm.text.special_tokens import ANSWER, IDS, USER

    said = [IDS[ANSWER], *TOKENIZER.encode("abcd"), IDS[USER], *TOKENIZER.encode("e"), TOKENIZER.end_id]
    monkeypatch.setattr(module, "answers", lambda *given, **how: [Answer(said, True)])
    assert adapter.generate_until(requests(("q", {"max_gen_toks": 8}))) == [f"{ANSWER}abcde"]
    assert adapter.generate_until(requests(("q", {"until": ["d", "bc"], "max_gen_toks": 8}))) == [f"{ANSWER}a"]


def test_contexts_that_are_too_long_lose_their_beginning(adapter):
    options = {"max_gen_toks": 4}
    long = adapter.generate_until(requests(("q" * 70 + "abcdefghijklmnopqrst", options)))
    assert long == adapter.generate_until(requests(("r" * 99 + "abcdefghijklmnopqrst", options)))
    with pytest.raises(ValueError, match="max_gen_toks=24 leaves no room for a context in 24 tokens: lower it"):
        adapter.generate_until(requests(("a", {"max_gen_toks": 24})))


def test_sampling_is_as_the_options_say(adapter):
    options = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0, "top_k": 50}
    first, again = (adapter.generate_until(requests(("a", options))) for _ in range(2))
    assert first == again != adapter.generate_until(requests(("a", {"max_gen_toks": 8, "temperature": 0.0})))
    with pytest.raises(ValueError, match=r"options \['num_beams'\] of generate_until are not known"):
        adapter.generate_until(requests(("a", {"num_beams": 2})))


def test_a_chat_is_read_as_the_runs_own_template_makes_it(adapter):
    own = Harness(adapter.run)
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    text = own.apply_chat_template(said)
    assert own._ids(text) == chat.prompt(Conversation(tuple(said)), TOKENIZER)
    span = own._span(text, "ok")
    assert span.ids[: span.start] == own._ids(text) and span.ids[span.start :] == TOKENIZER.encode("ok")
    begun = own.apply_chat_template(said[:2], add_generation_prompt=False)
    assert begun.endswith("<|assistant|>Yo")
    assert own.tokenizer_name == TOKENIZER.fingerprint and own.chat_template() == chat.JINJA


def test_without_the_package_it_says_what_to_install(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        harness(adapter.run)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the optional package lm-eval is not installed")
def test_the_package_takes_the_run_for_a_model_of_its_own(adapter):
    from lm_eval.api.model import LM

    found = harness(adapter.run, batch_size=2)
    assert isinstance(found, LM) and found.loglikelihood(requests(*PAIRS)) == adapter.loglikelihood(requests(*PAIRS))
