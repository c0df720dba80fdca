import dataclasses
import io
import shutil
from collections import Counter
from contextlib import closing

import jax
import pytest
from rich.console import Console

from jaxllm import workdir
from jaxllm.evaluate.answers import answers
from jaxllm.evaluate.duels import Player
from jaxllm.generate import SamplerConfig
from jaxllm.serve import ballots, votes
from jaxllm.serve.chat import Manner
from jaxllm.text import chat
from jaxllm.text.chat import Conversation

PROMPTS = [Conversation(({"role": "user", "content": word},)) for word in ("a", "be", "see", "long" * 20)]
MANNER = Manner(SamplerConfig(), max_new_tokens=8, seed=3)


@pytest.fixture(scope="module")
def run(untrained):
    return str(untrained(32))


@pytest.fixture(scope="module")
def prepared(run, tmp_path_factory):
    """The path of a database with the answers of both checkpoints."""
    path = tmp_path_factory.mktemp("prepared") / "votes.db"
    with closing(ballots.open(path)) as database:
        counts = votes.prepare(database, [Player(run, 1), Player(run, 2)], PROMPTS, MANNER, batch_size=2)
    assert counts == Counter(answers=6, too_long=2)
    return path


@pytest.fixture
def database(prepared, tmp_path):
    with closing(ballots.open(shutil.copy(prepared, tmp_path))) as database:
        yield database


def told(*renderables):
    shown = io.StringIO()
    Console(file=shown, width=240).print(*renderables)
    return shown.getvalue()


def test_the_answers_are_what_each_checkpoint_says_to_the_prompts_of_training(database, run):
    for step in (1, 2):
        model, params, tokenizer = workdir.load(run, step=step)
        ids = [chat.prompt(prompt, tokenizer) for prompt in PROMPTS[:3]]
        how = dict(max_new_tokens=8, sampler=SamplerConfig(), batch_size=2, stop_ids=tokenizer.stop_ids)
        found = answers(model, params, ids, jax.random.key(3), **how)
        ends = tokenizer.stop_ids
        texts = [tokenizer.decode(token for token in answer.tokens if token not in ends) for answer in found]
        given = ballots.sampled(database, Player(run, step), 3)
        assert [given[ballots.spelled(prompt)] for prompt in PROMPTS] == [*texts, None]


def test_what_is_there_is_not_sampled_again(database, run, monkeypatch):
    monkeypatch.setattr(votes, "load", None)
    players = [Player(run, 1), Player(run, 2)]
    assert votes.prepare(database, players, PROMPTS, MANNER) == Counter(answers=6, too_long=2)
    assert votes.prepare(database, players, PROMPTS[:2], MANNER) == Counter(answers=4)
    database.execute("UPDATE answers SET text = '' WHERE id = 1")  # an answer is one, even if it says nothing
    assert votes.prepare(database, players, PROMPTS, MANNER) == Counter(answers=6, too_long=2)
    with pytest.raises(ValueError, match="use another --database"):
        votes.prepare(database, players, PROMPTS, Manner(SamplerConfig(top_k=3), max_new_tokens=8, seed=3))


def test_another_seed_asks_for_other_answers_in_the_same_manner(database, run, monkeypatch):
    monkeypatch.setattr(votes, "_answers", lambda player, prompts, *how: ((prompt, str(player)) for prompt in prompts))
    manner = dataclasses.replace(MANNER, seed=4)
    assert votes.prepare(database, [Player(run, 1), Player(run, 2)], PROMPTS, manner) == Counter(answers=8)
    assert len(database.execute("SELECT DISTINCT step, identity FROM samples").fetchall()) == 2
    assert len(database.execute("SELECT DISTINCT identity FROM samples").fetchall()) == 2


def test_a_run_that_was_trained_again_is_not_taken_for_the_old_one(database, run):
    database.execute("UPDATE samples SET identity = 'another'")
    with pytest.raises(ValueError, match="run@1 had other parameters when its answers were sampled"):
        votes.prepare(database, [Player(run, 1)], PROMPTS, MANNER)


def test_keys_become_votes_and_what_is_no_key_is_asked_again(database, run):
    questions = list(ballots.questions(database, [Player(run, 1), Player(run, 2)], PROMPTS, voter="ann", seed=3))
    shown = []
    counts = votes.vote(database, questions, [" A ", "x", "", "T", "s"], voter="ann", show=shown.append)
    assert counts == Counter(first=1, tie=1, skip=1) and len(questions) == 3
    kept = database.execute("SELECT first, second, verdict FROM votes ORDER BY rowid").fetchall()
    assert kept == [(*each.numbers, verdict) for each, verdict in zip(questions, ("first", "tie", "skip"), strict=True)]
    assert len(shown) == 5 and [told(shown[place]).count(votes.HELP) for place in range(5)] == [1] * 5


@pytest.mark.parametrize("lines", [["b", "q", "a"], ["b"]])
def test_a_voter_may_stop_and_go_on_later(database, run, lines):
    players, shown = [f"{run}@1", run], []
    how = dict(voter="ann", show=shown.append)
    assert votes.session(database, players, PROMPTS, MANNER, lines, **how) == Counter(second=1)
    assert "6 answers, 2 prompts too long; 3 questions for ann" in told(*shown)
    before = [told(each) for each in shown[1:]]
    asked = ballots.questions(database, [Player(run, 1), Player(run, 2)], PROMPTS, voter="ann", seed=MANNER.seed)
    assert [told(votes.displayed(each)) for each in asked][: len(before) - 1] == before[1:]
    shown.clear()
    assert votes.session(database, players, PROMPTS, MANNER, ["a", "a"], **how) == Counter(first=2)
    assert "2 questions for ann" in told(*shown) and [told(each) for each in shown[1:]][0] == before[1]
    assert before[0] not in [told(each) for each in shown]


def test_one_player_alone_is_no_vote(database, run):
    with pytest.raises(ValueError, match=r"--runs=\['.*run@2'\]: a vote is between two players or more"):
        votes.session(database, [run, f"{run}@2"], PROMPTS, MANNER, [], voter="ann", show=print)


def test_a_question_shows_the_whole_prompt_and_both_answers_and_nothing_that_tells_who_wrote_them():
    prompt = Conversation(({"role": "system", "content": "Be [bold]."}, {"role": "user", "content": "Who?"}))
    seen = told(votes.displayed(ballots.Question(prompt, ("[red]left\x1b[2J", ""), (7, 9))))
    assert "system: Be [bold]." in seen and "user: Who?" in seen and "[red]left" in seen and "(nothing)" in seen
    assert "\x1b[2J" not in seen and "7" not in seen and "9" not in seen
    assert seen.index("┃ A ") < seen.index("┃ B ") and seen.index("[red]left") < seen.index("(nothing)")


def test_the_standings_say_who_wins_and_how_far_to_trust_it(database, run, tmp_path):
    players = [Player(run, 1), Player(run, 2)]
    for voter in ("ann", "bob"):
        for question in ballots.questions(database, players, PROMPTS, voter=voter, seed=3):
            ballots.record(database, question, "first", voter=voter)
    seen = told(votes.standings(database, figure=str(tmp_path / "new" / "ranking.png")))
    rating = ballots.result(database).ratings[0]
    assert f"{rating.elo.value:+.0f}" in seen and "run@1" in seen.replace("\n", "") and "6 first" in seen
    assert "the answer that stood left won 100% (61% to 100%)" in seen
    assert "ann and bob agree on" in seen and "of 3, Cohen's kappa" in seen and "no vote links" not in seen
    assert (tmp_path / "new" / "ranking.png").stat().st_size > 3000


def test_players_that_no_vote_links_are_told_of(database):
    for number, name in enumerate("xyzuvw"):
        how = dict(seed=0, manner={}, identity="")
        ballots.keep(database, Player(name, number), ballots.spelled(PROMPTS[number // 3]), name, **how)
    for left, right in (("x", "y"), ("y", "z"), ("u", "v")):
        (first,), (second,) = (
            database.execute("SELECT id FROM answers WHERE text = ?", (text,)).fetchone() for text in (left, right)
        )
        ballots.record(database, ballots.Question(PROMPTS[0], (left, right), (first, second)), "first", voter="ann")
    assert "no vote links ['x@0', 'y@1', 'z@2'] with ['u@3', 'v@4']: compare within each" in told(
        votes.standings(database)
    )
