import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from jaxllm.data import preferences
from jaxllm.evaluate.duels import Player
from jaxllm.evaluate.ranking import agreement, bradley_terry, wilson
from jaxllm.serve import ballots
from jaxllm.text.chat import Conversation

A, B, C = (Player(f"runs/{name}", step) for name, step in (("a", 10), ("b", 10), ("a", 20)))
MANNER = {"temperature": 0.7, "max_new_tokens": 8}


def prompt(content):
    return Conversation(({"role": "system", "content": "s"}, {"role": "user", "content": content}))


N = 16
PROMPTS = [prompt(f"Question {number}é?") for number in range(N)]


@pytest.fixture
def database(tmp_path):
    with closing(ballots.open(tmp_path / "folder" / "votes.db")) as database:
        yield database


def write(database, player, texts, *, seed=0, manner=MANNER, identity="first", prompts=PROMPTS):
    """``texts``: number of the prompt -> the player's answer."""
    for number, text in texts.items():
        ballots.keep(
            database, player, ballots.spelled(prompts[number]), text, seed=seed, manner=manner, identity=identity
        )


def ask(database, *players, voter="ann", seed=0, prompts=PROMPTS):
    return list(ballots.questions(database, players, prompts, voter=voter, seed=seed))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A database of two players, who answer all prompts differently."""
    path = tmp_path_factory.mktemp("written") / "votes.db"
    with closing(ballots.open(path)) as database:
        write(database, A, {number: f"{number} by a" for number in range(N)})
        write(database, B, {number: f"{number} by b" for number in range(N)})
    return path


@pytest.fixture
def filled(written, tmp_path):
    """A copy of it."""
    with closing(ballots.open(shutil.copy(written, tmp_path))) as database:
        yield database


# ---- questions ----


def test_every_prompt_is_asked_once_with_both_answers(filled):
    found = ask(filled, A, B)
    assert sorted(sorted(each.texts) for each in found) == sorted([f"{n} by a", f"{n} by b"] for n in range(N))
    for each in found:
        number = PROMPTS.index(each.prompt)
        assert {text.split()[0] for text in each.texts} == {str(number)}


def test_the_order_and_the_sides_are_drawn_for_each_voter_and_the_same_again(filled):
    ann, again, bob, other = (
        ask(filled, A, B, voter=v, seed=s) for v, s in (("ann", 0), ("ann", 0), ("bob", 0), ("ann", 1))
    )
    assert ann == again
    for voter in (ann, bob, other):
        left = [each.texts[0].endswith("by a") for each in voter]
        assert 3 < sum(left) < 13
        order = [PROMPTS.index(each.prompt) for each in voter]
        assert order != sorted(order)
    sides = lambda found: {each.prompt.messages[1]["content"]: each.texts for each in found}  # noqa: E731
    assert [each.prompt for each in ann] != [each.prompt for each in bob] and sides(ann) != sides(bob)
    assert [each.prompt for each in ann] != [each.prompt for each in other] and sides(ann) != sides(other)


def test_what_was_voted_or_skipped_is_not_asked_again_but_of_another_voter_and_the_others_keep_their_places(filled):
    before = ask(filled, A, B)
    for question, verdict in zip(before[:4], ("first", "second", "tie", "skip"), strict=True):
        ballots.record(filled, question, verdict, voter="ann")
    assert ask(filled, A, B) == before[4:]
    assert len(ask(filled, A, B, voter="bob")) == N
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE|once"):
        turned = before[0]._replace(numbers=before[0].numbers[::-1])
        ballots.record(filled, turned, "tie", voter="ann")


def test_a_vote_is_on_the_disk_at_once(filled, tmp_path):
    ballots.record(filled, ask(filled, A, B)[0], "first", voter="ann")
    other = sqlite3.connect(tmp_path / "votes.db")
    assert other.execute("SELECT verdict, voter FROM votes").fetchall() == [("first", "ann")]
    (time,) = other.execute("SELECT time FROM votes").fetchone()
    assert time.endswith("+00:00")
    columns = "run, step, seed, manner, identity"
    assert other.execute(f"SELECT {columns} FROM samples LIMIT 1").fetchone() == (*A, 0, json.dumps(MANNER), "first")
    other.close()


def test_equal_answers_and_those_of_other_seeds_or_players_or_prompts_are_not_asked(database):
    write(database, A, {0: "same", 1: "one", 2: None, 3: "x"})
    write(database, B, {0: "same", 1: "two", 2: "y"})
    write(database, B, {3: "z"}, seed=1)
    write(database, C, {1: "three"})
    assert [set(each.texts) for each in ask(database, A, B)] == [{"one", "two"}]
    assert ask(database, A, B, prompts=PROMPTS[2:]) == []
    assert {frozenset(each.texts) for each in ask(database, A, B, C)} == {
        frozenset(pair) for pair in (("one", "two"), ("one", "three"), ("two", "three"))
    }


def test_a_prompt_without_room_is_remembered(database):
    write(database, A, {0: None, 1: "x"})
    assert ballots.sampled(database, A, 0) == {ballots.spelled(PROMPTS[0]): None, ballots.spelled(PROMPTS[1]): "x"}
    assert ballots.sampled(database, A, 1) == ballots.sampled(database, C, 0) == {}


def test_answers_in_another_manner_or_of_other_parameters_are_refused(filled):
    ballots.check(filled, A, MANNER, "first")
    ballots.check(filled, C, MANNER, "second")
    with pytest.raises(ValueError, match=r"sampled with .*0.7.*, not .*0.0.*: use another --database"):
        ballots.check(filled, C, MANNER | {"temperature": 0.0}, "second")
    with pytest.raises(ValueError, match="runs/a@10 had other parameters when its answers were sampled"):
        ballots.check(filled, A, MANNER, "second")


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "votes.db").write_text("not a database, but long enough to be read as the header of one")
    with pytest.raises(ValueError, match=r"votes.db is no database of votes \(.*\); give another --database"):
        ballots.open(tmp_path / "votes.db")


def test_an_unknown_verdict_is_refused(filled):
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        ballots.record(filled, ask(filled, A, B)[0], "maybe", voter="ann")


# ---- what the votes say ----


def decide(database, voter, verdict, players=(A, B)):
    """The voter's verdict on each question: a function of the player's name whose answer stood left."""
    for question in ask(database, *players, voter=voter):
        ballots.record(database, question, verdict(question), voter=voter)


def a_wins(question):
    return "first" if question.texts[0].endswith("by a") else "second"


def test_games_name_the_player_whose_answer_won_whichever_side_it_stood_on(filled):
    decide(filled, "ann", a_wins)
    found = ballots.games(filled)
    assert {(game.first, game.second, game.outcome) for game in found} == {
        ("runs/a@10", "runs/b@10", 1.0),
        ("runs/b@10", "runs/a@10", 0.0),
    }
    assert {game.block for game in found} == set(map(ballots.spelled, PROMPTS)) and len(found) == N


def test_ties_count_and_what_was_skipped_does_not(filled):
    decide(filled, "ann", lambda question: "tie" if "3" in question.texts[0] else "skip")
    found = ballots.games(filled)
    assert {game.outcome for game in found} == {0.5} and len(found) == 2


def test_a_vote_counts_for_every_two_players_who_wrote_the_two_answers(database):
    write(database, A, {0: "x"})
    write(database, B, {0: "y"})
    write(database, C, {0: "y"})
    (question,) = ask(database, A, B, C)
    ballots.record(database, question, "first" if question.texts[0] == "x" else "second", voter="ann")
    won = {(g.first, g.second) if g.outcome else (g.second, g.first) for g in ballots.games(database)}
    assert won == {("runs/a@10", "runs/b@10"), ("runs/a@10", "runs/a@20")}
    # who has written both answers, with two seeds, has not won against himself
    write(database, B, {0: "x"}, seed=1)
    assert {(g.first, g.second) for g in ballots.games(database)} & {("runs/b@10", "runs/b@10")} == set()
    assert len(ballots.games(database)) == 1


def test_the_result_ranks_and_tells_how_far_to_trust_it(filled):
    decide(filled, "ann", a_wins)
    decide(filled, "bob", lambda question: "tie" if question.texts[0] < "3" else a_wins(question))
    decide(filled, "cid", lambda question: "skip")
    found = ballots.result(filled)
    assert found.ratings == bradley_terry(ballots.games(filled))
    assert [rating.player for rating in found.ratings] == ["runs/a@10", "runs/b@10"]
    assert found.counts["skip"] == N and sum(found.counts.values()) == 3 * N
    decided = found.counts["first"] + found.counts["second"]
    assert found.left == wilson(found.counts["first"], decided)
    ties = found.counts["tie"]
    assert list(found.agreements) == [("ann", "bob")]
    assert found.agreements["ann", "bob"].share == wilson(N - ties, N)
    assert found.islands == [{"runs/a@10", "runs/b@10"}]


def test_two_voters_agree_whichever_answer_stood_left(filled):
    decide(filled, "ann", a_wins)
    decide(filled, "bob", a_wins)
    found = ballots.result(filled).agreements["ann", "bob"]
    assert found.share.value == 1.0 and found.count == N
    assert found.share == agreement([1] * N, [1] * N).share


def test_only_ties_have_no_side_and_no_votes_no_ranking(filled):
    with pytest.raises(ValueError, match="no game to rank by"):
        ballots.result(filled)
    decide(filled, "ann", lambda question: "tie")
    assert ballots.result(filled).left is None


# ---- preferences ----


def test_votes_are_preferences_that_training_reads(filled, tmp_path):
    verdicts = {"0 by": "tie", "1 by": "skip", "2 by": a_wins, "3 by": lambda q: "first"}
    for question in ask(filled, A, B, prompts=PROMPTS[:4]):
        verdict = verdicts[question.texts[0][:4]]
        ballots.record(filled, question, verdict if isinstance(verdict, str) else verdict(question), voter="ann")
    assert ballots.export(filled, tmp_path / "new" / "votes.jsonl") == Counter(decided=2, ties=1)
    records = [json.loads(line) for line in (tmp_path / "new" / "votes.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [preferences.preferences(record, preferences.detected(record))[0] for record in records]
    by_number = {int(each.chosen[0]["content"].split()[0]): each for each in found}
    assert sorted(by_number) == [0, 2, 3]
    for number, each in by_number.items():
        assert each.prompt == PROMPTS[number] and each.annotator == "ann" and each.tie == (number == 0)
    assert by_number[2].chosen == ({"role": "assistant", "content": "2 by a"},)
    assert by_number[2].rejected == ({"role": "assistant", "content": "2 by b"},)
    assert {by_number[3].chosen[0]["content"], by_number[3].rejected[0]["content"]} == {"3 by a", "3 by b"}
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "votes.jsonl"]


def test_tools_of_a_prompt_are_kept(database, tmp_path):
    asked = PROMPTS[0]._replace(tools=({"name": "add"},))
    write(database, A, {0: "x"}, prompts=[asked])
    write(database, B, {0: "y"}, prompts=[asked])
    (question,) = ask(database, A, B, prompts=[asked])
    assert question.prompt == asked
    ballots.record(database, question, "first", voter="ann")
    ballots.export(database, tmp_path / "votes.jsonl")
    assert json.loads((tmp_path / "votes.jsonl").read_text())["tools"] == [{"name": "add"}]
