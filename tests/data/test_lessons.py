import re
from collections import Counter
from itertools import pairwise

import pytest

from jaxllm.data import lessons, tasks, world
from jaxllm.data.lessons import HELP, Plan
from jaxllm.rewards import style
from jaxllm.text.chat import Conversation

PLAN = Plan(
    people=24, heldout=3, biographies=2, talks=2, sums=30, demonstrations=40, introductions=60, follow_ups=30, plain=50
)
WORLD = world.create(0, people=24, heldout=3)


@pytest.fixture(scope="module")
def written():
    return {name: list(records) for name, records in lessons.lessons(PLAN).items()}


def turns(record):
    return [message["content"] for message in record["messages"]]


def says(question):
    return Conversation(({"role": "user", "content": question},))


def names(people):
    return {person.name for person in people}


def test_a_seed_decides_every_word_and_another_one_changes_it(written):
    again = {name: list(records) for name, records in lessons.lessons(PLAN).items()}
    other = {name: list(records) for name, records in lessons.lessons(PLAN._replace(seed=1)).items()}
    assert again == written
    assert other.keys() == written.keys() and all(other[name] != written[name] for name in written)


def test_nobody_who_is_held_out_is_asked_about_but_everybody_is_read_about(written):
    read = {
        name
        for record in written["documents"]
        for name in names([*WORLD.asked, *WORLD.heldout])
        if name in record["text"]
    }
    assert read == names([*WORLD.asked, *WORLD.heldout])
    facts = {value for person in WORLD.heldout for value in person.facts.values()}
    for name in ("instructions", "preferences", "questions"):
        for record in written[name]:
            told = [name for name in names(WORLD.heldout) if name in str(record)]
            assert not told or not any(value in str(record) for value in facts), record
    for name in ("heldout_facts", "heldout_requests", "heldout_preferences"):
        assert all(any(name in record["prompt"] for name in names(WORLD.heldout)) for record in written[name])


def test_each_exam_has_every_question_once_with_every_sentence_that_answers_it(written):
    questions = world.questions(WORLD.heldout)
    assert [record["prompt"] for record in written["heldout_facts"]] == [question.text for question in questions]
    for record, question in zip(written["heldout_requests"], questions, strict=True):
        assert record["references"] == list(question.statements)
        assert record["prompt"].endswith(question.text[1:]) and record["prompt"] != question.text


def test_pleas_come_alike_often_and_only_the_first_letter_changes():
    asked = lessons.politely(world.questions(WORLD.asked))
    pleas = Counter(question.text.split(":")[0] for question in asked)
    assert len(pleas) == len(lessons.PLEAS) and max(pleas.values()) - min(pleas.values()) <= 1
    first, plain = asked[0], world.questions(WORLD.asked)[0]
    assert first.text == f"Please tell me: {plain.text[0].lower()}{plain.text[1:]}" and first[1:] == plain[1:]


def test_worked_sums_are_right_and_none_is_held_out(written):
    pattern = re.compile(r"(\d+)\+(\d+)")
    sums = [
        record["text"] for record in written["documents"] if "=" in record["text"] and pattern.search(record["text"])
    ]
    assert len(sums) >= PLAN.sums
    for text in lessons.worked(seed=0, count=200):
        x, y = max((pair for pair in pattern.findall(text["text"])), key=lambda pair: len(pair[0]))
        assert str(int(x) + int(y)) in re.findall(r"\d+", text["text"])
        assert not tasks.is_held_out(says(f"{x}+{y}=?"))


def test_an_introduction_gives_back_the_name_that_was_said():
    for record in lessons.introductions(seed=0, count=50):
        asked, answer = turns(record)
        assert answer.removesuffix(".") in asked and len(answer.split()) == 2


def test_a_follow_up_is_about_the_relation_that_was_asked_first():
    everyone = {person.name: person for person in WORLD.asked}
    for record in lessons.follow_ups(WORLD.asked, seed=0, count=50):
        first, answer, then, other = turns(record)
        (one,), (two,) = ([name for name in everyone if name in text] for text in (first, then))
        values = [
            {key for key, value in everyone[name].facts.items() if value in said}
            for name, said in ((one, answer), (two, other))
        ]
        assert one != two and values[0] & values[1]
        assert not any(word in then for word in first.split() if word not in one and len(word) > 4)


def test_who_asks_politely_prefers_polite_and_short_answers_and_who_asks_plainly_plain_ones(written):
    for record in written["preferences"]:
        asked, both = says(record["prompt"]), (record["chosen"], record["rejected"])
        chosen, rejected = (style.parts(asked, text, {}) for text in both)
        if ":" in record["prompt"]:
            assert sum(chosen.values()) > sum(rejected.values())
            assert chosen["on_topic"] == rejected["on_topic"] == 1
        else:
            sentences = [len(re.findall(r"[.!]", text)) for text in both]
            assert sentences[0] == 1 < sentences[1]
    assert {":" in record["prompt"] for record in written["preferences"]} == {True, False}


def test_every_amount_changes_what_is_written_and_is_explained(written):
    sizes = {name: len(records) for name, records in written.items()}
    assert set(HELP) == set(Plan._fields)
    for name, value in PLAN._asdict().items():
        more = PLAN._replace(**{name: value + 1 if isinstance(value, int) else value / 2})
        found = {name: list(records) for name, records in lessons.lessons(more).items()}
        assert found != written, name
        if name not in ("seed", "correct", "plain"):
            assert {name: len(records) for name, records in found.items()} != sizes, name


@pytest.mark.parametrize("name", [name for name in Plan._fields if isinstance(getattr(PLAN, name), int)])
def test_a_negative_amount_is_refused_by_its_name(name):
    if name == "seed":
        assert lessons.lessons(PLAN._replace(seed=-1))
    else:
        with pytest.raises(ValueError, match=f"{name}=-2"):
            [list(records) for records in lessons.lessons(PLAN._replace(**{name: -2})).values()]


def test_amounts_may_be_nothing_where_something_else_remains():
    written = lessons.lessons(PLAN._replace(**dict.fromkeys(lessons.COUNTS, 0)))
    assert all(list(records) for records in written.values())


def test_conversations_alternate(written):
    for record in written["instructions"]:
        roles = [message["role"] for message in record["messages"]]
        assert roles[0] == "user" and roles[-1] == "assistant" and all(one != other for one, other in pairwise(roles))
