import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm import workdir
from jaxllm.evaluate import judges, rewarding
from jaxllm.evaluate.judges import Judgement, by_rule, by_score, points, prompted
from jaxllm.model import placement
from jaxllm.rewards import style
from jaxllm.text import chat, verdicts
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import PAD_ID
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPTS = [Conversation(({"role": "user", "content": text},)) for text in ("a?", "bb?" * 9, "c?", "d?", "e?")]
FIRSTS, SECONDS = ["1", "22", "333", "4" * 30, ""], ["999", "8", "777", "6", "5"]
A, B = (TOKENIZER.encode(letter)[0] for letter in "AB")


def lengths(prompts, answers):
    return np.array([len(answer) for answer in answers])


# ---- scores and rules ----


def test_the_answer_of_the_higher_score_wins_and_equal_ones_tie():
    judgement = by_score(lengths)(PROMPTS, FIRSTS, SECONDS)
    assert judgement.wins.tolist() == [0, 1, 0.5, 1, 0]
    assert judgement.scores.tolist() == [[1, 3], [2, 1], [3, 3], [30, 1], [0, 1]]
    assert judgement.report == {"ties": 0.2, "longer_wins": 1.0}


def test_longer_wins_counts_the_pairs_that_were_decided_and_differ_in_length():
    judge = by_score(lambda prompts, answers: np.array([answer.count("x") for answer in answers]))
    judgement = judge(PROMPTS, ["xx", "y", "x", "yy", "x"], ["xyy", "x", "yyy", "yyy", "yy"])
    assert judgement.wins.tolist() == [1, 0, 1, 0.5, 1]
    assert judgement.report == {"ties": 0.2, "longer_wins": 0.0}
    judgement = judge(PROMPTS, ["xx", "xy", "x", "yy", "x"], ["xyy", "x", "xyyy", "yyy", "yy"])
    assert judgement.report == {"ties": 0.6, "longer_wins": 0.0}
    assert np.isnan(judge(PROMPTS[:2], ["x", "z"], ["y", "zz"]).report["longer_wins"])


def test_an_answer_that_pairs_share_is_scored_once_and_the_same_words_after_another_prompt_are_not():
    asked = []

    def score(prompts, answers):
        asked.extend((prompt.messages[0]["content"], answer) for prompt, answer in zip(prompts, answers, strict=True))
        return np.array([10 * len(p.messages[0]["content"]) + len(a) for p, a in zip(prompts, answers, strict=True)])

    prompts = [PROMPTS[0], Conversation(({"role": "user", "content": "a?"},)), PROMPTS[1], PROMPTS[0]]
    judgement = by_score(score)(prompts, ["x", "x", "x", "zzz"], ["yy", "zzz", "yy", "yy"])
    assert judgement.scores.tolist() == [[21, 22], [21, 23], [271, 272], [23, 22]]
    long = "bb?" * 9
    assert sorted(asked) == [("a?", "x"), ("a?", "yy"), ("a?", "zzz"), (long, "x"), (long, "yy")]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_an_error(bad):
    with pytest.raises(ValueError, match=f"a score is {bad}: mend what scores"):
        by_score(lambda prompts, answers: np.array([1.0, bad]))(PROMPTS[:1], ["a"], ["b"])


def test_a_rule_judges_by_what_it_gives():
    answers = ["e? I am glad.", "bb? " + "bb " * 20]
    judgement = judges.load("rule:style")(PROMPTS[:2], ["Thank you", "no"], answers)
    assert judgement.scores.tolist() == [
        [style.style(prompt, answer, {}) for answer in pair]
        for prompt, pair in zip(PROMPTS, zip(["Thank you", "no"], answers, strict=True), strict=False)
    ]
    assert by_rule("concise")(PROMPTS[:1], ["a"], ["a " * 20]).wins.tolist() == [1]


@pytest.mark.parametrize("count", [(2, 3, 2), (1, 1, 2), (3, 2, 2), (0, 0, 0)])
@pytest.mark.parametrize("judge", [by_rule("style"), prompted(SimpleNamespace(), {}, TOKENIZER)])
def test_every_prompt_has_two_answers(judge, count):
    prompts, firsts, seconds = (x[:n] for x, n in zip((PROMPTS, FIRSTS, SECONDS), count, strict=True))
    with pytest.raises(ValueError, match="{} prompts, {} first and {} second answers: give as many".format(*count)):
        judge(prompts, firsts, seconds)


# ---- a language model that is asked ----


CASES = [(PROMPTS[n], "x" * i, "y" * j) for n, i, j in itertools.product(range(4), (1, 7), (2, 30))]


@pytest.fixture(scope="module")
def speaker(tiny, built):
    """A model whose head is fitted to say either letter, so that some orders agree and some do not."""
    model, params = built(tiny(vocab_size=288, tied_head=False))
    orders = [(prompt, *pair) for prompt, *pair in CASES] + [(prompt, *pair[::-1]) for prompt, *pair in CASES]
    asked = [chat.prompt(verdicts.comparison(*order), TOKENIZER) for order in orders]
    hidden = jax.jit(model.hidden)
    found = np.array([hidden(params, np.array([ids + [PAD_ID] * (160 - len(ids))]))[0, len(ids) - 1] for ids in asked])
    wanted = np.where(np.random.default_rng(0).random(len(CASES)) < 0.5, 1.0, -1.0)
    kernel = np.array(params["head"]["kernel"])
    kernel[:, A], kernel[:, B] = 0.0, np.linalg.lstsq(found, np.concatenate([wanted, -wanted]))[0]
    return model, params | {"head": {"kernel": kernel}}, TOKENIZER


def margins(speaker, prompts, firsts, seconds):
    """log P(A) - log P(B) of each, and P(A) + P(B), from the whole distribution after the prompt that training has."""
    model, params, tokenizer = speaker
    forward = jax.jit(model.forward)
    found = []
    for each in zip(prompts, firsts, seconds, strict=True):
        ids = chat.prompt(verdicts.comparison(*each), tokenizer)
        padded = np.full((1, 160), PAD_ID)
        padded[0, : len(ids)] = ids
        logp_V = np.float64(jax.nn.log_softmax(forward(params, padded)[0, len(ids) - 1]))
        found.append((logp_V[A] - logp_V[B], np.exp(logp_V[A]) + np.exp(logp_V[B])))
    return np.array(found).T


def test_a_verdict_is_what_the_model_says_in_both_orders_and_one_that_changes_is_a_tie(speaker):
    prompts, firsts, seconds = map(list, zip(*CASES, strict=True))
    there, letters = margins(speaker, prompts, firsts, seconds)
    back, others = margins(speaker, prompts, seconds, firsts)
    judgement = prompted(*speaker, batch_size=5)(prompts, firsts, seconds)
    expected = [1 if a > 0 > b else 0 if a < 0 < b else 0.5 for a, b in zip(there, back, strict=True)]
    assert set(expected) == {0, 0.5, 1}, "the case tells nothing apart"
    assert judgement.wins.tolist() == expected and judgement.scores is None
    report = judgement.report
    assert report["consistency"] == np.mean([x != 0.5 for x in expected]) == 1 - report["ties"]
    assert report["position_bias"] == pytest.approx(np.mean([*there, *back] > np.float64(0)) * 2 - 1)
    assert report["letters"] == pytest.approx(np.mean([*letters, *others]), rel=1e-4)


def test_exchanging_the_answers_exchanges_the_verdicts_whatever_the_batch(speaker):
    prompts, firsts, seconds = map(list, zip(*CASES, strict=True))
    one, other = (
        prompted(*speaker)(prompts, firsts, seconds),
        prompted(*speaker, batch_size=3)(prompts, seconds, firsts),
    )
    assert one.wins.tolist() == (1 - other.wins).tolist()
    for name in ("consistency", "position_bias", "letters", "ties"):
        assert one.report[name] == pytest.approx(other.report[name], rel=1e-5), name


def test_a_model_on_a_mesh_says_the_same(speaker, make_mesh):
    model, params, tokenizer = speaker
    some = list(map(list, zip(*CASES[:6], strict=True)))
    alone, mesh = prompted(*speaker, batch_size=5)(*some), make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, placement(model, mesh))
        found = prompted(model, placed, tokenizer, batch_size=5)(*some)
    assert found.wins.tolist() == alone.wins.tolist() and found.report == pytest.approx(alone.report, rel=1e-4)


def test_a_model_that_only_sees_what_is_shown_first_decides_nothing():
    """The head sees one vector at all places: A is always likelier."""
    table = np.zeros((288, 3), np.float32)
    table[A] = 1
    model = SimpleNamespace(
        hidden=lambda params, tokens_BT: np.ones((*tokens_BT.shape, 3), np.float32),
        score=lambda params, x, tokens: (jax.nn.log_softmax(x @ table.T)[np.arange(len(x))[:, None], 0, tokens], 0, 0),
    )
    judgement = prompted(model, {}, TOKENIZER)(PROMPTS, FIRSTS, SECONDS)
    assert judgement.wins.tolist() == [0.5] * 5
    expected = {"ties": 1.0, "consistency": 0.0, "position_bias": 1.0}
    assert {name: judgement.report[name] for name in expected} == expected
    assert judgement.report["letters"] == pytest.approx((np.e**3 + 1) / (np.e**3 + 287), rel=1e-5)
    table[B] = 1
    assert prompted(model, {}, TOKENIZER)(PROMPTS, FIRSTS, SECONDS).report["position_bias"] == 0
    assert prompted(model, {}, TOKENIZER)(PROMPTS, FIRSTS, SECONDS).report["consistency"] == 0


def test_a_tokenizer_that_spells_a_letter_with_several_ids_is_refused():
    with pytest.raises(ValueError, match="the tokenizer spells 'A' with 2 ids"):
        prompted(SimpleNamespace(), {}, SimpleNamespace(encode=lambda text: [1, 2]))


# ---- several answers ----


def test_points_are_a_scoring_judges_scores():
    found, judgement = points(by_score(lengths), PROMPTS[:3], [["1", "333", "22"], ["4444"], ["55555", "6"]])
    assert [each.tolist() for each in found] == [[1, 3, 2], [4], [5, 1]]
    assert len(judgement.wins) == 3 + 1 + 1


def test_points_are_else_the_share_of_the_others_that_an_answer_is_better_than():
    def judge(prompts, firsts, seconds):
        wins = [0.5 if "t" in (a, b) else float(a < b) for a, b in zip(firsts, seconds, strict=True)]
        return Judgement(np.array(wins), None, {"ties": 0.0})

    found, judgement = points(judge, PROMPTS[:3], [["b", "a", "c", "t"], ["t"], ["z", "y"]])
    np.testing.assert_allclose(np.concatenate(found), [1.5 / 3, 2.5 / 3, 0.5 / 3, 0.5, 0.5, 0, 1])
    assert judgement.report == {"ties": 0.0} and len(judgement.wins) == 6 + 1 + 1


# ---- names ----


@pytest.mark.parametrize(
    "spec, message",
    [
        ("rules:style", "'rules:style' is not the name of a judge: write 'rule:style', .*; did you mean 'rule'?"),
        ("model:", "'model:' is not the name of a judge"),
        ("style", "'style' is not the name of a judge"),
        ("rule:stile", "rule:stile is not a known judge; did you mean 'style'?"),
    ],
)
def test_a_judge_that_is_not_known_is_an_error_with_the_nearest(spec, message):
    with pytest.raises(ValueError, match=message):
        judges.load(spec)


def test_a_model_is_loaded_from_its_directory(monkeypatch, speaker):
    monkeypatch.setattr(workdir, "load", lambda directory: {"runs/a": speaker}[directory])
    there = judges.load("model:runs/a")(PROMPTS, FIRSTS, SECONDS)
    assert there.wins.tolist() == prompted(*speaker)(PROMPTS, FIRSTS, SECONDS).wins.tolist()


def test_reward_models_judge_by_the_mean_of_their_ensemble(monkeypatch):
    def load(directories):
        assert directories == ["runs/a", "runs/b"]
        return lambda prompts, answers: rewarding.Scores(-lengths(prompts, answers), lengths(prompts, answers))

    monkeypatch.setattr(rewarding, "load", load)
    judgement = judges.load("reward:runs/a,runs/b")(PROMPTS, FIRSTS, SECONDS)
    assert judgement.wins.tolist() == [1, 0, 0.5, 0, 1] and judgement.scores[0].tolist() == [-1, -3]


def test_a_judge_is_told_from_others_by_its_parameters(monkeypatch):
    monkeypatch.setattr(workdir, "saved", lambda directory: SimpleNamespace(identity=f"of {directory}"))
    assert judges.identity("rule:style") == "rule:style"
    assert json.loads(judges.identity("reward:a,b")) == ["reward", "of a", "of b"]
    assert json.loads(judges.identity("model:a")) == ["model", "of a"]
