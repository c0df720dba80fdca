"""Numbers of comparisons: win rates and how sure they are, strengths of many players, agreement, calibration.

An outcome is the first's share of a win: 1 where the first is better, 0 where the second is, 0.5 for a tie.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

ELO = 400 / math.log(10)  # points of Elo's scale in a nat: odds of 10 to 1 are 400
NEAR = 1e-12  # nats of log-likelihood that the last step of a fit may still have had to gain
RESAMPLES = 1000


class Interval(NamedTuple):
    """A value between the ends of its interval of confidence."""

    value: float
    low: float
    high: float


class Game(NamedTuple):
    """One comparison. block: what games that are not independent share, such as their prompt; None: its own."""

    first: str
    second: str
    outcome: float
    block: Hashable = None


class Rating(NamedTuple):
    """A player's place. strength: in nats, 0 is the average player's. win_rate: over all of its games."""

    player: str
    strength: Interval
    win_rate: Interval
    games: int

    @property
    def elo(self) -> Interval:
        """The strength in Elo's points: 400 more make odds of 10 to 1."""
        return Interval(*(ELO * value for value in self.strength))


class Agreement(NamedTuple):
    """share: of the verdicts that are the same. kappa: Cohen's, NaN where chance alone would make all of them so."""

    share: Interval
    kappa: float
    count: int


class Bin(NamedTuple):
    """Pairs of like confidence. predicted: their mean probability of being right; observed: the share that is."""

    predicted: float
    observed: Interval
    count: int


def wilson(wins: float, count: int, *, confidence: float = 0.95) -> Interval:
    """wins / count and its score interval (Wilson 1927), which stays in [0, 1] and is not empty at its ends.

    A tie is half a win. The variance of outcomes with ties is less than that of wins and losses of the same mean, so
    that the interval is then wider than it need be. Raises ``ValueError`` where there is no game, or more wins than
    games.
    """
    if not 0 < count or not 0 <= wins <= count:
        raise ValueError(f"wins={wins} of count={count}: give one game or more, and from none to all of them won")
    z = _quantile(confidence)
    rate = wins / count
    centre, reach = rate + z**2 / (2 * count), z * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2)
    low, high = ((centre + sign * reach) / (1 + z**2 / count) for sign in (-1, 1))
    return Interval(rate, max(0.0, min(rate, low)), min(1.0, max(rate, high)))


def win_rate(outcomes: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The first's share of the wins with ``wilson``'s interval; ``ValueError`` for other numbers than 0, 0.5 and 1."""
    return wilson(float(np.sum(_outcomes(outcomes))), len(outcomes), confidence=confidence)


def won(margins: np.ndarray) -> np.ndarray:
    """1 where the margin is positive, 0 where it is negative, 0.5 where it is 0."""
    return (1 + np.sign(margins)) / 2


def bradley_terry(
    games: Sequence[Game],
    *,
    prior: float = 1.0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Rating]:
    """The players, strongest first: P(i beats j) = s(strength_i - strength_j), a tie being half a win and half a loss.

    Each player has ``prior`` further games, drawn, against an imagined one of strength 0. That makes every strength
    finite and unique: of who never lost, and of players whom no chain of games links (``islands``), who are compared
    with that imagined player alone. Intervals are percentiles over ``resamples`` bootstraps of the blocks of games.
    Source: Bradley and Terry 1952; the intervals as of Chiang et al. 2024, arXiv:2403.04132, section 4.

    Raises:
      ValueError: no game, a game against oneself, another outcome than 0, 0.5 or 1, ``prior`` that is not positive.
    """
    _check_games(games, prior, confidence, resamples)
    players = sorted({player for game in games for player in (game.first, game.second)})
    wins = _wins(games, players, [np.ones(len(games))])
    drawn = _strengths(_wins(games, players, _resampled(games, resamples, seed)), prior)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    strengths = (Interval(*map(float, ends)) for ends in zip(_strengths(wins, prior)[0], low, high, strict=True))
    won, played = wins[0].sum(axis=1), np.rint((wins[0] + wins[0].T).sum(axis=1)).astype(int).tolist()
    rates = (wilson(*of, confidence=confidence) for of in zip(won.tolist(), played, strict=True))
    ratings = map(Rating, players, strengths, rates, played)
    return sorted(ratings, key=lambda rating: (-rating.strength.value, rating.player))


def islands(games: Sequence[Game]) -> list[set[str]]:
    """The players in groups that games link: strengths of two groups say nothing of each other. Largest first."""
    groups: list[set[str]] = []
    for game in games:
        linked = {game.first, game.second}
        touched = [group for group in groups if group & linked]
        groups = [group for group in groups if not group & linked] + [linked.union(*touched)]
    return sorted(groups, key=lambda group: (-len(group), min(group)))


def agreement(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Agreement:
    """How often two judges of the same pairs say the same, and Cohen's kappa: how much of what chance leaves
    (1 - share) / (1 - chance) is taken away (Cohen 1960). Raises ``ValueError`` where their numbers differ.
    """
    first, second = _outcomes(first), _outcomes(second)
    if len(first) != len(second):
        raise ValueError(f"two judges of the same pairs give as many verdicts, not {len(first)} and {len(second)}")
    same = wilson(int(np.sum(first == second)), len(first), confidence=confidence)
    chance = float(sum(np.mean(first == verdict) * np.mean(second == verdict) for verdict in (0, 0.5, 1)))
    return Agreement(same, (same.value - chance) / (1 - chance) if chance < 1 else math.nan, len(first))


def calibration(margins: Sequence[float], *, bins: int = 10, confidence: float = 0.95) -> list[Bin]:
    """Whether s(margin), a reward model's probability that the chosen answer is the better one, is as often right.

    ``margins`` are rewards of the chosen less those of the rejected. Confidence is s(|margin|), being right a margin
    above 0 (0: half right); a bin holds as many pairs as any other, in the order of their confidence.
    """
    margins = np.asarray(margins, np.float64)
    if bins < 1 or not len(margins) or not np.isfinite(margins).all():
        raise ValueError(f"{len(margins)} margins in bins={bins}: give finite margins, and one bin or more")
    sure, right = _sigmoid(np.abs(margins)), won(margins)
    order = np.argsort(sure, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [
        Bin(float(sure[part].mean()), wilson(float(right[part].sum()), len(part), confidence=confidence), len(part))
        for part in parts
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of predicted from observed over the pairs (ECE: Guo et al. 2017, arXiv:1706.04599, equation 3)."""
    distances = [abs(each.predicted - each.observed.value) for each in bins]
    return float(np.average(distances, weights=[each.count for each in bins]))


def _strengths(wins: np.ndarray, prior: float) -> np.ndarray:
    """[R, players] of the most likely strengths, from [R, players, players] of wins of the row over the column.

    Newton's method. Its step of length d is cut to log(1 + d): the logistic function's third derivative is no larger
    than its second, and then every step goes up, from wherever it starts (Sun and Tran-Dinh 2019, arXiv:1703.04599,
    theorem 2, for nu = 2).
    """
    strengths, played = np.zeros(wins.shape[:2]), wins + wins.swapaxes(1, 2)
    diagonal = np.arange(wins.shape[1])
    for _ in range(1000):
        expected = _sigmoid(strengths[:, :, None] - strengths[:, None, :])
        alone = _sigmoid(strengths)
        slope = np.sum(wins - played * expected, axis=2) + prior * (0.5 - alone)
        curvature = -played * expected * (1 - expected)
        curvature[:, diagonal, diagonal] += prior * alone * (1 - alone) - curvature.sum(axis=2)
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        distance = 2 * np.abs(step).max(axis=1, keepdims=True)  # no two players part further in this step
        strengths = strengths + step * np.log1p(distance) / np.maximum(distance, 1e-300)
        if np.sum(slope * step, axis=1).max() < NEAR:
            return strengths
    raise ValueError(f"strengths are not found: raise prior={prior}")


def _wins(games: Sequence[Game], players: Sequence[str], weights: Iterable[np.ndarray]) -> np.ndarray:
    """[R, players, players]: wins of the row over the column, for each weighting [games] of ``weights``."""
    place, count = {player: number for number, player in enumerate(players)}, len(players)
    first, second = (np.array([place[player] for player in side]) for side in tuple(zip(*games, strict=True))[:2])
    outcomes = np.array([game.outcome for game in games], np.float64)
    # Both ways of each game, flat: its wins by the first over the second, and the other way round.
    cells = np.concatenate([first * count + second, second * count + first])
    shares = np.concatenate([outcomes, 1 - outcomes])
    size = count * count
    tables = [np.bincount(cells, shares * np.tile(weight, 2), minlength=size) for weight in weights]
    return np.stack(tables).reshape(-1, count, count)


def _resampled(games: Sequence[Game], resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each game is drawn, when as many blocks as there are are drawn with replacement."""
    keys = [("alone", number) if game.block is None else ("block", game.block) for number, game in enumerate(games)]
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    blocks, draw = np.array([number[key] for key in keys]), np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(draw.integers(len(number), size=len(number)), minlength=len(number))[blocks]


def _check_games(games: Sequence[Game], prior: float, confidence: float, resamples: int) -> None:
    _quantile(confidence)
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1: intervals are percentiles over them")
    if not games:
        raise ValueError("no game to rank by: compare two players at least once")
    if not 0 < prior < math.inf:
        raise ValueError(f"prior={prior} must be positive and finite: without it an unbeaten player has no strength")
    _outcomes([game.outcome for game in games])
    if alone := next((game for game in games if game.first == game.second), None):
        raise ValueError(f"{alone.first!r} plays against itself, which says nothing; leave the game out")


def _outcomes(values: Sequence[float]) -> np.ndarray:
    outcomes = np.asarray(values, np.float64)
    if wrong := sorted(set(outcomes.tolist()) - {0.0, 0.5, 1.0}):
        raise ValueError(f"outcomes {wrong[:5]} are neither 1 (won), 0 (lost) nor 0.5 (a tie)")
    return outcomes


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))
