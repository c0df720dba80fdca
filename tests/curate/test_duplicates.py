import itertools
import random

import numpy as np
import pytest

from jaxllm.curate import duplicates
from jaxllm.curate.duplicates import Exact, Near, bands, unedited

WORDS = [f"w{number}" for number in range(2000)]


def firsts(seen, texts):
    return [seen.before(number, text) for number, text in enumerate(texts)]


def test_exact_ones_are_told_by_what_they_say_and_the_first_stands_for_all():
    texts = ["A café.", "another", " a  CAFE\u0301.\n", "a cafe.", "A café."]
    assert firsts(Exact(), texts) == [None, None, 0, None, 0]


def edited(words, places):
    return [f"new{place}" if place in places else word for place, word in enumerate(words)]


def test_near_ones_are_those_of_which_few_words_differ():
    base = WORDS[:100]
    texts = [
        base,
        edited(base, {50}),  # 95 of 101 runs
        edited(base, {10, 40, 70}),  # 89 of 107
        edited(base, {10, 30, 50, 70}),  # 86 of 110: 0.78
        base[:95],
        base + WORDS[500:540],  # 98 of 138
        WORDS[600:700],
        edited(base, {10, 30}),  # 92 of 104, with the first as with the fourth
    ]
    assert firsts(Near(0.8), map(" ".join, texts)) == [None, 0, 0, None, 0, None, None, 0]
    assert firsts(Near(0.9), map(" ".join, texts)) == [None, 0, None, None, 0, None, None, None]
    assert firsts(Near(1.0), map(" ".join, texts)) == [None] * 8


def test_the_same_sentences_in_another_order_are_another_document():
    sentences = [f"Anna Adler {verb} a {thing}." for verb, thing in zip(WORDS[:6], WORDS[6:], strict=False)]
    texts = [" ".join(order) for order in (sentences, sentences[::-1], sentences)]
    assert firsts(Near(0.6), texts) == [None, None, 0]


def test_of_many_that_are_alike_the_first_kept_one_stands_for_all():
    base = WORDS[:200]
    texts = [" ".join(edited(base, {place})) for place in range(0, 200, 10)]
    assert firsts(Near(0.8), texts) == [None] + [0] * 19


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_few_pairs_at_the_threshold_are_no_candidates_and_fewer_bands_would_miss_more(similarity):
    def missed(count):
        return (1 - similarity ** (duplicates.LENGTH // count)) ** count

    count = bands(similarity)
    assert duplicates.LENGTH % count == 0 and missed(count) < 1e-3 <= missed(count // 2)


@pytest.mark.parametrize("similarity", [0.6, 0.8])
def test_pairs_just_beyond_the_threshold_are_found(similarity):
    draw, near, found = random.Random(0), Near(similarity), 0
    changed = {0.6: 22, 0.8: 9}[similarity]  # of 300 words: a resemblance a little above
    for number in range(60):
        base = [f"{number}-{place}" for place in range(300)]
        places = set(draw.sample(range(0, 300, 10), changed))
        assert near.before(2 * number, " ".join(base)) is None
        found += near.before(2 * number + 1, " ".join(edited(base, places))) == 2 * number
    assert found == 60


def test_a_crowd_of_documents_costs_no_more_than_its_first(monkeypatch):
    monkeypatch.setattr(duplicates, "CROWD", 5)
    near = Near(0.9)
    common = WORDS[:60]
    for number in range(40):
        assert near.before(number, " ".join([*common, *(f"{number}-{place}" for place in range(20))])) is None
    assert max(len(numbers) for place in near._places for numbers in place.values()) == 5


def distance(first, second):
    """Levenshtein's, by its table."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, 1):
        above, row = row, [number]
        for place, other in enumerate(second, 1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (one != other)))
    return row[-1]


def test_edits_are_counted_as_levenshtein_does_where_they_are_few_and_never_below():
    draw, equal = random.Random(0), 0
    for _ in range(100):
        first = [draw.randrange(30) for _ in range(40)]
        second = [draw.randrange(30) if draw.random() < 0.1 else word for word in first if draw.random() > 0.05]
        exact = 1 - distance(first, second) / max(len(first), len(second))
        measured = unedited(np.array(first), np.array(second))
        assert measured <= exact + 1e-9
        equal += measured == pytest.approx(exact)
    assert equal > 60
    for first, second in itertools.permutations(([1, 2, 3], [4, 5], [1, 2, 3, 4, 5, 6]), 2):
        assert unedited(np.array(first), np.array(second)) <= 0.5
