"""Which of two answers to a prompt is better: by a rule, by a reward model, or by a language model that is asked.

A judge is a function of prompts, first answers and second answers; whoever uses one does not see which kind it is.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import workdir
from jaxllm.configure import nearest
from jaxllm.evaluate import rewarding
from jaxllm.evaluate.ranking import won
from jaxllm.evaluate.rows import by_length
from jaxllm.model import Model
from jaxllm.rewards.style import RULES
from jaxllm.sharding import place
from jaxllm.text import chat, verdicts
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree


class Judgement(NamedTuple):
    """Of n pairs. wins: [n], 1 where the first answer is better, 0 where the second is, 0.5 for a tie.

    scores: [n, 2] of both answers, where the judge scores each alone. report: what tells how far to trust the judge.
    ``ties`` is their share, ``longer_wins`` how many of the other pairs the answer of more characters wins, of those
    where one has more (NaN where none has).
    """

    wins: np.ndarray
    scores: np.ndarray | None
    report: dict[str, float]


Judge = Callable[[Sequence[Conversation], Sequence[str], Sequence[str]], Judgement]
Score = Callable[[Sequence[Conversation], Sequence[str]], np.ndarray]


def by_score(score: Score) -> Judge:
    """The answer of the higher score is better, equal ones tie. An answer that several pairs share is scored once.

    Raises ``ValueError`` for a score that is not finite.
    """

    def judge(prompts: Sequence[Conversation], firsts: Sequence[str], seconds: Sequence[str]) -> Judgement:
        _check(prompts, firsts, seconds)
        spelled = [repr(prompt) for prompt in prompts]
        shown = [*zip(spelled, firsts, strict=True), *zip(spelled, seconds, strict=True)]
        places = {each: place for place, each in enumerate(shown)}
        distinct = sorted(places.values())
        both = [*prompts, *prompts], [*firsts, *seconds]
        found = np.asarray(score(*([texts[place] for place in distinct] for texts in both)))
        if not np.isfinite(found).all():
            raise ValueError(f"a score is {found[~np.isfinite(found)][0]}: mend what scores, or leave the answer out")
        known = dict(zip(distinct, found.tolist(), strict=True))
        scores = np.array([known[places[each]] for each in shown]).reshape(2, -1).T
        wins = won(scores[:, 0] - scores[:, 1])
        return Judgement(wins, scores, _report(wins, firsts, seconds))

    return judge


def by_rule(name: str) -> Judge:
    """A rule of ``rewards``. Raises ``ValueError`` for an unknown one."""
    if name not in RULES:
        raise ValueError(f"rule:{name} is not a known judge{nearest(name, RULES)}")
    rule = RULES[name]
    return by_score(lambda prompts, answers: np.array([rule(*each, {}) for each in zip(prompts, answers, strict=True)]))


def prompted(model: Model, params: Tree, tokenizer: Tokenizer, *, batch_size: int = 16) -> Judge:
    """A language model, asked in the words of ``text.verdicts``: the letter that is likelier is its verdict.

    Every pair is shown in both orders, and a verdict that changes with the order is a tie. The report has
    ``consistency``, the share of pairs whose verdict does not; ``position_bias``, the share of verdicts for what was
    shown first less that for what was shown second, 0 without a bias; and ``letters``, the mean probability that it
    says a letter at all, little where it does not know what it is asked.
    """
    letters = [_letter(tokenizer, letter) for letter in (verdicts.FIRST, verdicts.SECOND)]
    log_probabilities = jax.jit(partial(_log_probabilities, model, np.array(letters, np.int32)))

    def judge(prompts: Sequence[Conversation], firsts: Sequence[str], seconds: Sequence[str]) -> Judgement:
        _check(prompts, firsts, seconds)
        shown = [*zip(prompts, firsts, seconds, strict=True), *zip(prompts, seconds, firsts, strict=True)]
        asked = [chat.prompt(verdicts.comparison(*each), tokenizer) for each in shown]
        logps = np.empty((len(asked), 2), np.float32)
        for rows in by_length(asked, batch_size):
            found = np.asarray(log_probabilities(params, rows.tokens_BT, rows.lengths_B))
            logps[rows.numbers] = found[: len(rows.numbers)]
        margins = logps[:, 0] - logps[:, 1]
        first, second = np.sign(margins).reshape(2, -1) * [[1], [-1]]  # for the first answer, in both orders
        wins = np.where(first == second, (1 + first) / 2, 0.5)
        report = {
            "consistency": float(np.mean((first == second) & (first != 0))),
            "position_bias": float(np.mean(np.sign(margins))),
            "letters": float(np.mean(np.sum(np.exp(logps), axis=1))),
        }
        return Judgement(wins, None, report | _report(wins, firsts, seconds))

    return judge


def load(spec: str) -> Judge:
    """The judge that is spelled ``rule:NAME``, ``reward:DIR[,DIR...]`` (reward models, whose mean counts) or
    ``model:DIR`` (a language model that is asked). Raises ``ValueError`` for another spelling, and as loading does.
    """
    kind, what = _parsed(spec)
    return KINDS[kind](what)


def identity(spec: str) -> str:
    """What tells this judge from all others: a rule's name, or which parameters lie in its directories now."""
    kind, what = _parsed(spec)
    return spec if kind == "rule" else json.dumps([kind, *(workdir.saved(each).identity for each in what.split(","))])


def points(
    judge: Judge, prompts: Sequence[Conversation], answers: Sequence[Sequence[str]]
) -> tuple[list[np.ndarray], Judgement]:
    """What each of several answers to each prompt is worth, and the judgement of all their pairs that it comes from.

    A judge's scores where it has them, else the share of the other answers that an answer is better than, a tie half.
    """
    pairs = [(n, *pair) for n, texts in enumerate(answers) for pair in _pairs(len(texts))]
    shown = zip(*((prompts[n], answers[n][i], answers[n][j]) for n, i, j in pairs), strict=True)
    judgement = judge(*map(list, shown))
    won = np.stack([judgement.wins, 1 - judgement.wins], axis=1) if judgement.scores is None else judgement.scores
    worth = [[[] for _ in texts] for texts in answers]
    for (n, i, j), (first, second) in zip(pairs, won.tolist(), strict=True):
        worth[n][i].append(first)
        worth[n][j].append(second)
    return [np.array([np.mean(each) for each in row]) for row in worth], judgement


def _pairs(count: int) -> list[tuple[int, int]]:
    """Every two of so many; one alone is compared with itself."""
    return list(itertools.combinations(range(count), 2)) or [(0, 0)]


def _by_reward(directories: str) -> Judge:
    score = rewarding.load(directories.split(","))
    return by_score(lambda prompts, answers: score(prompts, answers).mean)


KINDS: dict[str, Callable[[str], Judge]] = {
    "rule": by_rule,
    "reward": _by_reward,
    "model": lambda directory: prompted(*workdir.load(directory)),
}


def _parsed(spec: str) -> tuple[str, str]:
    kind, _, what = spec.partition(":")
    if kind not in KINDS or not what:
        spelled = "'rule:style', 'reward:DIR[,DIR...]' or 'model:DIR'"
        raise ValueError(f"{spec!r} is not the name of a judge: write {spelled}{nearest(kind, KINDS)}")
    return kind, what


def _check(prompts, firsts, seconds) -> None:
    counts = len(prompts), len(firsts), len(seconds)
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(f"{counts[0]} prompts, {counts[1]} first and {counts[2]} second answers: give as many of each")


def _report(wins: np.ndarray, firsts: Sequence[str], seconds: Sequence[str]) -> dict[str, float]:
    longer = np.array([np.sign(len(first) - len(second)) for first, second in zip(firsts, seconds, strict=True)])
    told = ((2 * wins - 1) * longer)[(wins != 0.5) & (longer != 0)]
    return {"ties": float(np.mean(wins == 0.5)), "longer_wins": float(np.mean(told > 0)) if len(told) else float("nan")}


def _letter(tokenizer: Tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(
            f"the tokenizer spells {letter!r} with {len(ids)} ids, and a verdict is one: use another judge"
        )
    return ids[0]


def _log_probabilities(model, letters, params, tokens_BT, lengths_B):
    """logp_B2 of each letter after the first ``lengths_B`` tokens. The head sees one position of each row."""
    tokens_BT, lengths_B = place(tokens_BT, "bt"), place(lengths_B, "b")
    last_B1D = jnp.take_along_axis(model.hidden(params, tokens_BT), lengths_B[:, None, None] - 1, axis=1)
    letters_B2 = jnp.zeros_like(tokens_BT[:, :2]) + letters[None, :]
    logp_B2, _, _ = model.score(params, jnp.concatenate([last_B1D, last_B1D], axis=1), letters_B2)
    return place(logp_B2, "..")  # whole on each of several processes
