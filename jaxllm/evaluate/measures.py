"""Numbers over items with their intervals, and whether two runs differ on the same items.

An item has scores; a metric is a function of their sums over the items. One mechanism then serves means, ratios and
corpus BLEU alike: items are drawn again for an interval, and change sides for a test.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.evaluate.ranking import RESAMPLES, Interval, wilson

Scores = Mapping[str, Any]  # of an item: name -> a number or a list of numbers; what it has none of is left out
SWAPS = 9999  # drawn ways of changing sides
_AT_ONCE = 200  # draws whose weights are in memory together
_CONFIDENCE = 0.95


class Metric(NamedTuple):
    """fields: the scores of an item that are summed. of: (sums [draws, numbers], items) -> [draws] values.

    interval: (metric, vectors [items, numbers]) -> Interval. test: (metric, vectors, the other run's) -> p-value; its
    name says which. unit: what one is one of, for tables.
    """

    name: str
    fields: tuple[str, ...]
    of: Callable[[np.ndarray, int], np.ndarray]
    interval: Callable[["Metric", np.ndarray], Interval]
    test: Callable[["Metric", np.ndarray, np.ndarray], float]


class Measure(NamedTuple):
    """A value over ``count`` items and its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float
    count: int


class Difference(NamedTuple):
    """The first run's value less the second's over the items that both have, its 95 % interval, and how likely so
    large a difference is by chance, by the named paired test; NaN where there is none.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    count: int
    test: str


def share(name: str) -> Metric:
    """Of the items whose score ``name`` is 1; others have 0. Interval: Wilson's; test: McNemar's, exact."""
    return Metric(name, (name,), _mean, _score_interval, mcnemar)


def mean(name: str) -> Metric:
    """Of the items' scores ``name``."""
    return Metric(name, (name,), _mean, bootstrap, permutation)


def ratio(name: str, above: str, below: str, *, then: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Metric:
    """``then`` of the sum of the scores ``above`` over that of ``below``."""

    def of(sums: np.ndarray, count: int) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return then(sums[:, 0] / sums[:, 1])

    return Metric(name, (above, below), of, bootstrap, permutation)


def summed(name: str, field: str, of: Callable[[np.ndarray], float]) -> Metric:
    """A function of the sum of the items' vectors ``field``."""
    return Metric(name, (field,), lambda sums, count: np.array([of(each) for each in sums]), bootstrap, permutation)


def measured(metric: Metric, items: Sequence[Scores]) -> Measure:
    """The metric over the items that have its scores."""
    vectors = _vectors(metric, [item for item in items if _has(metric, item)])
    if not len(vectors):
        return Measure(math.nan, math.nan, math.nan, 0)
    return Measure(*metric.interval(metric, vectors), len(vectors))


def compared(metric: Metric, first: Sequence[Scores], second: Sequence[Scores]) -> Difference:
    """Two runs on the same items in the same order; only items that have the metric's scores in both count."""
    pairs = [pair for pair in zip(first, second, strict=True) if all(_has(metric, item) for item in pair)]
    if not pairs:
        return Difference(*[math.nan] * 6, 0, metric.test.__name__)
    one, other = (_vectors(metric, side) for side in zip(*pairs, strict=True))
    values = [_value(metric, vectors) for vectors in (one, other)]
    drawn = [
        metric.of(weights @ one, len(one)) - metric.of(weights @ other, len(one)) for weights in _resampled(len(one))
    ]
    interval = _percentiles(values[0] - values[1], np.concatenate(drawn), len(one))
    # A NaN is no greater than another number: a test would find that chance never comes as far.
    p_value = metric.test(metric, one, other) if math.isfinite(values[0] - values[1]) else math.nan
    return Difference(*values, *interval, p_value, len(one), metric.test.__name__)


def bootstrap(metric: Metric, vectors: np.ndarray) -> Interval:
    """Percentiles over draws of as many items as there are (Efron 1979); no interval of a single item."""
    drawn = [metric.of(weights @ vectors, len(vectors)) for weights in _resampled(len(vectors))]
    return _percentiles(_value(metric, vectors), np.concatenate(drawn), len(vectors))


def permutation(metric: Metric, first: np.ndarray, second: np.ndarray) -> float:
    """How often the two differ at least as much when each item's pair changes sides at random, these included.

    Of a mean it is the sign-flip test; of what is no mean, approximate randomisation (Noreen 1989).
    """
    sums, gaps, draw = first.sum(axis=0), first - second, np.random.default_rng(0)
    seen = abs(_value(metric, first) - _value(metric, second))
    hits, count = 1, len(first)
    for start in range(0, SWAPS, _AT_ONCE):
        swaps = draw.integers(2, size=(min(_AT_ONCE, SWAPS - start), count)).astype(np.float64)
        moved = swaps @ gaps
        apart = np.abs(metric.of(sums - moved, count) - metric.of(second.sum(axis=0) + moved, count))
        hits += int(np.sum(apart >= seen * (1 - 1e-9) - 1e-12))
    return hits / (SWAPS + 1)


def mcnemar(metric: Metric, first: np.ndarray, second: np.ndarray) -> float:
    """Exact, two-sided (McNemar 1947): only items of which one run is right and the other wrong tell them apart."""
    wins, losses = int(np.sum(first > second)), int(np.sum(first < second))
    fewer, count = min(wins, losses), wins + losses
    tail = sum(math.comb(count, each) for each in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that of k completions, out of so many samples without replacement, one is right: 1 - C(n-c, k) /
    C(n, k), unbiased, as a product (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Raises ``ValueError`` where k is not from 1 to the number of samples, or more are right than there are.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"k={k}, right={right} of samples={samples}: k is from 1, right from 0 to the samples")
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / each for each in range(samples - right + 1, samples + 1))


def powers(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples: the k of pass@k."""
    return [1 << power for power in range(samples.bit_length())]


def plain(value: Any) -> Any:
    """The value as JSON can hold it: it has no number that is not finite, null stands for it."""
    if isinstance(value, Measure | Difference):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(sums: np.ndarray, count: int) -> np.ndarray:
    return sums[:, 0] / count


def _score_interval(metric: Metric, vectors: np.ndarray) -> Interval:
    return wilson(float(vectors.sum()), len(vectors))


def _value(metric: Metric, vectors: np.ndarray) -> float:
    return float(metric.of(vectors.sum(axis=0)[None], len(vectors))[0])


def _resampled(count: int) -> Iterator[np.ndarray]:
    """[draws, items]: how often each item is drawn, when as many as there are are drawn with replacement."""
    draw = np.random.default_rng(0)
    for start in range(0, RESAMPLES, _AT_ONCE):
        size = min(_AT_ONCE, RESAMPLES - start)
        yield draw.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)


def _percentiles(value: float, drawn: np.ndarray, count: int) -> Interval:
    if count < 2 or not np.isfinite(drawn).all():
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def _has(metric: Metric, item: Scores) -> bool:
    return all(field in item for field in metric.fields)


def _vectors(metric: Metric, items: Sequence[Scores]) -> np.ndarray:
    """[items, numbers] float64."""
    return np.array([np.concatenate([np.atleast_1d(item[field]) for field in metric.fields]) for item in items], float)
