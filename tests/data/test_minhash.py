import itertools

import numpy as np
import pytest

from jaxllm.data import minhash


def shingles(text):
    words = text.lower().split()
    return set(itertools.pairwise(itertools.pairwise(words)))


def jaccard(first, second):
    return len(shingles(first) & shingles(second)) / len(shingles(first) | shingles(second))


WORDS = [str(i) for i in range(4000)]
PAIRS = [(" ".join(WORDS[:300]), " ".join(WORDS[shift : shift + 300])) for shift in (0, 40, 100, 200, 400)]


@pytest.mark.parametrize("first, second", PAIRS)
def test_equal_places_of_signatures_tell_the_share_of_runs_in_common(first, second):
    for length, within in ((64, 0.2), (256, 0.1)):
        one, other = (minhash.signature(minhash.runs(text), length=length) for text in (first, second))
        assert one.shape == (length,) and one.dtype == np.uint32
        assert (one == other).mean() == pytest.approx(jaccard(first, second), abs=within)


@pytest.mark.parametrize("first, second", [*PAIRS, ("a b c d", "a b c e"), ("a b", "a b"), ("", "a")])
def test_the_resemblance_of_short_texts_is_exact(first, second):
    one, other = (minhash.sketch(minhash.runs(text)) for text in (first, second))
    expected = jaccard(first, second) if len(first) > 3 else float(first == second)
    assert minhash.resemblance(one, other) == minhash.resemblance(other, one) == pytest.approx(expected)


@pytest.mark.parametrize("shift, length", [(0, 3000), (300, 3000), (1500, 3000), (0, 1500), (0, 500)])
def test_the_resemblance_of_long_texts_is_near(shift, length):
    first, second = " ".join(WORDS[:3000]), " ".join(WORDS[shift : shift + length])
    one, other = (minhash.sketch(minhash.runs(text)) for text in (first, second))
    assert len(one) == minhash.SKETCH < 3000 and len(other) == min(minhash.SKETCH, len(minhash.runs(second)))
    assert minhash.resemblance(one, other) == pytest.approx(jaccard(first, second), abs=0.06)


def test_runs_are_of_three_words_in_order_whatever_their_case():
    assert np.array_equal(minhash.runs("A b\nC  d"), minhash.runs("a B c D"))
    assert len(minhash.runs("a b c d a b c")) == 4 and len(minhash.runs("a b c a b c")) == 3
    assert not set(minhash.runs("a b c").tolist()) & set(minhash.runs("c b a").tolist())
    assert len(minhash.runs("")) == len(minhash.runs("a")) == 1


def test_a_longer_signature_begins_with_the_shorter_one_and_no_place_repeats():
    runs = minhash.runs(PAIRS[0][0])
    whole = minhash.signature(runs, length=minhash.PERMUTATIONS)
    assert np.array_equal(minhash.signature(runs, length=64), whole[:64])
    assert len(set(whole.tolist())) > 0.99 * len(whole)


def test_a_signature_is_that_of_earlier_versions():
    # What was selected as diverse stays so.
    assert minhash.signature(minhash.runs("to be or not to be"), length=64)[:4].tolist() == [
        1543762881,
        800753954,
        652506809,
        974517444,
    ]
