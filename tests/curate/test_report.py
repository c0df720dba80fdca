import json

import pytest
from rich.console import Console

from jaxllm.curate import report
from jaxllm.curate.report import DUPLICATE, NEAR_DUPLICATE, Tally, Verdict, planted

KEPT, SHORT = Verdict(), Verdict("too_short")
MADE = {
    "documents": 10,
    "bytes": 900,
    "kept": {"documents": 8, "bytes": 800, "examples": ["x"]},
    "dropped": {"too_short": {"documents": 2, "bytes": 100, "examples": ["[bold]a\nb"]}},
    "removed": {"recurring_lines": {"lines": 3, "bytes": 30, "examples": ["Home"]}},
    "planted": {"markup": [1, 2], "near_copy": [1, 1]},
    "clean": {"documents": 7, "lost": 1},
}


def near(of):
    return Verdict(NEAR_DUPLICATE, of)


def exact(of):
    return Verdict(DUPLICATE, of)


@pytest.mark.parametrize(
    "verdicts, noise, caught, lost",
    [
        ([KEPT, SHORT, KEPT], ["", "a", "a"], {"a": [1, 2]}, 0),
        ([KEPT, SHORT, SHORT], ["", "", "a"], {"a": [1, 1]}, 1),
        ([KEPT, near(0)], ["", "a"], {"a": [1, 1]}, 0),
        ([KEPT, near(0)], ["a", ""], {"a": [1, 1]}, 0),  # one of the two went: which one does not matter
        ([KEPT, near(0), near(0)], ["a", "", ""], {"a": [1, 1]}, 1),  # a second one is a clean document less
        ([KEPT, near(0), near(0)], ["", "", "a"], {"a": [1, 1]}, 1),
        ([KEPT, near(0), near(0)], ["a", "b", ""], {"a": [1, 1], "b": [1, 1]}, 0),
        ([KEPT, near(0), exact(1)], ["a", "b", ""], {"a": [1, 1], "b": [1, 1]}, 0),  # through the one between
        ([SHORT, exact(0)], ["a", ""], {"a": [1, 1]}, 0),
        ([SHORT, near(0)], ["a", ""], {"a": [1, 1]}, 1),
        ([KEPT, exact(0), KEPT], ["", "", "a"], {"a": [0, 1]}, 0),  # nothing is lost that is there still
    ],
)
def test_planted_noise_is_caught_where_of_documents_that_are_alike_one_stays(verdicts, noise, caught, lost):
    assert planted(verdicts, noise) == {
        "planted": caught,
        "clean": {"documents": noise.count(""), "lost": lost},
    }


def test_without_planted_noise_nothing_is_said_of_it():
    assert planted([KEPT, SHORT], ["", ""]) == {}
    bare = {name: value for name, value in MADE.items() if name not in ("planted", "clean")}
    assert report.numbers(bare) == {"documents": 8, "kept": 0.8}
    assert report.said(bare) == [] and len(report.bars(bare)) == 1


def test_numbers_are_shares_the_worst_kind_of_noise_counts():
    assert report.numbers(MADE) == {"documents": 8, "kept": 0.8, "caught": 0.5, "lost": 1 / 7}
    assert report.said(MADE) == [
        "markup: 1 of 2 caught",
        "near copy: 1 of 1 caught",
        "clean documents dropped wrongly: 1 of 7",
    ]


@pytest.mark.parametrize("width", [70, 120])
def test_the_table_shows_every_number_whole_also_in_a_narrow_terminal(width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(MADE))
    console.file.close()
    shown = console.export_text()
    assert all(f" {word} " in shown for word in ("kept", "too short", "8", "80.00%", "800", "2", "20.00%", "100"))
    assert "[bold]a" in shown and "lines removed: 3 recurring lines" in shown


def test_bars_are_percent():
    panels = report.bars(MADE)
    assert panels["Documents by the reason that dropped them, %"]["documents"] == {
        "kept": (80, 80, 80),
        "too short": (20, 20, 20),
    }
    assert panels["Planted noise that was caught, %"]["caught"]["markup"] == (50, 50, 50)


def test_a_tally_counts_bytes_keeps_the_first_examples_and_puts_the_most_first():
    tally = Tally("lines")
    tally.add("few", "é" * 400)
    for number in range(5):
        tally.add("many", str(number))
    assert (
        json.loads(json.dumps(tally.parts()))
        == tally.parts()
        == {
            "many": {"lines": 5, "bytes": 5, "examples": ["0", "1", "2"]},
            "few": {"lines": 1, "bytes": 800, "examples": ["é" * 300]},
        }
    )
    assert list(tally.parts()) == ["many", "few"]
