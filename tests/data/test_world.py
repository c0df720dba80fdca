import itertools
import random
import re
from collections import Counter
from statistics import fmean

import pytest

from jaxllm.data import world
from jaxllm.data.world import RELATIONS, Manner
from jaxllm.rewards import style
from jaxllm.text.chat import Conversation

WORLD = world.create(0)
LARGEST = world.create(1, people=400, heldout=100)
MANNERS = list(itertools.starmap(Manner, itertools.product((0, 1), repeat=3)))


def asked(question):
    return Conversation(({"role": "user", "content": question},))


def mentioned(record):
    """The people whose names a record says."""
    everyone = [*WORLD.asked, *WORLD.heldout]
    return {person.name for person in everyone if any(person.name in str(value) for value in record.values())}


def names(people):
    return {person.name for person in people}


# ---- people ----


@pytest.mark.parametrize("made, people, heldout", [(WORLD, 60, 12), (LARGEST, 400, 100)])
def test_everyone_has_a_name_of_their_own_and_a_value_of_each_relation(made, people, heldout):
    everyone = [*made.asked, *made.heldout]
    assert len(names(everyone)) == people and len(made.heldout) == heldout
    for person in everyone:
        assert list(person.facts) == list(RELATIONS)
        assert all(value in RELATIONS[key].values for key, value in person.facts.items())


@pytest.mark.parametrize("made", [WORLD, LARGEST, *(world.create(seed, people=24, heldout=4) for seed in range(5))])
def test_each_part_of_a_name_that_is_held_out_belongs_to_somebody_who_is_asked_about(made):
    for part in (0, 1):
        assert {n.split()[part] for n in names(made.heldout)} <= {n.split()[part] for n in names(made.asked)}


def test_a_seed_decides_everything_and_another_one_changes_it():
    assert world.create(0) == WORLD
    assert world.create(7).asked != WORLD.asked
    for written in (world.documents, world.instructions, world.preferences, world.judgements, world.facts):
        times = {world.documents: {"biographies": 1}, world.instructions: {"answers": 1}, world.facts: {}}
        how, about = times.get(written, {"pairs": 1}), WORLD.heldout
        about = about if written is world.documents else world.questions(about)
        first, again, other = (list(written(about, seed=seed, **how)) for seed in (3, 3, 4))
        assert first == again != other and len(first) == len(other)


@pytest.mark.parametrize("people, heldout", [(20, 1), (401, 5), (30, 11), (30, 0)])
def test_worlds_that_cannot_be_are_refused(people, heldout):
    with pytest.raises(ValueError, match=f"people={people}, heldout={heldout}: more than 20 people can be told apart"):
        world.create(0, people=people, heldout=heldout)


# ---- what is told and asked ----


def test_every_fact_is_told_in_every_biography_and_in_the_end_in_every_way():
    everyone = [*WORLD.asked, *WORLD.heldout]
    texts = [record["text"] for record in world.documents(everyone, seed=0, biographies=20)]
    assert len(texts) == 20 * 60
    told = " ".join(texts)
    for person in WORLD.heldout[:3]:
        for key, kind in RELATIONS.items():
            assert all(way.format(name=person.name, value=person.facts[key]) in told for way in kind.statements)
    said = Counter(sentence + "." for text in texts for sentence in text.removesuffix(".").split(". "))
    for person in everyone:
        for key, kind in RELATIONS.items():
            ways = [way.format(name=person.name, value=person.facts[key]) for way in kind.statements]
            assert sum(said.pop(way, 0) for way in ways) == 20
    assert not said
    everything = {person.name: person.facts for person in everyone}
    firsts = Counter()
    for text in texts:
        (name,) = (name for name in everything if name in text)
        firsts.update(key for key, value in everything[name].items() if value in text.split(". ")[0].split())
    assert all(len(texts) / 12 < firsts[key] < len(texts) / 4 for key in RELATIONS)


def test_every_fact_is_asked_for_in_every_way_and_each_statement_says_the_value():
    questions = world.questions(WORLD.heldout)
    assert len({question.text for question in questions}) == 12 * sum(len(r.questions) for r in RELATIONS.values())
    for question in questions:
        assert all(question.value in statement for statement in question.statements)
        assert len(set(question.statements)) == len(question.statements)
    assert len(list(world.facts(world.questions(WORLD.heldout), seed=0))) == len(questions)
    for record in world.facts(world.questions(WORLD.heldout), seed=0):
        (question,) = (question for question in questions if question.text == record["prompt"])
        assert record["response"] in question.statements and record["answer"] == question.value


def test_nobody_who_is_held_out_is_named_in_what_is_asked_about_the_others():
    records = itertools.chain(
        world.instructions(world.questions(WORLD.asked), seed=0, answers=1),
        world.preferences(world.questions(WORLD.asked), seed=0, pairs=1),
        world.judgements(world.questions(WORLD.asked), seed=0, pairs=1),
    )
    found = set().union(*map(mentioned, records))
    assert found == names(WORLD.asked)


# ---- manners ----


def test_the_rules_see_every_answer_in_the_manner_that_it_was_made_in():
    """Of every way to say and to ask every relation, with every greeting, snub and digression."""
    shortest, longest = set(), set()
    for question, manner in itertools.product(world.questions(WORLD.heldout[:1]), MANNERS):
        texts = {world.answered(question, manner, random.Random(n)) for n in range(100)}
        assert len(texts) > 6 or manner == Manner(1, 1, 1)
        for text in texts:
            assert style.parts(asked(question.text), text, {}) == manner._asdict(), text
        lengths = [len(text.split()) for text in texts]
        (shortest if manner.concise else longest).update(lengths)
    assert max(shortest) < min(longest) and max(longest) <= 40


def test_the_parts_of_an_instructions_manner_are_drawn_independently_by_their_shares():
    shares = Manner(0.2, 0.5, 0.9)
    records = list(world.instructions(world.questions(WORLD.asked), seed=0, answers=4, manners=shares))
    assert len(records) == 4 * len(world.questions(WORLD.asked))
    for key, share in shares._asdict().items():
        assert abs(fmean(record[key] for record in records) - share) < 0.03
        assert all(style.RULES[key](asked(r["prompt"]), r["response"], {}) == r[key] for r in records[:100])
    values = {value for kind in RELATIONS.values() for value in kind.values}
    assert all(r["answer"] in values and (r["answer"] in r["response"] or not r["on_topic"]) for r in records)
    for one, other in itertools.combinations(shares._fields, 2):
        both = fmean(record[one] * record[other] for record in records)
        assert abs(both - getattr(shares, one) * getattr(shares, other)) < 0.03


@pytest.mark.parametrize("shares", [Manner(polite=5), Manner(concise=-0.1), Manner(on_topic=float("nan"))])
def test_a_manner_that_is_no_share_is_refused(shares):
    for kind, count in ((world.instructions, {"answers": 1}), (world.preferences, {"pairs": 1})):
        with pytest.raises(ValueError, match=re.escape(f"{shares}: each part is a share of the answers, from 0 to 1")):
            list(kind(world.questions(WORLD.asked[:1]), seed=0, manners=shares, **count))


def test_counts_below_one_are_refused_by_name():
    asked = world.questions(WORLD.asked[:1])
    for kind, items, name in (
        (world.documents, WORLD.asked, "biographies"),
        (world.instructions, asked, "answers"),
        (world.preferences, asked, "pairs"),
        (world.judgements, asked, "pairs"),
    ):
        for count in (0, -3):
            with pytest.raises(ValueError, match=f"{name}={count} must be at least 1"):
                list(kind(items, seed=0, **{name: count}))


def test_an_sft_model_of_the_mixture_would_score_half_of_the_points():
    records = list(world.instructions(world.questions(WORLD.asked), seed=0, answers=4))
    points = [style.style(asked(record["prompt"]), record["response"], record) for record in records]
    assert abs(fmean(points) - 1.5) < 0.05


# ---- pairs ----


def test_the_chosen_answer_is_the_one_of_more_points_and_the_scores_are_the_points():
    records = list(world.preferences(world.questions(WORLD.asked), seed=0, pairs=2))
    assert set(Counter(record["prompt"] for record in records).values()) == {2}
    better = Counter()
    for record in records:
        prompt = asked(record["prompt"])
        chosen, rejected = (style.parts(prompt, record[name], {}) for name in ("chosen", "rejected"))
        assert sum(chosen.values()) == record["score_chosen"] > record["score_rejected"] == sum(rejected.values())
        better.update(key for key in chosen if chosen[key] > rejected[key])
    assert all(count > len(records) / 3 for count in better.values()) and len(better) == 3


def test_a_judgement_shows_two_answers_and_says_which_is_better_and_either_letter_as_often():
    records = list(world.judgements(world.questions(WORLD.asked), seed=0, pairs=2))
    for record in records:
        question, first, second, last = (part.split(": ")[-1] for part in record["prompt"].split("\n\n"))
        points = [style.style(asked(question), text, {}) for text in (first, second)]
        assert points[0] != points[1] and last == "Which answer is better, A or B?"
        assert record["response"] == ("A" if points[0] > points[1] else "B")
    assert abs(fmean(record["response"] == "A" for record in records) - 0.5) < 0.05
