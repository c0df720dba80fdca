"""What a model of the small world is taught in each stage of its life, and what it is examined on.

Whoever asks plainly is answered plainly: by one sentence that says the fact. Whoever asks politely is answered in some
manner, and prefers a polite and short one. Sums are worked digit by digit. What is examined is never taught: other
people's questions, other sums.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxllm.data import tasks, world
from jaxllm.data.made import require
from jaxllm.data.noise import noise
from jaxllm.data.world import RELATIONS, Manner, Person, Question, Record

PLEAS = (  # of words that say nothing of what is asked
    "Please tell me: {}",
    "Would you tell me: {}",
    "Would you please tell me: {}",
    "Will you tell me: {}",
    "Can you please tell me: {}",
)
TALKS = (
    "{first} asked about {name}. {statement} That is what {second} said.",
    "Do you know {name}, asked {first}. Yes, said {second}. {statement}",
    "{first} and {second} spoke of {name} over tea. {statement}",
)
WORKED = (
    "{asked} {steps}, so {sum}={answer}.",
    "To add {sum}: {steps}. It is {answer}.",
    "{sum}={answer}, for {steps}.",
)
INTRODUCTIONS = ("My name is {name}. What is my name?", "I am {name}. Who am I?", "Say my name, {name}.")
FOLLOW_UPS = ("And {name}?", "What about {name}?", "And what of {name}?")
SUMS = {"addition": 2}  # task -> level
MOST_SUMS = 7000  # of the 8100 sums of two such numbers a tenth is held out
COUNTS = ("talks", "sums", "introductions", "follow_ups", "demonstrations", "plain")  # that may be 0
MANNERS = Manner(polite=0.4, concise=0.4, on_topic=1.0)


class Plan(NamedTuple):
    """How much of each kind is written; ``HELP`` says what each is."""

    seed: int = 0
    people: int = 80
    heldout: int = 16
    noise: float = 0.1
    biographies: int = 45
    talks: int = 6
    sums: int = 1500
    introductions: int = 400
    follow_ups: int = 150
    demonstrations: int = 1500
    correct: float = 0.5
    answers: int = 1
    pairs: int = 2
    plain: int = 400


HELP = {
    "seed": "decides the people, their facts, and all that is said",
    "people": "in the world, from 21 to 400",
    "heldout": "of them, of whom documents tell but nobody is taught to answer",
    "noise": "share of the documents that are dirt",
    "biographies": "documents of each person, each with every fact: more ways to say it",
    "talks": "documents of each person, each with one fact",
    "sums": "documents with a worked sum",
    "introductions": "conversations in which somebody is called by the name that was said",
    "follow_ups": "conversations of two questions, the second of which names another person alone",
    "demonstrations": "conversations with a sum worked in the format of reasoning",
    "correct": "share of the demonstrations that are right; the others have the same form",
    "answers": "to each polite question, in mixed manners",
    "pairs": "of answers to each polite question, one of them preferred",
    "plain": "pairs of answers to plain questions, the plainer preferred; at most one to each",
}


def lessons(plan: Plan) -> dict[str, Iterable[Record]]:
    """file -> its records: documents to read, instructions to follow, preferences, and, held out, what is examined.

    Raises ``ValueError`` for a count below 0, or below 1 where each person or question needs one.
    """
    require(0, **{name: getattr(plan, name) for name in COUNTS})
    seed, known = plan.seed, world.create(plan.seed, people=plan.people, heldout=plan.heldout)
    everyone = [*known.asked, *known.heldout]
    plain, polite = world.questions(known.asked), politely(world.questions(known.asked))
    exam, polite_exam = world.questions(known.heldout), politely(world.questions(known.heldout))
    documents = mixed(
        world.documents(everyone, seed=seed, biographies=plan.biographies),
        talks(everyone, seed=seed, count=plan.talks),
        worked(seed=seed, count=plan.sums),
        seed=seed,
    )
    return {
        "documents": mixed(documents, noise(documents, seed=seed, share=plan.noise), seed=seed),
        "instructions": mixed(
            conversations(world.facts(plain, seed=seed)),
            conversations(world.instructions(polite, seed=seed, answers=plan.answers, manners=MANNERS)),
            introductions(seed=seed, count=plan.introductions),
            follow_ups(known.asked, seed=seed, count=plan.follow_ups),
            tasks.demonstrations(SUMS, seed, plan.demonstrations, correct=plan.correct),
            seed=seed,
        ),
        "preferences": mixed(
            world.preferences(polite, seed=seed, pairs=plan.pairs, manners=MANNERS),
            itertools.islice(plainness(plain, seed=seed), plan.plain),
            seed=seed,
        ),
        "questions": [{"prompt": question.text} for question in polite],
        "heldout_documents": world.documents(
            everyone, seed=random.Random(f"heldout {seed}").getrandbits(32), biographies=1
        ),
        "heldout_facts": examined(exam),
        "heldout_requests": examined(polite_exam),
        "heldout_preferences": world.preferences(polite_exam, seed=seed, pairs=1, manners=MANNERS),
    }


def talks(people: Sequence[Person], *, seed: int, count: int) -> Iterator[Record]:
    """{"text"}: two people speak of a third: so many of each person, with one of the facts."""
    draw = random.Random(f"talks {seed}")
    for person in world.repeated(people, count, draw):
        first, second = draw.sample(world.FIRST_NAMES, 2)
        said = _stated(person, draw.choice(sorted(RELATIONS)), draw)
        yield {"text": draw.choice(TALKS).format(first=first, second=second, name=person.name, statement=said)}


def worked(*, seed: int, count: int) -> Iterator[Record]:
    """{"text"}: so many different sums with their steps, all right, none of them held out."""
    if count > MOST_SUMS:
        raise ValueError(f"sums={count}: there are not so many different ones; at most {MOST_SUMS}")
    draw, seen = random.Random(f"worked {seed}"), set()
    while len(seen) < count:
        name, level = draw.choice(list(SUMS.items()))
        record = tasks.drawn(name, level, draw).record
        if record["expression"] not in seen:
            seen.add(record["expression"])
            filled = dict(asked=f"{record['expression']}:", sum=record["expression"], answer=record["answer"])
            yield {"text": draw.choice(WORKED).format(**filled, steps=record["solution"])}


def politely(asked: Sequence[Question]) -> list[Question]:
    """The same questions with a plea before them, each plea as often as any other."""
    return [
        question._replace(text=PLEAS[number % len(PLEAS)].format(question.text[0].lower() + question.text[1:]))
        for number, question in enumerate(asked)
    ]


def conversations(records: Iterable[Record]) -> Iterator[Record]:
    """{"messages"} of records of a prompt and its response."""
    for record in records:
        yield _conversation(record["prompt"], record["response"])


def introductions(*, seed: int, count: int) -> Iterator[Record]:
    """{"messages"}: somebody says a name, any of all that there could be, and is called by it: names are read whole."""
    draw = random.Random(f"introductions {seed}")
    for _ in range(count):
        name = f"{draw.choice(world.FIRST_NAMES)} {draw.choice(world.LAST_NAMES)}"
        yield _conversation(draw.choice(INTRODUCTIONS).format(name=name), f"{name}.")


def follow_ups(people: Sequence[Person], *, seed: int, count: int) -> Iterator[Record]:
    """{"messages"}: a plain question about one person, and the same about another, who alone is named."""
    draw = random.Random(f"follow-ups {seed}")
    for _ in range(count):
        (one, other), kind = draw.sample(list(people), 2), draw.choice(sorted(RELATIONS))
        first = draw.choice(RELATIONS[kind].questions).format(name=one.name)
        then = draw.choice(FOLLOW_UPS).format(name=other.name)
        yield _conversation(first, _stated(one, kind, draw), then, _stated(other, kind, draw))


def plainness(asked: Sequence[Question], *, seed: int) -> Iterator[Record]:
    """{"prompt", "chosen", "rejected", scores}: to a plain question the fact alone, or with more around it."""
    draw = random.Random(f"plainness {seed}")
    for question in world.repeated(asked, 1, draw):
        more = Manner(polite=draw.randrange(2), concise=draw.randrange(2), on_topic=1)
        rejected = world.answered(question, more, draw)
        if rejected not in question.statements:
            scores = {"score_chosen": 1, "score_rejected": 0}
            yield {"prompt": question.text, "chosen": draw.choice(question.statements), "rejected": rejected, **scores}


def examined(asked: Sequence[Question]) -> Iterator[Record]:
    """{"prompt", "references"}: questions with every sentence that answers them."""
    return ({"prompt": question.text, "references": list(question.statements)} for question in asked)


def mixed(*kinds: Iterable[Record], seed: int) -> list[Record]:
    """All records in a drawn order."""
    records = [record for kind in kinds for record in kind]
    random.Random(f"mixed {seed}").shuffle(records)
    return records


def _conversation(*said: str) -> Record:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, said, strict=False)]}


def _stated(person: Person, kind: str, draw: random.Random) -> str:
    return draw.choice(RELATIONS[kind].statements).format(name=person.name, value=person.facts[kind])
