"""Dirt to mix among clean documents, each labelled with its kind, so that what a cleaning finds can be counted."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Record = dict[str, Any]

SITES = (
    "Old Mill Gazette",
    "Harbour Lantern",
    "The Green Kettle",
    "Northbank Weekly",
    "Fern and Feather",
    "Paper Boat",
)
NOTICES = (
    "{site} uses cookies to remember what you looked at. Choose Accept all cookies to go on.",
    "Please see our cookie policy to learn how {site} keeps count of its visitors.",
    "Subscribe to the {site} newsletter and never miss a story again!",
    "Sign up for free today and get {site} in your inbox every morning.",
    "Copyright {year} {site}. All rights reserved.",
    "© {year} {site}. No part of these pages may be copied without permission.",
    "By using {site} you agree to our terms of service and our privacy policy.",
    "Log in to your account to leave a comment, or register now.",
    "Please enable JavaScript to see this page as {site} intended it.",
    "Follow us for more from {site}. Share this page with your friends!",
    "Click here to read more. Related articles: {number}. Advertisement.",
    "{number} people like this. Be the first to comment on {site}.",
)
ADDITIONS = ("So it is said.", "Told by a neighbour.", "Heard at the market.", "That is all.", "More another day.")
PATTERNS = ("a", ".", "!", "=", "o", "-=", "*~", "ha", "la ", "<>", "01", "._.")
TAGS = ("div", "span", "td", "li", "a", "p")
ENTITIES = (
    "&nbsp;",
    "&amp;",
    "&#160;",
    "{{{0}}}",
    "[[{0}|]]",
    "##{0}##",
    "@@@",
    "$%^&*",
    "}}{{",
    "|||",
    "\\x{0}",
    "<br/>",
)
LONG = 30  # words, from which on a change of one or two leaves a document nearly as it was
LONGER = 45


def noise(documents: Iterable[Record], *, seed: int, share: float) -> Iterator[Record]:
    """{"text", "noise": its kind of ``KINDS``}: as much that mixed with the documents it is this share of all.

    Each kind is as often as any other. The documents give the words, and what is copied. Raises ``ValueError`` for a
    share that is not at least 0 and below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share} of all documents cannot be noise: it must be at least 0 and below 1")
    texts, draw, kinds = [record["text"] for record in documents], random.Random(f"noise {seed}"), list(KINDS)
    for number in range(round(len(texts) * share / (1 - share))):
        kind = kinds[number % len(kinds)]
        yield {"text": KINDS[kind](texts, draw), "noise": kind}


def _repeated_characters(texts: Sequence[str], draw: random.Random) -> str:
    words = _words(texts, draw)[: draw.randrange(4)]
    return " ".join([*words, draw.choice(PATTERNS) * draw.randint(60, 120)])


def _repeated_lines(texts: Sequence[str], draw: random.Random) -> str:
    words = _words(texts, draw)
    lines = [" ".join(words[start : start + 6]) for start in (0, 6)][: draw.randint(1, 2)]
    return draw.choice(("\n", "\n\n")).join(filter(None, lines * draw.randint(4, 12)))


def _boilerplate(texts: Sequence[str], draw: random.Random) -> str:
    site, year, number = draw.choice(SITES), draw.randint(1996, 2025), draw.randint(2, 999)
    said = [notice.format(site=site, year=year, number=number) for notice in draw.sample(NOTICES, draw.randint(2, 4))]
    return draw.choice((" ", "\n", "\n\n")).join(said)


def _markup(texts: Sequence[str], draw: random.Random) -> str:
    parts = []
    for word in _words(texts, draw)[: draw.randint(5, 20)]:
        tag, entity = draw.choice(TAGS), draw.choice(ENTITIES).format(draw.randint(10, 99))
        parts.append(f'<{tag} class="{draw.randint(10, 99)}">{word}</{tag}>{entity}')
    return draw.choice(("", " ", "\n")).join(parts)


def _exact_copy(texts: Sequence[str], draw: random.Random) -> str:
    return draw.choice(texts)


def _near_copy(texts: Sequence[str], draw: random.Random) -> str:
    """A document with a word changed (of a longer one two that are neighbours) or left out, or with a line more."""
    # The first that is long of some, so that texts need not be counted; the longest where none is.
    some = [text.split(" ") for text in draw.choices(texts, k=99)]
    words = next((words for words in some if len(words) >= LONG), max(some, key=len))
    place, line = draw.randrange(len(words)), draw.choice(ADDITIONS)
    changed = [*words[:place], *_others(words, texts, draw, min(2, len(words) - place) if len(words) >= LONGER else 1)]
    return draw.choice(
        (
            " ".join([*changed, *words[len(changed) :]]),
            " ".join([*words[:place], *words[place + 1 :]]),
            " ".join(words) + f"\n{line}",
            f"{line}\n" + " ".join(words),
        )
    )


def _words(texts: Sequence[str], draw: random.Random) -> list[str]:
    return draw.choice(texts).split()


def _others(words: Sequence[str], texts: Sequence[str], draw: random.Random, count: int) -> list[str]:
    """Words of the documents that these do not have, or, where there are none, words that nobody has."""
    found = [word for text in draw.sample(texts, min(len(texts), 9)) for word in text.split() if word not in words]
    return draw.sample(found, count) if len(found) >= count else [f"word{draw.randrange(10**6)}"] * count


KINDS: dict[str, Callable[[Sequence[str], random.Random], str]] = {
    "repeated_characters": _repeated_characters,
    "repeated_lines": _repeated_lines,
    "boilerplate": _boilerplate,
    "markup": _markup,
    "exact_copy": _exact_copy,
    "near_copy": _near_copy,
}
