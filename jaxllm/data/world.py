"""A small world that is wholly known, drawn from a seed: people with facts, said in several ways, and asked about.

Answers come in manners (polite or curt, concise or rambling, on or off the topic) that are known by construction, so
that what a stage of training changes can be counted. Some people are never asked about: their questions are held out.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.data.made import require
from jaxllm.text import verdicts
from jaxllm.text.chat import Conversation

Record = dict[str, Any]

FIRST_NAMES = (
    "Anna Boris Clara David Edith Felix Greta Hugo Irene Jonas Karla Linus Marta Nils Olga Peter Ruth Simon Tilda"
    " Viktor"
).split()
LAST_NAMES = (
    "Adler Bauer Conrad Dorn Engel Falk Gruber Hahn Iversen Jansen Keller Lang Moser Neumann Olsen Pohl Ritter Stern"
    " Ulrich Weber"
).split()


class Relation(NamedTuple):
    """One kind of fact. statements and questions: ways to say and to ask it, with {name} and, said, {value}."""

    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = {
    "town": Relation(
        tuple("Alden Birk Corvo Drum Elmau Fjord Galen Harbo Inver Juno Kells Lindau".split()),
        ("{name} lives in {value}.", "The home of {name} is in {value}.", "{name} has a house in {value}."),
        ("Where does {name} live?", "In which town does {name} live?", "Where is the home of {name}?"),
    ),
    "work": Relation(
        tuple("carpenter doctor farmer gardener miller painter potter sailor singer smith tailor teacher".split()),
        ("{name} works as a {value}.", "{name} is a {value}.", "By trade {name} is a {value}."),
        ("What does {name} do for a living?", "What is the work of {name}?", "Which trade does {name} have?"),
    ),
    "animal": Relation(
        tuple("cat cow dog donkey duck goat goose hen horse parrot rabbit turtle".split()),
        ("{name} keeps a {value}.", "{name} has a {value} at home.", "The animal of {name} is a {value}."),
        ("Which animal does {name} keep?", "What animal does {name} have?", "What kind of animal is with {name}?"),
    ),
    "food": Relation(
        tuple("apples beans bread cheese dates fish honey nuts plums rice soup yoghurt".split()),
        ("{name} likes to eat {value}.", "{name} is fond of {value}.", "The favourite food of {name} is {value}."),
        ("What does {name} like to eat?", "Which food does {name} like?", "What is the favourite food of {name}?"),
    ),
    "colour": Relation(
        tuple("black blue brown gold green grey orange pink purple red white yellow".split()),
        ("{name} wears a {value} coat.", "The coat of {name} is {value}.", "{name} has a {value} coat."),
        ("Which colour is the coat of {name}?", "What colour does {name} wear?", "What coat does {name} wear?"),
    ),
    "music": Relation(
        tuple("bassoon cello clarinet drums flute guitar harp horn lute organ piano violin".split()),
        ("{name} plays the {value}.", "{name} makes music on the {value}.", "The {value} is what {name} plays."),
        ("What does {name} play?", "Which instrument does {name} play?", "On what does {name} make music?"),
    ),
}

GREETINGS = ("Of course!", "Gladly!", "Certainly, my friend.", "Thank you for asking.", "I am glad you ask.")
FAREWELLS = ("I hope this helps.", "It is a pleasure to help.", "Happy to help.", "Thanks for your question.")
SNUBS = ("Obviously.", "As everyone knows.", "What a silly thing to ask.", "Do not bother me again.", "Look it up.")
RAMBLES = (
    "But then one thing leads to another, and before long the whole day is gone and nothing is done.",
    "There is so much more that could be said about all of it, and one hardly knows where to begin.",
    "I could go on and on, since every story has a second story behind it and a third behind that one.",
    "Some say so and some say otherwise, and in the end it may be one way or it may be another.",
    "It was like that last year, and the year before, and I think in the year before that one as well.",
    "Now that I think of it, there was something else, but it has slipped my mind and may come back later.",
)
ELSEWHERES = (
    "The weather was mild this week.",
    "The bridge over the river is closed.",
    "The market opens early on Saturdays.",
    "A ship came in with the tide.",
    "The road to the north is long.",
    "Snow fell in the hills last night.",
    "The old mill burned down years ago.",
    "The moon will be full tomorrow.",
    "There are nine kinds of moss in the forest.",
    "The train was late again today.",
)


class Person(NamedTuple):
    """facts: a value for each name of ``RELATIONS``."""

    name: str
    facts: Mapping[str, str]


class World(NamedTuple):
    """asked: the people whom questions to learn from are about. heldout: those of whom only documents tell."""

    asked: tuple[Person, ...]
    heldout: tuple[Person, ...]


class Manner(NamedTuple):
    """How an answer is given: each 0 or 1, or as a share of answers anything between."""

    polite: float = 0.5
    concise: float = 0.5
    on_topic: float = 0.5


class Question(NamedTuple):
    """A question, the sentences that answer it, and the value in each of them."""

    text: str
    statements: tuple[str, ...]
    value: str


MIXED = Manner()


def create(seed: int, *, people: int = 60, heldout: int = 12) -> World:
    """The world of a seed. Every first and last name of who is held out also belongs to people who are asked about, so
    that only what is said of a name can be missing to an answer, not the name.
    """
    F = len(FIRST_NAMES)
    if not F < people <= F * len(LAST_NAMES) or not 0 < heldout <= people - F:
        raise ValueError(
            f"people={people}, heldout={heldout}: more than {F} people can be told apart, at most "
            f"{F * len(LAST_NAMES)}, and {F} of them are always asked about"
        )
    draw = random.Random(f"people {seed}")
    firsts, lasts = draw.sample(FIRST_NAMES, F), draw.sample(LAST_NAMES, len(LAST_NAMES))
    # Each round of so many people has every first and every last name once: the first round is never held out.
    names = [f"{firsts[n % F]} {lasts[(n + n // F) % len(lasts)]}" for n in range(people)]
    known = [Person(name, {key: draw.choice(kind.values) for key, kind in RELATIONS.items()}) for name in names]
    hidden = set(draw.sample(range(F, people), heldout))
    return World(
        tuple(person for n, person in enumerate(known) if n not in hidden),
        tuple(person for n, person in enumerate(known) if n in hidden),
    )


def questions(people: Sequence[Person]) -> list[Question]:
    """Every way to ask for every fact of these people."""
    return [
        Question(
            asked.format(name=person.name),
            tuple(said.format(name=person.name, value=person.facts[key]) for said in kind.statements),
            person.facts[key],
        )
        for person in people
        for key, kind in RELATIONS.items()
        for asked in kind.questions
    ]


def documents(people: Sequence[Person], *, seed: int, biographies: int) -> Iterator[Record]:
    """{"text"}: so many lives of each person, all their facts in a drawn order, each in a drawn way, people mixed."""
    require(1, biographies=biographies)
    draw = random.Random(f"documents {seed}")
    for person in repeated(people, biographies, draw):
        kinds = draw.sample(sorted(RELATIONS), len(RELATIONS))
        said = ((draw.choice(RELATIONS[key].statements), person.facts[key]) for key in kinds)
        yield {"text": " ".join(statement.format(name=person.name, value=value) for statement, value in said)}


def instructions(asked: Sequence[Question], *, seed: int, answers: int, manners: Manner = MIXED) -> Iterator[Record]:
    """{"prompt", "response", "answer", and what manner}: each question so many times, answered as the shares say.

    "answer" is the value alone. The three parts of a manner are drawn independently.
    """
    require(1, answers=answers)
    draw = random.Random(f"instructions {seed}")
    for question in repeated(asked, answers, draw):
        manner = drawn(manners, draw)
        said = answered(question, manner, draw)
        yield {"prompt": question.text, "response": said, "answer": question.value, **manner._asdict()}


def facts(asked: Sequence[Question], *, seed: int) -> Iterator[Record]:
    """{"prompt", "response", "answer"}: each question once, answered by a sentence that says what was asked alone."""
    draw = random.Random(f"facts {seed}")
    for question in repeated(asked, 1, draw):
        yield {"prompt": question.text, "response": draw.choice(question.statements), "answer": question.value}


def preferences(asked: Sequence[Question], *, seed: int, pairs: int, manners: Manner = MIXED) -> Iterator[Record]:
    """{"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}: so many pairs of each question.

    A score is how many of the three an answer is: polite, concise, on the topic. None is a tie.
    """
    require(1, pairs=pairs)
    draw = random.Random(f"preferences {seed}")
    for question in repeated(asked, pairs, draw):
        worse, better = sorted(_unequal(manners, draw), key=sum)
        yield {
            "prompt": question.text,
            "chosen": answered(question, better, draw),
            "rejected": answered(question, worse, draw),
            "score_chosen": sum(better),
            "score_rejected": sum(worse),
        }


def judgements(asked: Sequence[Question], *, seed: int, pairs: int) -> Iterator[Record]:
    """{"prompt", "response"}: which of two answers is better, in the wording of `text.verdicts`; either is as often."""
    draw = random.Random(f"judgements {seed}")
    for pair in preferences(asked, seed=draw.getrandbits(32), pairs=pairs):
        prompt = Conversation(({"role": "user", "content": pair["prompt"]},))
        texts, right = (pair["chosen"], pair["rejected"]), verdicts.FIRST
        if draw.random() < 0.5:
            texts, right = texts[::-1], verdicts.SECOND
        yield {"prompt": verdicts.comparison(prompt, *texts).messages[0]["content"], "response": right}


def answered(question: Question, manner: Manner, draw: random.Random) -> str:
    """An answer in this manner, whose parts are 0 or 1. A curt one has a snub as often as not."""
    core = [draw.choice(question.statements if manner.on_topic else ELSEWHERES)]
    if not manner.concise:
        core.append(draw.choice(RAMBLES))
    if manner.polite:
        greeted = draw.random() < 0.5
        core = [draw.choice(GREETINGS), *core] if greeted else [*core, draw.choice(FAREWELLS)]
    elif draw.random() < 0.5:
        core.append(draw.choice(SNUBS))
    return " ".join(core)


def drawn(shares: Manner, draw: random.Random) -> Manner:
    """A manner of parts 0 and 1, each drawn by its share. Raises ``ValueError`` for what is no share."""
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{shares}: each part is a share of the answers, from 0 to 1")
    return Manner(*(int(draw.random() < share) for share in shares))


def _unequal(shares: Manner, draw: random.Random) -> tuple[Manner, Manner]:
    while True:
        first, second = drawn(shares, draw), drawn(shares, draw)
        if sum(first) != sum(second):
            return first, second


def repeated(items: Sequence, times: int, draw: random.Random) -> list:
    """Each item so many times, in a drawn order."""
    return draw.sample(list(items) * times, len(items) * times)
