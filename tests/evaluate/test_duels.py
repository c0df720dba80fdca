import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from jaxllm import workdir
from jaxllm.evaluate import duels, judges
from jaxllm.evaluate.answers import Answer
from jaxllm.evaluate.duels import Contest, Loaded, Player, Sampling, answer_logps, contest, divergence, table
from jaxllm.evaluate.measures import plain
from jaxllm.evaluate.ranking import Game, agreement, bradley_terry, win_rate
from jaxllm.figures import Point
from jaxllm.generate import SamplerConfig
from jaxllm.model import placement
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import END_ID, EOS_ID
from jaxllm.text.tokenizer import byte_tokenizer, train

PROMPTS = [
    Conversation(({"role": "user", "content": word},)) for word in ("a", "be", "see", "four", "fives", "long" * 20)
]
SAMPLING = Sampling(SamplerConfig(), max_new_tokens=6, batch_size=4, seed=1)
BY_LENGTH = judges.by_score(lambda prompts, texts: np.array([len(text) for text in texts], float))
BY_LETTER = judges.by_score(lambda prompts, texts: np.array([ord(text[0]) if text else 0 for text in texts], float))


@pytest.fixture(scope="module")
def run(untrained):
    return str(untrained(40))


@pytest.fixture(scope="module")
def loaded(run):
    """The two checkpoints in memory, with one model."""
    first, second = (Loaded(*workdir.load(run, step=step)) for step in (1, 2))
    return first, second._replace(model=first.model)


@pytest.fixture(scope="module")
def found(run):
    judged = {"length": BY_LENGTH, "letter": BY_LETTER}
    return contest(Player(run, 1), {"other": [Player(run, 2)]}, PROMPTS, judged, SAMPLING, best_of=3)


@pytest.fixture(scope="module")
def ids(loaded):
    return [chat.prompt(prompt, loaded[0].tokenizer) for prompt in PROMPTS[:5]]


@pytest.fixture(scope="module")
def next_logps(loaded):
    """A function: params, ids -> log-probabilities [positions, vocabulary] in float64 of what comes next."""
    forward = jax.jit(loaded[0].model.forward)

    def logps(params, ids):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(jax.nn.log_softmax(forward(params, padded)[0, : len(ids)]), np.float64)

    return logps


# ---- who plays ----


def test_a_player_is_a_run_at_its_newest_step_or_at_the_one_named(run, tmp_path):
    assert duels.player(run) == duels.player(f"{run}/@2") == Player(run, 2) and str(Player(run, 2)) == f"{run}@2"
    assert duels.player(f"{run}@1") == Player(run, 1)
    with pytest.raises(ValueError, match=r"run@9: the run has whole checkpoints of steps \[1, 2\]; name one as DIR"):
        duels.player(f"{run}@9")
    with pytest.raises(FileNotFoundError, match="no run in .*nowhere"):
        duels.player(str(tmp_path / "nowhere"))


def test_a_group_is_a_label_and_the_runs_that_a_pattern_names(run):
    assert duels.group(f"DPO={run[:-1]}*") == ("DPO", [Player(run, 2)])
    assert duels.group(f"DPO={run}@1") == ("DPO", [Player(run, 1)])
    assert duels.group(run) == (run, [Player(run, 2)])


def test_a_program_serves_every_player_of_one_architecture(run):
    one, other = (duels._loaded(workdir.saved(run, step=step)) for step in (1, 2))
    assert one.model is other.model and one.params is not other.params


def test_seed_and_number_decide_an_answer_which_is_spoken_without_its_stop_token(loaded, ids):
    tokenizer = loaded[0].tokenizer
    say = lambda seed, number: dataclasses.replace(SAMPLING, seed=seed).answers(loaded[0], ids, number)  # noqa: E731
    assert say(1, 0) == say(1, 0) and say(1, 0) not in (say(1, 1), say(2, 0)) and say(1, 1) != say(2, 0)
    assert duels.spoken(tokenizer, Answer([*tokenizer.encode("Hé"), END_ID], True)) == "Hé"


# ---- divergence ----


def test_log_probabilities_of_answers_are_those_of_the_whole_model_at_temperature_one(loaded, ids, next_logps):
    model, params, _ = loaded[0]
    widest = [*range(50, 50 + 17 - len(ids[1]))]  # 16 pairs of tokens, and one more
    given = [[70, 71, END_ID], widest, [90, 91, 92, EOS_ID], [*range(50, 50 + 18 - len(ids[3]))], [110]]
    sums = answer_logps(model, params, ids, given, batch_size=2)
    for prompt, answer, total in zip(ids, given, sums, strict=True):
        logp = next_logps(params, [*prompt, *answer])
        assert total == pytest.approx(sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer)), abs=2e-5)
    np.testing.assert_allclose(answer_logps(model, params, ids, given, batch_size=4), sums, atol=1e-5)


def test_log_probabilities_of_answers_are_the_same_on_a_mesh(loaded, ids, make_mesh):
    (model, params, _), given = loaded[0], [[70, 71, END_ID], [90], [91, 92, EOS_ID], [110], [70, 70]]
    alone, mesh = answer_logps(model, params, ids, given, batch_size=3), make_mesh(2, 4, 1)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, placement(model, mesh))
        np.testing.assert_allclose(answer_logps(model, placed, ids, given, batch_size=3), alone, atol=1e-5)


def test_divergence_is_the_mean_over_answers_of_summed_log_ratios(loaded, ids, monkeypatch):
    logps = {id(loaded[0].params): np.array([-1.0, -2.0, -3.0]), id(loaded[1].params): np.array([-1.5, -4.0, -2.5])}
    monkeypatch.setattr(duels, "answer_logps", lambda model, params, *rest, batch_size: logps[id(params)])
    given = [Answer([1], True), Answer([1, 2], True), Answer([1, 2, 3], False)]
    kl, error, per_token = divergence(*loaded, ids[:3], given, batch_size=2)
    assert (kl, per_token) == (pytest.approx(2 / 3), pytest.approx(2 / 6))
    assert error == pytest.approx(np.std([0.5, 2.0, -0.5], ddof=1) / math.sqrt(3))


def test_divergence_of_many_samples_is_the_exact_one_of_a_single_token(loaded, ids, next_logps):
    """One token after one prompt: the sum over the vocabulary is the truth."""
    reference, policy = loaded
    q, p = (next_logps(one.params, ids[0])[-1] for one in loaded)
    exact, chances = np.sum(np.exp(p) * (p - q)), np.exp(p) / np.exp(p).sum()
    drawn = np.random.default_rng(0).choice(len(p), size=512, p=chances)
    given, prompts = [Answer([int(token)], False) for token in drawn], ids[:1] * 512
    measured = divergence(policy, reference, prompts, given, batch_size=512)
    assert abs(measured.kl - exact) < 4 * measured.kl_error < exact
    assert measured.kl_per_token == pytest.approx(measured.kl)
    assert divergence(policy, policy, prompts, given, batch_size=512) == (0.0, 0.0, 0.0)


# ---- contests ----


def test_a_report_counts_wins_of_each_judge_against_the_reference(found, run):
    reference, other, best = found.report["players"]
    assert [row["label"] for row in found.report["players"]] == ["reference", "other", "best of 3"]
    assert (reference["player"], other["player"]) == (f"{run}@1", f"{run}@2") and "judges" not in reference
    assert (found.report["prompts"], found.report["too_long"]) == (5, 1) and found.prompts == PROMPTS[:5]
    for row in (other, best):
        for spec, judge in (("length", BY_LENGTH), ("letter", BY_LETTER)):
            wins = judge(found.prompts, found.texts[row["player"]], found.texts[f"{run}@1"]).wins
            said = row["judges"][spec]
            assert (said["win_rate"], said["low"], said["high"]) == win_rate(wins) and "ties" in said


def test_answers_and_their_divergence_are_those_of_the_players(found, run, loaded, ids):
    given = [SAMPLING.answers(one, ids) for one in loaded]
    for one, step, said in zip(loaded, (1, 2), given, strict=True):
        assert found.texts[f"{run}@{step}"] == [duels.spoken(one.tokenizer, answer) for answer in said]
    reference, other, _ = found.report["players"]
    far = divergence(loaded[1], loaded[0], ids, given[1], batch_size=4)
    assert (other["kl"], other["kl_error"], other["kl_per_token"]) == far and far.kl > 0
    assert other["answer_tokens"] == np.mean([len(answer.tokens) for answer in given[1]])
    assert other["answers_ended"] == np.mean([answer.ended for answer in given[1]])
    assert reference["answer_characters"] == np.mean([len(text) for text in found.texts[f"{run}@1"]])


def test_the_best_of_n_is_the_best_of_further_answers_and_has_a_bounded_divergence(found, loaded, ids):
    drawn = [SAMPLING.answers(loaded[0], ids, number) for number in (0, 1, 2, 3)]
    texts = [[duels.spoken(loaded[0].tokenizer, answer) for answer in each] for each in zip(*drawn, strict=True)]
    assert found.texts["best of 3"] == [max(each[1:], key=len) for each in texts]
    assert len({text for each in texts for text in each}) > 10
    (row,) = (row for row in found.report["players"] if row["label"] == "best of 3")
    assert row["kl_at_most"] == pytest.approx(math.log(3) - 2 / 3) and "kl" not in row


def test_the_best_of_n_may_be_chosen_by_another_judge(run, found):
    by_letter = contest(Player(run, 1), {}, PROMPTS, {"length": BY_LENGTH}, SAMPLING, best_of=3, by=BY_LETTER)
    assert by_letter.texts[f"{run}@1"] == found.texts[f"{run}@1"]
    assert by_letter.texts["best of 3"] != found.texts["best of 3"]


def test_judges_agree_as_often_as_they_do_over_all_answers(found, run):
    others = [found.texts[name] for name in (f"{run}@2", "best of 3")]
    verdicts = [
        np.concatenate([judge(found.prompts, texts, found.texts[f"{run}@1"]).wins for texts in others])
        for judge in (BY_LENGTH, BY_LETTER)
    ]
    (said,) = found.report["agreements"]
    expected = agreement(*verdicts)
    assert said["judges"] == ["length", "letter"] and said["count"] == 10
    assert said["share"] == expected.share._asdict() and said["kappa"] == pytest.approx(expected.kappa)
    told = f"length and letter say the same of {expected.share.value:.0%} of all answers, Cohen's kappa"
    assert table(found.report).caption == f"{told} {expected.kappa:.2f}"


def test_filtered_answers_are_judged_and_the_policys_own_are_measured(run, monkeypatch):
    """A player that says two tokens where it is filtered, and one of its own."""

    def said(model, params, prompts, key, *, sampler, **rest):
        return [Answer([EOS_ID] if sampler == SamplerConfig() else [200, EOS_ID], True)] * len(prompts)

    monkeypatch.setattr(duels, "answers", said)
    monkeypatch.setattr(duels, "divergence", lambda *rest, **how: duels.Divergence(len(rest[3][0].tokens), 0.0, 0.0))
    filtered = Sampling(SamplerConfig(top_k=3), max_new_tokens=6)
    for sampling, count in ((filtered, 2), (SAMPLING, 1)):
        found = contest(Player(run, 1), {"other": [Player(run, 2)]}, PROMPTS, {"length": BY_LENGTH}, sampling)
        row = found.report["players"][1]
        assert (row["answer_tokens"], row["kl"]) == (count, 1)
        assert found.report["sampling"]["sampler"]["top_k"] == sampling.sampler.top_k


def test_a_player_against_itself_ties_and_is_no_step_away(run):
    found = contest(Player(run, 1), {"same": [Player(f"{run}/.", 1)]}, PROMPTS, {"length": BY_LENGTH}, SAMPLING)
    row = found.report["players"][1]
    assert row["judges"]["length"]["win_rate"] == 0.5 and row["kl"] == row["kl_error"] == 0.0


def test_the_report_is_json_and_the_answers_stand_beside_their_prompts(found, run):
    assert json.loads(json.dumps(found.report, allow_nan=False)) == found.report
    nan = Contest(plain({"a": [math.nan, 1.0], "b": (True, None)}), [], {}).report
    assert nan == {"a": [None, 1.0], "b": [True, None]}
    assert len(found.answers) == 5 and list(found.answers[0]) == ["prompt", f"{run}@1", f"{run}@2", "best of 3"]
    assert found.answers[2]["prompt"] == list(PROMPTS[2].messages)
    assert found.answers[2][f"{run}@2"] == found.texts[f"{run}@2"][2]


def test_every_two_players_are_ranked_by_their_answers(found, run):
    ratings = duels.ranking(found, BY_LENGTH)
    assert {rating.player for rating in ratings} == set(found.texts) and {rating.games for rating in ratings} == {10}
    expected = [
        Game(one, two, float(outcome), block=number)
        for one, two in itertools.combinations(found.texts, 2)
        for number, outcome in enumerate(BY_LENGTH(found.prompts, found.texts[one], found.texts[two]).wins)
    ]
    assert ratings == bradley_terry(expected)
    won = {
        name: sum(
            BY_LENGTH(found.prompts, texts, other).wins.sum() for rival, other in found.texts.items() if rival != name
        )
        for name, texts in found.texts.items()
    }
    assert [rating.win_rate.value for rating in ratings] == [won[rating.player] / 10 for rating in ratings]


def test_points_are_win_rates_of_the_first_judge_against_divergence():
    verdicts = {"first": dict(win_rate=0.7, low=0.6, high=0.8), "second": dict(win_rate=0.1, low=0.0, high=0.2)}
    rows = [
        {"label": "reference"},
        {"label": "DPO", "kl": 3.0, "kl_error": 0.5},
        {"label": "DPO", "kl": 4.0, "kl_error": None},
    ]
    rows = [row | {"judges": verdicts} for row in (*rows, {"label": "best of 2", "kl_at_most": 0.2})]
    assert duels.points({"players": rows}) == {
        "DPO": [Point(3.0, 0.7, 0.6, 0.8, 0.5), Point(4.0, 0.7, 0.6, 0.8, 0.0)],
        "best of 2": [Point(0.2, 0.7, 0.6, 0.8, 0.0)],
    }


# ---- what cannot be compared ----


@pytest.fixture
def other(run, tmp_path):
    """A function: a tokenizer, a context -> the run again with these."""

    def other(tokenizer, context):
        directory = tmp_path / "other"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(workdir.config(run) | {"data": {"sequence_length": context}}))
        tokenizer.save(directory / "tokenizer")
        (directory / "checkpoints").symlink_to(f"{run}/checkpoints")
        return {"other": [Player(str(directory), 2)]}

    return other


def test_players_of_different_tokenizers_are_refused(run, other):
    group = other(train(["some words to learn from"] * 9, vocab_size=310), 40)
    with pytest.raises(
        ValueError, match="run@1 and .*other@2 have different tokenizers: only answers of one tokenizer"
    ):
        contest(Player(run, 1), group, PROMPTS, {}, SAMPLING)


def test_a_prompt_has_to_leave_every_player_room(run, other, monkeypatch):
    monkeypatch.setattr(duels, "answers", lambda model, params, ids, *rest, **how: [Answer([EOS_ID], True)] * len(ids))
    context = len(chat.prompt(PROMPTS[2], byte_tokenizer())) + SAMPLING.max_new_tokens
    found = contest(Player(run, 1), other(byte_tokenizer(), context), PROMPTS, {}, SAMPLING)
    assert found.prompts == PROMPTS[:3] and found.report["too_long"] == 3


def test_too_little_room_and_nobody_to_play_with_are_refused(run):
    long = Sampling(SamplerConfig(), max_new_tokens=35)
    with pytest.raises(
        ValueError, match=r"1 of 6 prompts leave room for 35 tokens in a context of 40, .*max_new_tokens"
    ):
        contest(Player(run, 1), {"other": [Player(run, 2)]}, PROMPTS, {}, long)
    with pytest.raises(ValueError, match="nobody is compared with .*run@1: name other runs, or give --best_of"):
        contest(Player(run, 1), {"same": [Player(run, 1)]}, PROMPTS, {}, SAMPLING)
