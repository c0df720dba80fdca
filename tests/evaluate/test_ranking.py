import math
import random
from statistics import NormalDist

import numpy as np
import pytest

from jaxllm.evaluate.ranking import (
    ELO,
    Game,
    Interval,
    agreement,
    bradley_terry,
    calibration,
    calibration_error,
    islands,
    wilson,
    win_rate,
)

Z = NormalDist().inv_cdf(0.975)


def games(*results):
    """("a", "b", wins of a, wins of b, ties) -> single games."""
    return [
        Game(first, second, outcome)
        for first, second, *counts in results
        for outcome, count in zip((1, 0, 0.5), counts, strict=False)
        for _ in range(count)
    ]


def strengths(played, **how):
    return {rating.player: rating.strength.value for rating in bradley_terry(played, resamples=1, **how)}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- win rates ----


@pytest.mark.parametrize(
    "wins, count, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(wins, count, low, high):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    assert wilson(wins, count) == pytest.approx((wins / count, low, high), abs=5e-5)
    assert wilson(count - wins, count) == pytest.approx((1 - wins / count, 1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("wins, count", [(3, 8), (0.5, 1), (190.5, 200), (0, 4), (4, 4)])
def test_at_the_ends_of_wilsons_interval_the_rate_is_a_quantile_away(wins, count, confidence):
    rate, *ends = wilson(wins, count, confidence=confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for end in ends:
        assert abs(rate - end) == pytest.approx(z * math.sqrt(end * (1 - end) / count), abs=1e-9)
    assert 0 <= ends[0] <= rate <= ends[1] <= 1 and ends[0] < ends[1]


def test_an_end_never_leaves_the_possible_rates_by_rounding():
    for count in range(1, 400):
        assert wilson(0, count).low == 0 and wilson(count, count).high == 1


def test_wilsons_interval_covers_as_often_as_it_says():
    """Over all outcomes of 40 games, averaged over the rates that one may have."""
    count, covered = 40, []
    for rate in np.linspace(0.01, 0.99, 99):
        chances = [math.comb(count, wins) * rate**wins * (1 - rate) ** (count - wins) for wins in range(count + 1)]
        inside = [low <= rate <= high for _, low, high in (wilson(wins, count) for wins in range(count + 1))]
        covered.append(np.dot(chances, inside))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.005)


def test_a_tie_is_half_a_win():
    assert win_rate([1, 0.5, 0, 0.5]) == wilson(2, 4)
    assert win_rate([0.5] * 9).value == 0.5
    assert win_rate([1, 0], confidence=0.5) == wilson(1, 2, confidence=0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wilson(0, 0), "wins=0 of count=0: give one game or more"),
        (lambda: wilson(3, 2), "wins=3 of count=2"),
        (lambda: wilson(-1, 2), "wins=-1 of count=2"),
        (lambda: wilson(1, 2, confidence=95), "confidence=95 must lie between 0 and 1, such as 0.95"),
        (lambda: win_rate([1, 0.7]), r"outcomes \[0.7\] are neither 1 \(won\), 0 \(lost\) nor 0.5"),
        (lambda: win_rate([math.nan]), r"outcomes \[nan\]"),
        (lambda: win_rate([]), "give one game or more"),
    ],
)
def test_what_is_no_win_rate_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- strengths ----


@pytest.mark.parametrize("won, lost", [(7, 3), (1, 40), (5, 5)])
def test_two_players_lie_apart_by_the_logarithm_of_their_odds(won, lost):
    found = strengths(games(("a", "b", won, lost)), prior=1e-9)
    assert found["a"] - found["b"] == pytest.approx(math.log(won / lost), abs=1e-6)
    found = strengths(games(("a", "b", won, lost)))
    assert found["a"] == pytest.approx(-found["b"], abs=1e-9)


def test_odds_of_ten_to_one_are_four_hundred_points_of_elo():
    first, second = bradley_terry(games(("a", "b", 10, 1)), prior=1e-9, resamples=20)
    assert (first.player, second.player) == ("a", "b")
    assert first.elo.value - second.elo.value == pytest.approx(400, abs=1e-4)
    assert first.elo == tuple(400 / math.log(10) * value for value in first.strength) and ELO == pytest.approx(173.7178)


def by_minorisation(played, prior, rounds=20_000):
    """Hunter 2004, equation 3, in loops over odds; the imagined player's stay 1."""
    players = sorted({name for game in played for name in game[:2]})
    odds = dict.fromkeys(players, 1.0)
    for _ in range(rounds):
        new = {}
        for player in players:
            wins, weight = prior / 2, prior / (odds[player] + 1)
            for first, second, outcome, _ in played:
                if player in (first, second):
                    wins += outcome if player == first else 1 - outcome
                    weight += 1 / (odds[first] + odds[second])
            new[player] = wins / weight
        done = max(abs(math.log(new[player] / odds[player])) for player in players) < 1e-11
        odds = new
        if done:
            break
    return {player: math.log(value) for player, value in odds.items()}


@pytest.mark.parametrize("prior", [0.1, 1.0, 3.0])
def test_strengths_are_those_of_hunters_iteration(prior):
    draw = random.Random(int(prior * 10))
    played = [Game(*draw.sample("abcde", 2), draw.choice([0, 0.5, 1])) for _ in range(40)]
    assert strengths(played, prior=prior) == pytest.approx(by_minorisation(played, prior), abs=1e-7)


LADDER = [(name, other, 1000, 0) for name, other in zip("abcdef", "bcdefg", strict=True)]
# Unequal numbers of games, at which whole steps of Newton's go astray.
UNEQUAL = [("a", "b", 359, 0), ("a", "e", 72, 0), ("c", "b", 86, 0), ("d", "c", 2, 0), ("e", "d", 193, 0)]


@pytest.mark.parametrize("results, prior", [(LADDER, 1e-3), (UNEQUAL, 0.01)])
def test_strengths_are_a_stationary_point_however_one_sided_the_games_are(results, prior):
    found = strengths(games(*results), prior=prior)
    for player, strength in found.items():
        slope = prior * (0.5 - sigmoid(strength))
        for first, second, won, lost in results:
            difference = won - (won + lost) * sigmoid(found[first] - found[second])
            slope += difference if player == first else -difference if player == second else 0
        assert slope == pytest.approx(0, abs=1e-6)


def test_a_tie_is_half_a_win_and_half_a_loss_and_the_sides_do_not_matter():
    plain = games(("a", "b", 3, 1, 2), ("b", "c", 2, 2))
    halves = games(("a", "b", 4, 2), ("b", "c", 2, 2))
    assert strengths(plain) == pytest.approx(strengths(halves))
    turned = [Game(second, first, 1 - outcome) for first, second, outcome, _ in reversed(plain)]
    assert strengths(turned) == pytest.approx(strengths(plain))


def test_the_prior_is_a_drawn_game_with_an_average_player():
    played = games(("a", "b", 4, 0))
    real = strengths(played + games(("a", "average", 0, 0, 2), ("b", "average", 0, 0, 2)), prior=1e-9)
    for player in "ab":
        assert strengths(played, prior=2.0)[player] == pytest.approx(real[player] - real["average"], abs=1e-6)
    assert 0 < strengths(played, prior=1.0)["a"] < strengths(played, prior=0.1)["a"] < 10


def test_games_and_win_rates_count_every_game_of_a_player():
    found = {rating.player: rating for rating in bradley_terry(games(("a", "b", 3, 1, 2), ("c", "a", 4, 0)))}
    assert {name: rating.games for name, rating in found.items()} == {"a": 10, "b": 6, "c": 4}
    assert (found["a"].win_rate, found["b"].win_rate) == (wilson(4, 10), wilson(2, 6))
    assert found["c"].win_rate == wilson(4, 4) and math.isfinite(found["c"].strength.high)


def test_groups_that_no_game_links_are_found_and_each_stands_around_the_average():
    played = games(("a", "b", 3, 1), ("x", "y", 1, 3), ("y", "z", 1, 1))
    assert islands(played) == [{"x", "y", "z"}, {"a", "b"}]
    assert islands([*played, Game("a", "z", 0.5)]) == [set("abxyz")]
    found = strengths(played)
    assert found["a"] == pytest.approx(-found["b"]) and found["a"] > 0 > found["x"]


def test_bootstrap_intervals_are_those_of_drawing_the_games_again():
    """Two players: the difference in strength follows the number of wins, a binomial number."""
    won, count = 140, 200
    first, second = bradley_terry(games(("a", "b", won, count - won)), resamples=4000)
    ends = [strengths(games(("a", "b", n, count - n)))["a"] for n in (binomial_quantile(count, won / count, q)
            for q in (0.025, 0.975))]  # fmt: skip
    assert first.strength[1:] == pytest.approx(ends, abs=0.02)
    assert second.strength == pytest.approx((-first.strength[0], -first.strength[2], -first.strength[1]))
    narrow = bradley_terry(games(("a", "b", won, count - won)), resamples=4000, confidence=0.5)[0].strength
    assert first.strength.low < narrow.low < narrow.value < narrow.high < first.strength.high


def binomial_quantile(count, rate, share):
    below = 0.0
    for wins in range(count + 1):
        below += math.comb(count, wins) * rate**wins * (1 - rate) ** (count - wins)
        if below >= share:
            return wins


def test_games_of_one_block_are_drawn_together():
    """Each game four times over says no more than once: the intervals must not shrink."""
    single = games(("a", "b", 30, 20))
    copied = [game._replace(block=number) for number, game in enumerate(single) for _ in range(4)]
    width = lambda played: np.ptp(bradley_terry(played, prior=1e-6, resamples=2000)[0].strength[1:])  # noqa: E731
    assert width(copied) == pytest.approx(width(single), rel=0.02)
    assert width([game._replace(block=None) for game in copied]) < 0.6 * width(single)
    assert width([game._replace(block=0) for game in copied]) == pytest.approx(0, abs=1e-6)


def test_planted_strengths_lie_in_their_intervals():
    draw, planted = np.random.default_rng(0), dict(zip("abcd", (1.0, 0.3, -0.3, -1.0), strict=True))
    inside = 0
    for repeat in range(20):
        pairs = [draw.permutation(list("abcd"))[:2] for _ in range(300)]
        played = [Game(i, j, float(draw.random() < sigmoid(planted[i] - planted[j]))) for i, j in pairs]
        found = bradley_terry(played, resamples=200, seed=repeat)
        inside += sum(low <= planted[rating.player] <= high for rating in found for _, low, high in [rating.strength])
    assert 68 <= inside <= 80  # 95 % of 80, less four standard deviations


def test_the_seed_decides_the_intervals_and_nothing_else():
    played = games(("a", "b", 5, 3))
    again = [bradley_terry(played, resamples=50, seed=seed) for seed in (0, 0, 1)]
    assert again[0] == again[1] != again[2]
    assert [rating.strength.value for rating in again[0]] == [rating.strength.value for rating in again[2]]


@pytest.mark.parametrize(
    "played, how, message",
    [
        ([], {}, "no game to rank by"),
        ([Game("a", "a", 1)], {}, "'a' plays against itself"),
        ([Game("a", "b", 2)], {}, r"outcomes \[2.0\] are neither"),
        ([Game("a", "b", 1)], dict(prior=0), "prior=0 must be positive and finite"),
        ([Game("a", "b", 1)], dict(confidence=1.0), "confidence=1.0 must lie between 0 and 1"),
        ([Game("a", "b", 1)], dict(resamples=0), "resamples=0 must be at least 1"),
    ],
)
def test_what_cannot_be_ranked_is_refused(played, how, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(played, **how)


# ---- agreement ----


def test_kappa_is_that_of_cohens_table():
    """Both yes 20, both no 15, only the first yes 5, only the second 10: share 0.7, chance 0.5, kappa 0.4."""
    first = [1] * 20 + [0] * 15 + [1] * 5 + [0] * 10
    second = [1] * 20 + [0] * 15 + [0] * 5 + [1] * 10
    found = agreement(first, second)
    assert found.share == wilson(35, 50) and found.count == 50
    assert found.kappa == pytest.approx(0.4) and agreement(second, first).kappa == pytest.approx(0.4)


def test_ties_are_a_verdict_of_their_own():
    assert agreement([1, 0.5, 0], [1, 0.5, 0])[1:] == (1.0, 3)
    # by hand: 2 of 4 alike; chance 1/2 * 1/4 + 1/4 * 1/2 + 1/4 * 1/4
    assert agreement([1, 1, 0.5, 0], [1, 0.5, 0.5, 1]).kappa == pytest.approx((0.5 - 0.375) / (1 - 0.375))


def test_judges_who_never_differ_leave_nothing_to_chance_and_unlike_numbers_are_refused():
    assert math.isnan(agreement([1, 1], [1, 1]).kappa)
    with pytest.raises(ValueError, match="as many verdicts, not 2 and 1"):
        agreement([1, 0], [1])


# ---- calibration ----


def test_bins_hold_equal_numbers_of_pairs_in_order_of_confidence():
    bins = calibration([-2.0, 1.0, 0.0, 3.0, -0.5], bins=2)
    assert [each.count for each in bins] == [3, 2]
    assert [each.predicted for each in bins] == pytest.approx(
        [(sigmoid(0) + sigmoid(0.5) + sigmoid(1)) / 3, (sigmoid(2) + sigmoid(3)) / 2]
    )
    assert [each.observed for each in bins] == [wilson(1.5, 3), wilson(1, 2)]
    error = (3 * abs(bins[0].predicted - 0.5) + 2 * abs(bins[1].predicted - 0.5)) / 5
    assert calibration_error(bins) == pytest.approx(error)
    assert len(calibration([1.0, -1.0], bins=10)) == 2


def test_a_calibrated_model_lies_on_the_diagonal_and_one_that_is_too_sure_below_it():
    draw = np.random.default_rng(0)
    size = np.abs(draw.normal(0, 2, 20_000))
    right = draw.random(len(size)) < 1 / (1 + np.exp(-size))
    margins = np.where(right, size, -size)
    honest, proud = calibration(margins), calibration(3 * margins)
    assert all(each.observed.low - 0.01 <= each.predicted <= each.observed.high + 0.01 for each in honest)
    assert calibration_error(honest) < 0.01 < 0.1 < calibration_error(proud)
    assert all(each.observed.high < each.predicted for each in proud[2:8])


@pytest.mark.parametrize("margins, bins", [([], 3), ([1.0], 0), ([math.inf], 1)])
def test_what_cannot_be_binned_is_refused(margins, bins):
    with pytest.raises(ValueError, match="give finite margins, and one bin or more"):
        calibration(margins, bins=bins)


def test_an_interval_is_a_value_between_its_ends():
    assert Interval(0.5, 0.4, 0.6)._fields == ("value", "low", "high")
