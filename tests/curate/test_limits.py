import dataclasses

import pytest

from jaxllm.curate.limits import HELP, PRESETS, Limits, limits


@pytest.mark.parametrize(
    "fault, message",
    [
        ({"min_words": -1}, "min_words=-1 must be a number of at least 0"),
        ({"max_symbols": float("nan")}, "max_symbols=nan must be a number of at least 0"),
        ({"max_symbols": "0.1"}, "max_symbols='0.1' must be a number"),
        ({"min_words": 2.5}, "min_words=2.5 must be a whole number"),
        ({"similarity": 1.5}, "similarity=1.5 is a share: it must be at most 1"),
        ({"similarity": 0.2}, "similarity=0.2 is too low to be found: it must be at least 0.3"),
        ({"min_words": 9, "max_words": 8}, "min_words=9 is more than max_words=8: no document can pass"),
        ({"min_word_length": 13.0}, "min_word_length=13.0 is more than max_word_length=12.0"),
    ],
)
def test_an_impossible_threshold_is_named(fault, message):
    with pytest.raises(ValueError, match=message):
        Limits(**fault)


def test_thresholds_change_a_preset_and_what_is_none_is_named():
    assert limits() == Limits() == PRESETS["any"]
    assert limits("web", min_words=7) == dataclasses.replace(PRESETS["web"], min_words=7) != limits(min_words=7)
    with pytest.raises(ValueError, match="preset='wed' is not one of \\('any', 'web'\\)"):
        limits("wed")
    with pytest.raises(ValueError, match="min_word is no threshold; did you mean 'min_words'"):
        limits(min_word=3)


def test_every_threshold_is_explained():
    assert list(HELP) == [field.name for field in dataclasses.fields(Limits)]
