import itertools
import math
import random

import numpy as np
import pytest

from jaxllm.evaluate.measures import (
    Difference,
    Measure,
    bootstrap,
    compared,
    mcnemar,
    mean,
    measured,
    pass_at_k,
    permutation,
    plain,
    powers,
    ratio,
    share,
    summed,
)
from jaxllm.evaluate.ranking import wilson

ITEMS = [{"right": float(number % 3 == 0), "length": float(number), "bytes": 2.0} for number in range(20)]


def of(name, values):
    return [{name: value} for value in values]


# ---- pass@k ----


@pytest.mark.parametrize(
    "samples, right, k, expected", [(4, 1, 4, 1.0), (4, 1, 1, 0.25), (4, 0, 4, 0.0), (4, 4, 1, 1.0)]
)
def test_pass_at_k_at_its_ends(samples, right, k, expected):
    assert pass_at_k(samples, right, k) == expected


def test_pass_at_k_is_the_closed_form():
    for samples, right, k in [(200, 10, 10), (200, 1, 100), (16, 5, 4), (10, 7, 3), (10, 8, 3)]:
        closed = 1 - math.comb(samples - right, k) / math.comb(samples, k)
        assert abs(pass_at_k(samples, right, k) - closed) <= 1e-12


def test_pass_at_k_is_unbiased_where_one_less_the_power_of_failures_is_not():
    """By all outcomes of n samples of which each is right with probability p."""
    p, samples, k = 0.3, 6, 4
    outcomes = list(itertools.product((0, 1), repeat=samples))
    chance = [math.prod(p if each else 1 - p for each in outcome) for outcome in outcomes]
    expected = sum(c * pass_at_k(samples, sum(outcome), k) for c, outcome in zip(chance, outcomes, strict=True))
    biased = sum(c * (1 - (1 - sum(o) / samples) ** k) for c, o in zip(chance, outcomes, strict=True))
    assert expected == pytest.approx(1 - (1 - p) ** k) and biased < expected - 0.03


@pytest.mark.parametrize("samples, right, k", [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)])
def test_what_pass_at_k_cannot_be_of_is_refused(samples, right, k):
    with pytest.raises(ValueError, match=f"k={k}, right={right} of samples={samples}"):
        pass_at_k(samples, right, k)


def test_k_goes_up_in_powers_of_two():
    assert [powers(samples) for samples in (1, 2, 7, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]


# ---- measures ----


def test_a_share_has_wilsons_interval():
    found = measured(share("right"), ITEMS)
    assert found == Measure(*wilson(7, 20), 20)


def test_a_metric_counts_only_the_items_that_have_its_scores():
    assert measured(share("right"), [{}, {"right": 1.0}, {"other": 0.0}]).count == 1
    assert measured(ratio("r", "length", "bytes"), [{"length": 1.0}, {"length": 3.0, "bytes": 2.0}])[0] == 1.5
    found = measured(mean("right"), [{}, {}])
    assert found.count == 0 and all(map(math.isnan, found[:3]))


def test_the_bootstrap_of_a_mean_is_as_wide_as_theory_has_it():
    values = np.random.default_rng(3).normal(2.0, 1.5, 400)
    found = measured(mean("x"), of("x", values))
    reach = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.value - found.low, found.high - found.value) == pytest.approx((reach, reach), rel=0.12)


def test_a_ratio_is_of_sums_and_its_interval_draws_whole_items():
    items = [{"a": float(number), "b": float(number**2 + 1)} for number in range(1, 40)]
    found = measured(ratio("r", "a", "b", then=lambda x: 2 * x), items)
    total = 2 * sum(item["a"] for item in items) / sum(item["b"] for item in items)
    assert found.value == pytest.approx(total) and found.low < total < found.high
    draw = random.Random(0)
    drawn = []
    for _ in range(2000):
        some = draw.choices(items, k=len(items))
        drawn.append(2 * sum(item["a"] for item in some) / sum(item["b"] for item in some))
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.05)


def test_intervals_are_the_same_at_every_call_and_a_single_item_has_none():
    assert measured(mean("length"), ITEMS) == measured(mean("length"), ITEMS)
    alone = measured(mean("length"), ITEMS[3:4])
    assert alone.value == 3.0 and math.isnan(alone.low) and math.isnan(alone.high) and alone.count == 1


def test_no_bytes_is_no_number():
    found = measured(ratio("r", "length", "bytes"), [{"length": 1.0, "bytes": 0.0}] * 3)
    assert not math.isfinite(found.value) and plain(found)["value"] is None


# ---- differences ----


@pytest.mark.parametrize("wins, losses, both", [(0, 0, 5), (1, 0, 3), (8, 1, 4), (3, 9, 0), (5, 5, 2)])
def test_mcnemar_is_the_two_sided_sign_test_of_the_items_that_differ(wins, losses, both):
    first, second = [1] * wins + [0] * losses + [1] * both, [0] * wins + [1] * losses + [1] * both
    count = wins + losses
    odds = [math.comb(count, each) / 2**count for each in range(count + 1)]
    expected = sum(each for number, each in enumerate(odds) if abs(number - count / 2) >= abs(wins - count / 2))
    metric = share("x")
    assert mcnemar(metric, np.array([first]).T, np.array([second]).T) == pytest.approx(expected)
    found = compared(metric, of("x", first), of("x", second))
    assert found.p_value == pytest.approx(expected) and found.test == "mcnemar"
    assert found.difference == pytest.approx((wins - losses) / len(first))


def test_the_permutation_of_a_mean_is_the_sign_flip_test():
    draw = np.random.default_rng(1)
    first, second = draw.normal(0.4, 1, 10), draw.normal(0, 1, 10)
    gaps = first - second
    flips = np.array(list(itertools.product((1, -1), repeat=10)))
    exact = np.mean(np.abs(flips @ gaps) >= abs(gaps.sum()) - 1e-9)
    found = permutation(mean("x"), first[:, None], second[:, None])
    assert found == pytest.approx(exact, abs=0.02) and 0.01 < exact < 0.9


def test_a_permutation_of_a_ratio_lets_items_change_sides_whole():
    draw = np.random.default_rng(2)
    one = [{"a": float(a), "b": float(b)} for a, b in draw.uniform(1, 4, (8, 2))]
    other = [{"a": float(a) * 1.3, "b": float(b)} for a, b in draw.uniform(1, 4, (8, 2))]

    def apart(swaps):
        sides = [(y, x) if swap else (x, y) for x, y, swap in zip(one, other, swaps, strict=True)]
        totals = [
            sum(each["a"] for each in side) / sum(each["b"] for each in side) for side in zip(*sides, strict=True)
        ]
        return abs(totals[0] - totals[1])

    seen = apart([0] * 8)
    exact = np.mean([apart(swaps) >= seen - 1e-9 for swaps in itertools.product((0, 1), repeat=8)])
    assert compared(ratio("r", "a", "b"), one, other).p_value == pytest.approx(exact, abs=0.02)


def test_the_interval_of_a_difference_is_that_of_paired_items():
    """What both runs share cancels: an interval of two separate means would be a hundred times as wide."""
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 100, 50)
    found = compared(mean("x"), of("x", hard + draw.normal(1, 0.5, 50)), of("x", hard))
    assert 0.8 < found.low < found.difference < found.high < 1.25 and found.p_value < 0.01


def test_only_items_that_both_have_are_compared_in_their_order():
    found = compared(share("x"), [{"x": 1.0}, {}, {"x": 1.0}], [{"x": 0.0}, {"x": 1.0}, {"x": 1.0}])
    assert (found.first, found.second, found.count) == (1.0, 0.5, 2)
    other = compared(share("x"), [{"x": 1.0}, {"x": 1.0}], [{"x": 0.0}, {}])
    assert (other.first, other.second, other.count) == (1.0, 0.0, 1)
    none = compared(mean("x"), [{}], [{"x": 1.0}])
    assert none.count == 0 and math.isnan(none.p_value)
    with pytest.raises(ValueError, match="longer"):
        compared(mean("x"), [{}], [{}, {}])


def test_equal_runs_do_not_differ():
    found = compared(mean("length"), ITEMS, ITEMS)
    assert found == Difference(9.5, 9.5, 0.0, 0.0, 0.0, 1.0, 20, "permutation")


@pytest.mark.parametrize("metric", [mean("x"), share("x")])
def test_of_a_difference_that_is_no_number_no_chance_is_known(metric):
    found = compared(metric, of("x", [1.0, math.nan, 0.0]), of("x", [0.0, 1.0, 0.0]))
    assert math.isnan(found.difference) and math.isnan(found.p_value) and plain(found)["p_value"] is None


def test_a_metric_of_vectors_is_a_function_of_their_sum():
    metric = summed("x", "v", lambda sums: sums[0] * sums[1])
    assert measured(metric, [{"v": [1, 2]}, {"v": [3, 4]}]).value == 24
    assert bootstrap(metric, np.ones((3, 2))) == (9, 9, 9)


def test_plain_numbers_are_json():
    found = plain({"a": Measure(1.0, math.nan, math.inf, 3), "b": (1.5, [math.nan]), "c": "x"})
    assert found == {"a": {"value": 1.0, "low": None, "high": None, "count": 3}, "b": [1.5, [None]], "c": "x"}
