"""What people say of two answers to a prompt, kept in SQLite: who wrote them, how, and when; which questions are left;
and what the votes say.

What is asked is which of two texts is better. A voter is asked it once, and the vote counts for every two runs that
wrote them.
"""

import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.evaluate.duels import Player
from jaxllm.evaluate.ranking import Agreement, Game, Interval, Rating, agreement, bradley_terry, islands, wilson
from jaxllm.text.chat import Conversation

OUTCOMES = {"first": 1.0, "second": 0.0, "tie": 0.5}  # of the verdicts that count; "skip" is the other one

# An answer is a text to a prompt, whoever wrote it. A sample is who wrote it, when and how; one without an answer is a
# prompt that left no room. The first of a vote's answers is the one that stood left.
SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, text TEXT NOT NULL, UNIQUE (prompt, text));
CREATE TABLE IF NOT EXISTS samples (
  prompt TEXT NOT NULL, run TEXT NOT NULL, step INTEGER NOT NULL, seed INTEGER NOT NULL, manner TEXT NOT NULL,
  identity TEXT NOT NULL, answer INTEGER REFERENCES answers (id), time TEXT NOT NULL,
  PRIMARY KEY (prompt, run, step, seed));
CREATE TABLE IF NOT EXISTS votes (
  first INTEGER NOT NULL REFERENCES answers (id), second INTEGER NOT NULL REFERENCES answers (id),
  verdict TEXT NOT NULL CHECK (verdict IN ('first', 'second', 'tie', 'skip')),
  voter TEXT NOT NULL, time TEXT NOT NULL, CHECK (first <> second));
CREATE UNIQUE INDEX IF NOT EXISTS once ON votes (voter, min(first, second), max(first, second));
"""
PAIRED = """
SELECT DISTINCT min(x.answer, y.answer), max(x.answer, y.answer)
FROM samples x JOIN samples y ON x.prompt = y.prompt AND x.seed = y.seed
WHERE x.run = ? AND x.step = ? AND y.run = ? AND y.step = ? AND x.answer <> y.answer
"""
SAMPLED = """
SELECT s.prompt, a.text FROM samples s LEFT JOIN answers a ON s.answer = a.id WHERE run = ? AND step = ? AND seed = ?
"""
COUNTED = """
SELECT first, second, verdict, voter, prompt FROM votes JOIN answers ON first = id WHERE verdict <> 'skip'
ORDER BY votes.rowid
"""


class Question(NamedTuple):
    """Two answers to a prompt as they are shown, the left one first, with their numbers in the database."""

    prompt: Conversation
    texts: tuple[str, str]
    numbers: tuple[int, int]


class Result(NamedTuple):
    """What the votes say. counts: of each verdict. left: how often the answer that stood left won, but for ties.

    agreements: of every two voters, over what both were asked. islands: players in groups that votes link.
    """

    ratings: list[Rating]
    counts: Counter
    left: Interval | None
    agreements: dict[tuple[str, str], Agreement]
    islands: list[set[str]]


def open(path: str | os.PathLike) -> sqlite3.Connection:
    """The database of votes at ``path``, made where there is none; ``ValueError`` where something else lies there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path)
    try:
        database.executescript(SCHEMA)
    except sqlite3.DatabaseError as error:
        database.close()
        raise ValueError(f"{path} is no database of votes ({error}); give another --database") from error
    return database


def check(database: sqlite3.Connection, player: Player, manner: Mapping[str, Any], identity: str) -> None:
    """Raises ``ValueError`` where answers in ``database`` were sampled in another manner, or where this player's came
    from other parameters: they would be ranked as one.
    """
    others = database.execute("SELECT manner FROM samples WHERE manner <> ? LIMIT 1", (_spelled(manner),)).fetchone()
    if others:
        raise ValueError(
            f"the answers there were sampled with {others[0]}, not {_spelled(manner)}: use another --database"
        )
    changed = "SELECT 1 FROM samples WHERE run = ? AND step = ? AND identity <> ?"
    if database.execute(changed, (*player, identity)).fetchone():
        raise ValueError(f"{player} had other parameters when its answers were sampled: use another --database")


def sampled(database: sqlite3.Connection, player: Player, seed: int) -> dict[str, str | None]:
    """The player's answer to each prompt, as ``spelled`` spells it; None where it left no room."""
    return dict(database.execute(SAMPLED, (*player, seed)))


def keep(
    database: sqlite3.Connection,
    player: Player,
    prompt: str,
    text: str | None,
    *,
    seed: int,
    manner: Mapping[str, Any],
    identity: str,
) -> None:
    """Keeps the player's answer to a prompt. It is on the disk when this returns."""
    with database:
        number = None
        if text is not None:
            database.execute("INSERT OR IGNORE INTO answers (prompt, text) VALUES (?, ?)", (prompt, text))
            found = database.execute("SELECT id FROM answers WHERE prompt = ? AND text = ?", (prompt, text))
            number = found.fetchone()[0]
        row = (prompt, *player, seed, _spelled(manner), identity, number, _now())
        database.execute("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


def questions(
    database: sqlite3.Connection, players: Sequence[Player], prompts: Sequence[Conversation], *, voter: str, seed: int
) -> Iterator[Question]:
    """What to ask a voter who was not asked it yet: every two players' answers to each prompt, where they differ.

    Which question comes when, and which answer stands left, is drawn for each voter from the seed.
    """
    answers = {number: given for number, *given in database.execute("SELECT id, prompt, text FROM answers")}
    wanted = {spelled(prompt): prompt for prompt in prompts}
    asked = set(database.execute("SELECT min(first, second), max(first, second) FROM votes WHERE voter = ?", (voter,)))
    pairs = {pair for both in combinations(players, 2) for pair in database.execute(PAIRED, both[0] + both[1])}
    draws = {pair: random.Random(f"{seed} {voter} {pair}") for pair in pairs - asked if answers[pair[0]][0] in wanted}
    for pair in sorted(draws, key=lambda pair: (draws[pair].random(), pair)):
        numbers = pair if draws[pair].random() < 0.5 else pair[::-1]
        prompt = wanted[answers[pair[0]][0]]
        yield Question(prompt, tuple(answers[number][1] for number in numbers), numbers)


def record(database: sqlite3.Connection, question: Question, verdict: str, *, voter: str) -> None:
    """Keeps a verdict, "first" for the answer that stood left. It is on the disk when this returns."""
    with database:
        database.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?)", (*question.numbers, verdict, voter, _now()))


def games(database: sqlite3.Connection) -> list[Game]:
    """A game for each vote and each two players who wrote its two answers; those about one prompt are a block."""
    wrote: dict[int, set[str]] = {}
    for answer, run, step in database.execute("SELECT answer, run, step FROM samples"):
        wrote.setdefault(answer, set()).add(str(Player(run, step)))
    return [
        Game(one, other, OUTCOMES[verdict], block=prompt)
        for first, second, verdict, _, prompt in database.execute(COUNTED)
        for one in sorted(wrote[first] - wrote[second])
        for other in sorted(wrote[second] - wrote[first])
    ]


def result(database: sqlite3.Connection, *, seed: int = 0) -> Result:
    """The ranking of all players, and how far to trust it. Raises ``ValueError`` where there is no vote to rank by."""
    played, given = games(database), list(database.execute(COUNTED))
    left = [verdict == "first" for _, _, verdict, *_ in given if verdict != "tie"]
    return Result(
        ratings=bradley_terry(played, seed=seed),
        counts=Counter(verdict for (verdict,) in database.execute("SELECT verdict FROM votes")),
        left=wilson(sum(left), len(left)) if left else None,
        agreements=_agreements(given),
        islands=islands(played),
    )


def export(database: sqlite3.Connection, path: str | os.PathLike) -> Counter:
    """Writes the votes as preferences, {"prompt": messages, "chosen", "rejected", "annotator", "tie"}, one a line.

    The chosen answer of a tie is the one that stood left. Counts the lines by verdict; what was skipped has none.
    """
    text = dict(database.execute("SELECT id, text FROM answers"))
    lines, counts = [], Counter()
    for first, second, verdict, voter, prompt in database.execute(COUNTED):
        chosen, rejected = (second, first) if verdict == "second" else (first, second)
        said = {"chosen": text[chosen], "rejected": text[rejected], "annotator": voter, "tie": verdict == "tie"}
        lines.append(_spelled(json.loads(prompt) | said) + "\n")
        counts["ties" if verdict == "tie" else "decided"] += 1
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text("".join(lines), encoding="utf-8")
    os.replace(beside, path)
    return counts


def spelled(prompt: Conversation) -> str:
    """The prompt as the database and the jsonl have it: {"prompt": messages}, and "tools" where it has any."""
    return _spelled({"prompt": list(prompt.messages)} | ({"tools": list(prompt.tools)} if prompt.tools else {}))


def _agreements(given: Sequence[tuple]) -> dict[tuple[str, str], Agreement]:
    """Of every two voters, over the pairs of answers that both gave a verdict on, whichever stood left."""
    said: dict[str, dict[tuple[int, int], float]] = {}
    for first, second, verdict, voter, _ in given:
        outcome = OUTCOMES[verdict]
        said.setdefault(voter, {})[min(first, second), max(first, second)] = outcome if first < second else 1 - outcome
    found = {}
    for one, other in combinations(sorted(said), 2):
        if both := sorted(said[one].keys() & said[other].keys()):
            found[one, other] = agreement([said[one][pair] for pair in both], [said[other][pair] for pair in both])
    return found


def _spelled(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
