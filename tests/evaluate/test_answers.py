import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rouge_score import rouge_scorer

from jaxllm.evaluate import answers as module
from jaxllm.evaluate.answers import Answer, Row, answered, answers, compared, rouge_l, scores
from jaxllm.generate import SamplerConfig
from jaxllm.text.special_tokens import ASSISTANT, BOS_ID, END_ID, EOS_ID, IDS, THINK
from jaxllm.text.tokenizer import byte_tokenizer

GREEDY = SamplerConfig(temperature=0.0)
PROMPTS = [[BOS_ID, *range(40, 40 + length)] for length in (3, 9, 1, 5, 2, 7, 4)]
STOP_IDS = (END_ID, EOS_ID)
HOW = dict(max_new_tokens=6, sampler=GREEDY, stop_ids=STOP_IDS, batch_size=3)


@pytest.fixture(scope="module")
def loud(tiny, built):
    """A byte model with scaled logits, so that no two are close and greedy means the same however it is worked out."""
    model, params = built(tiny(vocab_size=288))
    return model, jax.tree.map(lambda x: 3 * jnp.asarray(x), params)


@pytest.fixture(scope="module")
def found(loud):
    return answers(*loud, PROMPTS, jax.random.key(0), **HOW)


def one_by_one(model, params, prompt, count):
    """Greedy ids by whole forward passes, up to and with the first stop token."""
    forward, tokens = jax.jit(model.forward), list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(forward(params, padded)[0, len(tokens) - 1])))
        if tokens[-1] in STOP_IDS:
            break
    return tokens[len(prompt) :]


def test_each_prompt_gets_its_own_greedy_answer_whatever_its_batch(loud, found):
    assert [answer.tokens for answer in found] == [one_by_one(*loud, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(answer.tokens) for answer in found}) > 3
    assert answers(*loud, PROMPTS, jax.random.key(0), **HOW | dict(batch_size=4)) == found


def test_an_answer_ends_with_the_end_of_the_turn_or_of_the_document(loud, found):
    """Some of these end with the document; then the second token of one plays the end of the turn."""
    assert {answer.tokens[-1] == EOS_ID for answer in found} == {answer.ended for answer in found} == {True, False}
    end = found[1].tokens[1]
    cut = answers(*loud, PROMPTS, jax.random.key(0), **HOW | dict(stop_ids=(end, EOS_ID)))
    for answer, whole in zip(cut, found, strict=True):
        stop = whole.tokens.index(end) + 1 if end in whole.tokens else None
        assert answer == Answer(whole.tokens[:stop], whole.ended or stop is not None)
    assert cut != found


def test_the_longest_prompts_are_asked_first(loud, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "completions", lambda model, params, queue, key, **how: asked.extend(queue) or ())
    assert list(answered(*loud, PROMPTS, jax.random.key(0), **HOW, known={1})) == []
    assert [len(request.prompt) for request in asked] == [8, 6, 5, 4, 3, 2]
    assert all(request.prompt == PROMPTS[request.number] for request in asked)


def test_interrupted_work_continues_as_if_it_had_not_been(loud):
    sampled = HOW | dict(sampler=SamplerConfig())
    whole = list(answered(*loud, PROMPTS, jax.random.key(7), **sampled))
    assert sorted(number for number, _ in whole) == list(range(7))
    known = {number for number, _ in whole[:4]}
    rest = dict(answered(*loud, PROMPTS, jax.random.key(7), **sampled, known=known))
    assert rest == dict(whole[4:])
    assert list(answered(*loud, PROMPTS, jax.random.key(7), **sampled, known=set(range(7)))) == []


def test_answers_differ_by_number_and_key_and_not_by_batch_size(loud):
    soft = jax.tree.map(lambda x: x / 3, loud[1])
    how = dict(max_new_tokens=6, sampler=SamplerConfig(), stop_ids=STOP_IDS)
    ask = functools.partial(answers, loud[0], soft, [PROMPTS[0]] * 4, **how)
    first = ask(jax.random.key(0), batch_size=2)
    assert len({tuple(answer.tokens) for answer in first}) == 4
    assert ask(jax.random.key(0), batch_size=3) == first != ask(jax.random.key(1), batch_size=2)


def test_rows_are_read_from_ids_up_to_the_stop_token():
    tokenizer = byte_tokenizer()
    spell = tokenizer.encode
    prompt = [BOS_ID, *spell("Name?"), IDS[ASSISTANT]]
    given = Answer([IDS[THINK], *spell("é Ann"), END_ID], True)
    (row,) = compared(tokenizer, [prompt], [[*spell("Ann \n"), END_ID]], [given])
    assert row == Row("<|bos|>Name?<|assistant|>", "Ann \n", "<think>é Ann", pytest.approx(0.5), False, 8, True)
    (row,) = compared(tokenizer, [prompt], [spell("Ann\n")], [Answer(spell(" Ann"), False)])
    assert (row.exact, row.rouge_l, row.ended) == (True, 1.0, False)


def test_scores_are_means_over_the_rows():
    rows = [
        Row("", "", "", 0.5, True, 4, True),
        Row("", "", "", 0.0, False, 8, True),
        Row("", "", "", 0.1, False, 3, False),
    ]
    assert scores(rows) == pytest.approx(
        {"rouge_l": 0.2, "exact_match": 1 / 3, "answer_tokens": 5.0, "answers_ended": 2 / 3}
    )
    with pytest.raises(ValueError, match="no answer to score: hold out at least one conversation"):
        scores([])


def longest_common(a, b):
    """By all subsequences of the shorter, the longest first: exponential, and without a table."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    draw = random.Random(0)
    package = rouge_scorer.RougeScorer(["rougeL"])
    for _ in range(20):
        a, b = (draw.choices("the cat sat on a mat".split(), k=draw.randint(1, 7)) for _ in range(2))
        common = longest_common(a, b)
        precision, recall = common / len(b), common / len(a)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        reference, answer = " ".join(a).capitalize() + ".", "-".join(b)
        assert rouge_l(reference, answer) == pytest.approx(expected)
        assert rouge_l(reference, answer) == package.score(reference, answer)["rougeL"].fmeasure


def test_rouge_l_reads_every_script_and_nothing_is_like_nothing():
    assert rouge_l("Καλημέρα κόσμε", "καλημέρα!") == pytest.approx(2 / 3)
    assert rouge_l("", "") == rouge_l("a", "") == rouge_l("", "a") == rouge_l("?", "!") == 0.0


def test_a_batch_size_below_one_is_refused(loud):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        answers(*loud, PROMPTS, jax.random.key(0), **HOW | dict(batch_size=0))
