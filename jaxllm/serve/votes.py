"""Blind votes in the terminal: two answers to a prompt side by side, in random order, and a key for the better one.

Answers are sampled before anything is shown, and a vote is on the disk before the next question.
"""

import dataclasses
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from jaxllm import figures, workdir
from jaxllm.evaluate.answers import answered
from jaxllm.evaluate.duels import Player, ladder, player, spoken
from jaxllm.serve import ballots
from jaxllm.serve.ballots import Question
from jaxllm.serve.chat import Manner, load
from jaxllm.text import chat
from jaxllm.text.chat import Conversation

KEYS = {"a": "first", "b": "second", "t": "tie", "s": "skip"}
STOP = "q"
HELP = "a or b: that answer is better, t: a tie, s: skip, q: stop"


def prepare(
    database: sqlite3.Connection,
    players: Sequence[Player],
    prompts: Sequence[Conversation],
    manner: Manner,
    *,
    batch_size: int = 16,
) -> Counter:
    """Samples the answers of each player that ``database`` lacks, and shows how far it is.

    Counts old and new ones under "answers", and prompts that leave no room for one under "too_long". Raises
    ``ValueError`` as ``ballots.check`` does; seeds are no manner.
    """
    wanted = {ballots.spelled(prompt): prompt for prompt in prompts}
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        for each in players:
            how = _how(each, manner)
            ballots.check(database, each, how["manner"], how["identity"])
            known = ballots.sampled(database, each, manner.seed)
            missing = {prompt: asked for prompt, asked in wanted.items() if prompt not in known}
            shown = bar.add_task(str(each), total=len(wanted), completed=len(wanted) - len(missing))
            for prompt, text in _answers(each, missing, manner, batch_size) if missing else ():
                ballots.keep(database, each, prompt, text, seed=manner.seed, **how)
                bar.advance(shown)
    found = [ballots.sampled(database, each, manner.seed)[prompt] for each in players for prompt in wanted]
    return Counter("too_long" if text is None else "answers" for text in found)


def session(
    database: sqlite3.Connection,
    runs: Sequence[str],
    prompts: Sequence[Conversation],
    manner: Manner,
    lines: Iterable[str],
    *,
    voter: str,
    show: Callable[[Any], None],
) -> Counter:
    """Lets the runs answer what they did not yet, and asks the voter what is left to ask. Counts the verdicts.

    Raises ``ValueError`` for fewer than two players, and as ``player`` and ``prepare`` do.
    """
    players = list(dict.fromkeys(map(player, runs)))
    if len(players) < 2:
        raise ValueError(f"--runs={list(map(str, players))}: a vote is between two players or more")
    found = prepare(database, players, prompts, manner)
    questions = list(ballots.questions(database, players, prompts, voter=voter, seed=manner.seed))
    show(
        Text(
            f"{found['answers']} answers, {found['too_long']} prompts too long; {len(questions)} questions for {voter}"
        )
    )
    return vote(database, questions, lines, voter=voter, show=show)


def vote(
    database: sqlite3.Connection,
    questions: Iterable[Question],
    lines: Iterable[str],
    *,
    voter: str,
    show: Callable[[Any], None],
) -> Counter:
    """Shows each question and keeps what the next line says of it, until the voter ends it. Counts the verdicts."""
    counts, lines = Counter(), iter(lines)
    for question in questions:
        show(displayed(question))
        while (said := next(lines, STOP).strip().lower()) not in (*KEYS, STOP):
            show(Text(HELP))
        if said == STOP:
            break
        ballots.record(database, question, KEYS[said], voter=voter)
        counts[KEYS[said]] += 1
    return counts


def displayed(question: Question) -> Group:
    """The question as the terminal has it: nothing of it tells who wrote which answer."""
    said = "\n\n".join(f"{message['role']}: {message['content']}" for message in question.prompt.messages)
    answers = Table("A", "B", expand=True)
    for column in answers.columns:
        column.ratio = 1
    answers.add_row(*(_visible(text or "(nothing)") for text in question.texts))
    return Group(Panel(_visible(said)), answers, Text(HELP))


def standings(database: sqlite3.Connection, *, figure: str = "") -> Group:
    """The ranking as the terminal has it, with how far to trust it; ``figure`` is a PNG to draw it into."""
    result = ballots.result(database)
    if figure:
        figures.ladder({each.player: each.elo for each in result.ratings}, figure, title="Elo, 95 % intervals")
    lines = [", ".join(f"{count} {verdict}" for verdict, count in sorted(result.counts.items()))]
    if result.left:
        lines.append("the answer that stood left won {:.0%} ({:.0%} to {:.0%})".format(*result.left))
    for voters, found in result.agreements.items():
        share, kappa = "{:.0%} ({:.0%} to {:.0%})".format(*found.share), f"{found.kappa:.2f}"
        lines.append(f"{' and '.join(voters)} agree on {share} of {found.count}, Cohen's kappa {kappa}")
    if len(result.islands) > 1:
        lines.append(
            f"no vote links {' with '.join(str(sorted(group)) for group in result.islands)}: compare within each"
        )
    return Group(ladder(result.ratings), *map(Text, lines))


def _how(player: Player, manner: Manner) -> dict[str, Any]:
    """How a player's answers come about, the seed apart."""
    settings = {name: value for name, value in dataclasses.asdict(manner).items() if name != "seed"}
    return {"manner": settings, "identity": workdir.saved(player.run, step=player.step).identity}


def _answers(
    player: Player, prompts: dict[str, Conversation], manner: Manner, batch_size: int
) -> Iterator[tuple[str, str | None]]:
    """(prompt, the player's answer) as they are sampled; None where the prompt leaves no room for one."""
    speaker = load(player.run, step=player.step)
    room, length = manner.room(speaker)
    ids = {spelled: chat.prompt(prompt, speaker.tokenizer) for spelled, prompt in prompts.items()}
    asked = [spelled for spelled in prompts if len(ids[spelled]) <= room]
    yield from ((spelled, None) for spelled in prompts if len(ids[spelled]) > room)
    how = dict(max_new_tokens=length, sampler=manner.sampler, batch_size=batch_size)
    how["stop_ids"] = speaker.tokenizer.stop_ids
    key = jax.random.key(manner.seed)
    for number, answer in answered(speaker.model, speaker.params, [ids[each] for each in asked], key, **how):
        yield asked[number], spoken(speaker.tokenizer, answer)


def _visible(text: str) -> Text:
    """The text without what would move the cursor of a terminal."""
    return Text("".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text))
