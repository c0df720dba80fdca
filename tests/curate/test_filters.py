import itertools
import random

import pytest

from jaxllm.curate import filters
from jaxllm.curate.filters import FILTERS, Page
from jaxllm.curate.limits import PRESETS, Limits
from jaxllm.data import lessons

ANY, WEB = Limits(), PRESETS["web"]
PROSE = (
    "The ferry left before the fog had lifted, and nobody on the pier could say to whom the small red trunk belonged. "
    "It stood there for most of the morning. A boy sat on it, then an old man with a newspaper, and at noon the keeper "
    "of the lighthouse came down to see what had been brought ashore."
)
COUNT = PROSE.count(" ") + 1


@pytest.mark.parametrize(
    "text, limits, expected",
    [
        (PROSE, ANY, ""),
        (PROSE, WEB, ""),
        ("one two three", ANY, ""),
        ("one two", ANY, "too_short"),
        ("", ANY, "too_short"),
        (" \n ", Limits(min_words=0), "too_short"),
        (PROSE, Limits(min_words=COUNT), ""),
        (PROSE, Limits(min_words=COUNT + 1), "too_short"),
        (PROSE, Limits(max_words=COUNT), ""),
        (PROSE, Limits(max_words=COUNT - 1), "too_long"),
        ("aaaa bbbb ccc", Limits(max_word_length=3.6), "word_length"),
        ("aaaa bbbb ccc", Limits(min_word_length=3.6, max_word_length=3.7), ""),
        ("aaaa bbbb ccc", Limits(min_word_length=3.7), "word_length"),
        ("aaaa <<bb cccc", Limits(max_symbols=0.16), "symbols"),
        ("aaaa <<bb cccc", Limits(max_symbols=0.17), ""),
        ("aaa ... bb1 !?!", Limits(min_alphanumeric=0.51), "not_alphanumeric"),
        ("aaa ... bb1 !?!", Limits(min_alphanumeric=0.5), ""),
        ("aaa 111 bb1 222", Limits(min_lettered=0.51), "no_letters"),
        ("aaa 111 bb1 222", Limits(min_lettered=0.5), ""),
        ("The cat sat on the mat", Limits(min_stop_words=1), ""),
        ("The cat sat on the mat", Limits(min_stop_words=2), "stop_words"),
        ("- one two\nthree four\n- five six", Limits(max_bullets=0.66), "bullets"),
        ("- one two\nthree four\n- five six", Limits(max_bullets=0.67), ""),
        ("one two ...\nthree four\nfive six…", Limits(max_ellipses=0.66), "ellipses"),
        ("one two ...\nthree four\nfive six…", Limits(max_ellipses=0.67), ""),
        ("one two ...\nthree four", Limits(max_ellipses=0.5), ""),
        ("so good" + "!" * 20 + " it was", ANY, "repeated_characters"),
        ("-=" * 30 + " a rule", ANY, "repeated_characters"),
        ("one two three four five six!!!!", ANY, ""),
        ("one two three!!!!!", Limits(max_repeated_characters=0.31), "repeated_characters"),
        ("one two three!!!!!", Limits(max_repeated_characters=0.32), ""),
        ("a few words\nof a page\na few words", Limits(max_repeated_lines=0.35), "repeated_lines"),
        ("a few words\nof a page\na few words", Limits(max_repeated_lines=0.36), ""),
        ("of a page\nof a page\na few words to say", Limits(max_repeated_lines=0.33), "repeated_lines"),
        ("one two\n\nthree four\n\none two", Limits(max_repeated_lines=1.0), "repeated_paragraphs"),
        ("one two\nthree four\none two", Limits(max_repeated_lines=1.0), ""),
    ],
)
def test_a_text_beyond_a_limit_is_dropped_and_one_at_it_is_not(text, limits, expected):
    assert filters.reason(text, limits) == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [5, 6, 10])
def test_repeated_runs_are_counted_as_by_a_loop(length, seed):
    draw = random.Random(seed)
    words = [word for _ in range(9) for word in draw.choice((list("abcdefghijkl"), draw.choices(["u", "vv"], k=7)))]
    seen, marked = set(), [False] * len(words)
    for start in range(len(words) - length + 1):
        run = " ".join(words[start : start + length])
        if run in seen:
            marked[start : start + length] = [True] * length
        seen.add(run)
    expected = sum(len(word) for word, again in zip(words, marked, strict=True) if again)
    page = Page(" ".join(words))
    assert filters._repeated_words(page, length) == pytest.approx(expected / sum(map(len, words)))


def test_runs_that_repeat_are_judged_by_the_published_scale():
    def dropped(length, limit):
        # One run of so many words is said twice among words that are said once.
        words = [f"w{number:02}" for number in range(30)]
        text = " ".join([*words, *words[:length]])
        return filters.reason(text, Limits(max_repeated_ngrams=limit)) == "repeated_ngrams"

    assert dropped(5, 5 / 35 - 0.001) and not dropped(5, 5 / 35 + 0.001)
    # Ten words are 10 / 40: of ten the limit is two thirds of what is given, of five the whole.
    assert dropped(10, 0.36) and not dropped(10, 0.38)


@pytest.mark.parametrize("length, factor", [(2, 1.0), (3, 0.9), (4, 0.8)])
def test_the_most_frequent_words_are_judged_by_the_published_scale_in_long_texts(length, factor):
    filler = iter(f"w{number:03}" for number in range(1000))
    said = [f"x{number:03}" for number in range(length)]
    words = list(itertools.chain.from_iterable([*said, next(filler), next(filler)] for _ in range(30)))
    page, share = Page(" ".join(words)), length / (length + 2)
    assert filters._top(page, length) == pytest.approx(share) and filters._top(Page("a b c d"), 2) == 0
    drops, limit = FILTERS["top_ngrams"], share / factor
    assert drops(page, Limits(max_top_ngrams=limit - 0.001)) and not drops(page, Limits(max_top_ngrams=limit + 0.001))
    assert drops(page, Limits(max_top_ngrams=0.1, ngram_words=len(words)))
    assert not drops(page, Limits(max_top_ngrams=0.1, ngram_words=len(words) + 1))


def test_lives_talks_and_sums_pass():
    clean = lessons.lessons(lessons.Plan(people=24, heldout=4, biographies=9, sums=300, noise=0))["documents"]
    assert {filters.reason(record["text"], ANY) for record in clean} == {""}


def test_the_web_is_asked_for_more_than_anything():
    assert filters.reason("12+34: 2+4=6 1+3=4, so 12+34=46.", ANY) == ""
    assert filters.reason("12+34: 2+4=6 1+3=4, so 12+34=46.", WEB) == "too_short"
