"""Runs that answer the same prompts: who wins by a judge, how long the answers are, how far a run went from the first.

Answers are judged as texts; the divergence is measured on the ids that were sampled.
"""

import dataclasses
import glob
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from jaxllm import workdir
from jaxllm.checkpoint import whole_steps
from jaxllm.evaluate import judges as judging
from jaxllm.evaluate import questions
from jaxllm.evaluate.answers import Answer, answers
from jaxllm.evaluate.judges import Judge
from jaxllm.evaluate.measures import plain
from jaxllm.evaluate.ranking import Game, Rating, agreement, bradley_terry, win_rate
from jaxllm.evaluate.rows import by_length
from jaxllm.figures import Point
from jaxllm.generate import SamplerConfig
from jaxllm.model import Model, policy
from jaxllm.sharding import place
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

Ids = Sequence[Sequence[int]]
PLAIN = SamplerConfig()  # temperature 1 and no filter: what is drawn so comes from the policy itself


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How all players answer."""

    sampler: SamplerConfig
    max_new_tokens: int = 128
    batch_size: int = 16
    seed: int = 0

    def answers(self, player: "Loaded", prompts: Ids, number: int = 0) -> list[Answer]:
        """The player's answer to each prompt; ``number`` tells several of one player apart."""
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        how = dict(max_new_tokens=self.max_new_tokens, sampler=self.sampler, batch_size=self.batch_size)
        return answers(player.model, player.params, prompts, key, stop_ids=player.tokenizer.stop_ids, **how)


class Player(NamedTuple):
    """A run at one of its steps."""

    run: str
    step: int

    def __str__(self):
        return f"{self.run}@{self.step}"


class Loaded(NamedTuple):
    """A player in memory."""

    model: Model
    params: Tree
    tokenizer: Tokenizer


class Asked(NamedTuple):
    """The prompts that leave every player room to answer, and their ids; how many do not."""

    prompts: list[Conversation]
    ids: list[list[int]]
    too_long: int


class Divergence(NamedTuple):
    """KL(policy || reference) in nats: mean over whole answers, its standard error, and the mean over tokens."""

    kl: float
    kl_error: float
    kl_per_token: float


class Contest(NamedTuple):
    """What was measured, as JSON can hold it; what was asked, and the answers of each player."""

    report: dict[str, Any]
    prompts: list[Conversation]
    texts: dict[str, list[str]]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Of each prompt its messages, and every player's answer to it."""
        each = (dict(zip(self.texts, said, strict=True)) for said in zip(*self.texts.values(), strict=True))
        return [{"prompt": list(prompt.messages), **said} for prompt, said in zip(self.prompts, each, strict=True)]


def player(named: str) -> Player:
    """The player that "DIRECTORY" or "DIRECTORY@STEP" names: the newest step, unless told.

    Raises ``ValueError`` where the run has no such checkpoint, ``FileNotFoundError`` where there is no run.
    """
    directory, _, step = named.rpartition("@")
    if not step.isdecimal():
        directory, step = named, ""
    workdir.config(directory)
    steps = list(whole_steps(Path(directory) / "checkpoints"))
    if not steps or (step and int(step) not in steps):
        raise ValueError(f"{named}: the run has whole checkpoints of steps {sorted(steps)}; name one as DIRECTORY@STEP")
    return Player(os.path.normpath(directory), int(step or steps[0]))


def group(named: str) -> tuple[str, list[Player]]:
    """(label, players) of "LABEL=GLOB" or "LABEL=DIRECTORY@STEP"; without a label, it is what names them."""
    label, _, pattern = named.rpartition("=")
    return label or pattern, [player(directory) for directory in sorted(glob.glob(pattern)) or [pattern]]


def prompts(players: Sequence[Player], path: str = "") -> list[Conversation]:
    """Those of the file at ``path``, or what the first player's run holds out and no player was trained on."""
    if path:
        return questions.of_file(path)
    return questions.held_out([workdir.config(run) for run in dict.fromkeys(each.run for each in players)])


def contest(
    reference: Player,
    groups: Mapping[str, Sequence[Player]],
    prompts: Sequence[Conversation],
    judges: Mapping[str, Judge],
    sampling: Sampling,
    *,
    best_of: int = 0,
    by: Judge | None = None,
) -> Contest:
    """Every player's answers against the reference's. ``groups`` maps a label to its players, such as a method's seeds.

    With ``best_of`` N the best of N further answers of the reference, by the judge ``by`` (the first, unless told), is
    a player too. Raises ``ValueError`` where nobody plays against the reference, where the players do not share a
    tokenizer, and where fewer than two prompts leave room for an answer.
    """
    labels = {each: label for label, players in groups.items() for each in players if each != reference}
    if not labels and best_of < 1:
        raise ValueError(f"nobody is compared with {reference}: name other runs, or give --best_of")
    saved = {each: workdir.saved(each.run, step=each.step) for each in (reference, *labels)}
    asked = _asked(saved, prompts, sampling.max_new_tokens)
    first = _loaded(saved[reference])
    found = {str(reference): sampling.answers(first, asked.ids)}
    rows = [{"label": "reference", "player": str(reference)}]
    doing = dict(console=Console(stderr=True), disable=not sys.stderr.isatty())
    for each, label in track(labels.items(), "answers", **doing):
        found[str(each)], far = _played(_loaded(saved[each]), first, asked, sampling)
        rows.append({"label": label, "player": str(each), **far._asdict()})
    if best_of:
        name = f"best of {best_of}"
        found[name] = _best(first, asked, sampling, best_of, by or next(iter(judges.values())))
        rows.append({"label": name, "player": name, "kl_at_most": math.log(best_of) - (best_of - 1) / best_of})
    texts = {name: [spoken(first.tokenizer, answer) for answer in given] for name, given in found.items()}
    rows = [row | _lengths(found[row["player"]], texts[row["player"]]) for row in rows]
    how = {"prompts": len(asked.prompts), "too_long": asked.too_long, "sampling": dataclasses.asdict(sampling)}
    return Contest(plain(how | _judged(rows, texts, asked.prompts, judges)), asked.prompts, texts)


def ranking(found: Contest, judge: Judge) -> list[Rating]:
    """The players, strongest first, when every two are compared. Games about one prompt are not independent."""
    return bradley_terry(
        [
            Game(one, other, float(outcome), block=number)
            for one, other in combinations(found.texts, 2)
            for number, outcome in enumerate(judge(found.prompts, found.texts[one], found.texts[other]).wins)
        ]
    )


def ladder(ratings: Sequence[Rating]) -> Table:
    """Ratings as the terminal has them."""
    numbers = (Column(name, no_wrap=True) for name in ("Elo", "95 %", "wins", "95 %", "games"))
    shown = Table(Column("player", overflow="fold"), *numbers)  # of a long name lines are made, not of numbers
    for rating in ratings:
        elo, wins = rating.elo, rating.win_rate
        of_elo, of_wins = f"{elo.low:+.0f} to {elo.high:+.0f}", f"{wins.low:.0%} to {wins.high:.0%}"
        shown.add_row(Text(rating.player), f"{elo.value:+.0f}", of_elo, f"{wins.value:.0%}", of_wins, str(rating.games))
    return shown


def table(report: Mapping[str, Any]) -> Table:
    """The report as the terminal has it."""
    reference, *others = report["players"]
    specs = list(others[0]["judges"]) if others else []
    shown = Table("label", "player", *(f"wins by {spec}" for spec in specs), "KL", "per token", "tokens", "ended")
    shown.caption = "\n".join(map(_agreed, report.get("agreements", ()))) or None
    for row in report["players"]:
        rates = (row["judges"][spec] if "judges" in row else None for spec in specs)
        wins = ("{win_rate:.1%} ({low:.1%} to {high:.1%})".format(**rate) if rate else "" for rate in rates)
        far = f"{row['kl']:.2f} ± {row['kl_error']:.2f}" if "kl" in row else ""
        far = f"at most {row['kl_at_most']:.2f}" if "kl_at_most" in row else far
        per_token = f"{row['kl_per_token']:.3f}" if "kl" in row else ""
        lengths = f"{row['answer_tokens']:.1f}", f"{row['answers_ended']:.0%}"
        shown.add_row(Text(row["label"]), Text(row["player"]), *wins, far, per_token, *lengths)
    return shown


def _agreed(found: Mapping[str, Any]) -> str:
    one, other = found["judges"]
    kappa = "undefined" if found["kappa"] is None else f"{found['kappa']:.2f}"
    return f"{one} and {other} say the same of {found['share']['value']:.0%} of all answers, Cohen's kappa {kappa}"


def divergence(
    policy: Loaded, reference: Loaded, prompts: Ids, found: Sequence[Answer], *, batch_size: int
) -> Divergence:
    """Over answers that the policy drew at temperature 1, without a filter: the sum of log-probabilities under it, less
    those under the reference, of each answer's tokens, its stop token among them.
    """
    tokens = [answer.tokens for answer in found]
    each = [answer_logps(one.model, one.params, prompts, tokens, batch_size=batch_size) for one in (policy, reference)]
    ratios, lengths = each[0] - each[1], np.array([len(ids) for ids in tokens])
    error = ratios.std(ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return Divergence(float(ratios.mean()), float(error), float(ratios.sum() / lengths.sum()))


def answer_logps(model: Model, params: Tree, prompts: Ids, found: Ids, *, batch_size: int) -> np.ndarray:
    """[n] float64: log-probability of each answer's ids after its prompt, summed, at temperature 1.

    Neither the batch size nor the neighbours change a number.
    """
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, found, strict=True)]
    sums = np.empty(len(sequences))
    for rows in by_length(sequences, batch_size):
        starts_B = np.ones_like(rows.lengths_B)
        starts_B[: len(rows.numbers)] = [len(prompts[number]) for number in rows.numbers]
        found_B = np.asarray(_summed(model, params, rows.tokens_BT, starts_B, rows.lengths_B))
        sums[rows.numbers] = found_B[: len(rows.numbers)]
    return sums


def spoken(tokenizer: Tokenizer, answer: Answer) -> str:
    """The text of an answer, without its stop token."""
    return tokenizer.decode(token for token in answer.tokens if token not in tokenizer.stop_ids)


def points(report: Mapping[str, Any]) -> dict[str, list[Point]]:
    """Win rate by the first judge against divergence, for ``figures.scatter``: the players of each label.

    Of the best of N, its divergence is what it is at most.
    """
    found: dict[str, list[Point]] = {}
    for row in report["players"][1:]:
        verdict = next(iter(row["judges"].values()))
        x, error = (row["kl"], row["kl_error"]) if "kl" in row else (row["kl_at_most"], 0.0)
        y = (verdict[name] for name in ("win_rate", "low", "high"))
        found.setdefault(row["label"], []).append(Point(x, *y, error or 0.0))
    return found


@partial(jax.jit, static_argnums=0)
def _summed(model, params, tokens_BT, starts_B, lengths_B):
    """[B]: log-probabilities of the tokens from ``starts_B`` to ``lengths_B``, each after those before it."""
    tokens_BT, starts_B, lengths_B = place(tokens_BT, "bt"), place(starts_B, "b"), place(lengths_B, "b")
    logp_BT, _, _ = model.score(params, model.hidden(params, tokens_BT), jnp.roll(tokens_BT, -1, axis=1))
    next_1T = 1 + jnp.arange(tokens_BT.shape[1])[None, :]
    mask_BT = (next_1T >= starts_B[:, None]) & (next_1T < lengths_B[:, None])
    return place(jnp.sum(jnp.where(mask_BT, logp_BT, 0.0), axis=1), ".")  # whole on each of several processes


def _loaded(saved: workdir.Saved) -> Loaded:
    return Loaded(*policy(saved.model, saved.params()), saved.tokenizer)


def _asked(saved: Mapping[Player, workdir.Saved], prompts: Sequence[Conversation], length: int) -> Asked:
    (first, one), *others = saved.items()
    for each, other in others:
        if other.tokenizer.fingerprint != one.tokenizer.fingerprint:
            raise ValueError(
                f"{first} and {each} have different tokenizers: only answers of one tokenizer are compared"
            )
    context = min(workdir.config(each.run)["data"]["sequence_length"] for each in saved)
    ids = [chat.prompt(prompt, one.tokenizer) for prompt in prompts]
    fit = [number for number, prompt in enumerate(ids) if len(prompt) + length <= context]
    if len(fit) < 2:
        raise ValueError(
            f"{len(fit)} of {len(ids)} prompts leave room for {length} tokens in a context of {context}, and two are "
            "needed: lower --max_new_tokens, or ask shorter questions"
        )
    return Asked([prompts[number] for number in fit], [ids[number] for number in fit], len(ids) - len(fit))


def _played(policy: Loaded, reference: Loaded, asked: Asked, sampling: Sampling) -> tuple[list[Answer], Divergence]:
    """A player's answers, and how far it is from the reference."""
    given = own = sampling.answers(policy, asked.ids)
    if sampling.sampler != PLAIN:  # what is drawn so is not the policy's own
        own = dataclasses.replace(sampling, sampler=PLAIN).answers(policy, asked.ids)
    return given, divergence(policy, reference, asked.ids, own, batch_size=sampling.batch_size)


def _best(reference: Loaded, asked: Asked, sampling: Sampling, count: int, by: Judge) -> list[Answer]:
    """The best of so many answers of the reference to each prompt, none of which it plays with itself."""
    drawn = [sampling.answers(reference, asked.ids, number) for number in range(1, count + 1)]
    several = list(zip(*drawn, strict=True))
    texts = [[spoken(reference.tokenizer, answer) for answer in each] for each in several]
    worth, _ = judging.points(by, asked.prompts, texts)
    return [each[int(np.argmax(points))] for each, points in zip(several, worth, strict=True)]


def _lengths(found: Sequence[Answer], texts: Sequence[str]) -> dict[str, float]:
    return {
        "answer_tokens": fmean(len(answer.tokens) for answer in found),
        "answer_characters": fmean(map(len, texts)),
        "answers_ended": fmean(answer.ended for answer in found),
    }


def _judged(rows: list[dict], texts: Mapping[str, list[str]], prompts, judges: Mapping[str, Judge]) -> dict[str, Any]:
    """The rows with what each judge says of them against the first, and how far the judges agree on all of it."""
    reference, *others = rows
    said: dict[str, list[np.ndarray]] = {spec: [] for spec in judges}
    for row in others:
        row["judges"] = {}
        for spec, judge in judges.items():
            judgement = judge(prompts, texts[row["player"]], texts[reference["player"]])
            said[spec].append(judgement.wins)
            rate = win_rate(judgement.wins)
            row["judges"][spec] = {"win_rate": rate.value, "low": rate.low, "high": rate.high, **judgement.report}
    agreements = [
        {"judges": [one, other], "share": found.share._asdict(), "kappa": found.kappa, "count": found.count}
        for one, other in combinations(judges, 2)
        for found in [agreement(np.concatenate(said[one]), np.concatenate(said[other]))]
    ]
    return {"players": rows} | ({"agreements": agreements} if agreements else {})
