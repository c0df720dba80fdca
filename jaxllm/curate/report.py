"""What a cleaning kept and dropped, in numbers: as JSON, as a table, as bars; and what it did of planted noise."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Column, Table
from rich.text import Text

Report = dict[str, Any]
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"
EXAMPLES, EXAMPLE_LENGTH = 3, 300


class Verdict(NamedTuple):
    """Why a document is dropped, and of which (its place in the source) it is a duplicate; kept without a reason."""

    reason: str = ""
    of: int | None = None


class Tally:
    """Counts of texts by what became of them."""

    def __init__(self, unit: str):
        """unit: what a text is, in the plural."""
        self._unit = unit
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = defaultdict(list)

    def add(self, name: str, text: str) -> None:
        self._counts[name] += 1
        self._bytes[name] += len(text.encode())
        if len(self._examples[name]) < EXAMPLES:
            self._examples[name].append(text[:EXAMPLE_LENGTH])

    def parts(self) -> dict[str, dict[str, Any]]:
        """name -> how many, their bytes, and the first of them; most first."""
        return {
            name: {self._unit: count, "bytes": self._bytes[name], "examples": self._examples[name]}
            for name, count in self._counts.most_common()
        }


def planted(verdicts: Sequence[Verdict], noise: Sequence[str]) -> Report:
    """Of each kind of planted noise, (how many were caught, of how many); of the clean documents, how many were lost.

    noise: the kind of each document, "" of a clean one. Of documents that are alike the first is kept: where that one
    is noise, it counts as caught, and the clean one that went in its place as kept. A clean document that another one
    repeats to the letter is not lost.
    """
    of = Counter(filter(None, noise))
    if not of:
        return {}
    caught = Counter(kind for kind, verdict in zip(noise, verdicts, strict=True) if kind and verdict.reason)
    lost, traded = 0, set()
    for number, verdict in enumerate(verdicts):
        if noise[number] or not verdict.reason:
            continue
        first = _first(number, verdicts)
        if noise[first] and not verdicts[first].reason and first not in traded:
            traded.add(first)
            caught[noise[first]] += 1
        elif verdict.reason != DUPLICATE:
            lost += 1
    return {
        "planted": {kind: [caught[kind], count] for kind, count in sorted(of.items())},
        "clean": {"documents": len(noise) - of.total(), "lost": lost},
    }


def _first(number: int, verdicts: Sequence[Verdict]) -> int:
    """The document that stands for this one, where it is a duplicate of one that is itself a duplicate too."""
    while (of := verdicts[number].of) is not None:
        number = of
    return number


def numbers(report: Report) -> dict[str, float]:
    """documents: kept. kept: their share. Where noise was planted, caught: the least share of a kind of it, and lost:
    the share of the clean documents that were dropped wrongly.
    """
    kept = report["kept"]["documents"]
    found = {"documents": kept, "kept": kept / report["documents"]}
    if "planted" in report:
        found["caught"] = min(caught / of for caught, of in report["planted"].values())
        found["lost"] = report["clean"]["lost"] / max(report["clean"]["documents"], 1)
    return found


def table(report: Report) -> Table:
    """The report as the terminal has it."""
    right = (Column(head, justify="right", no_wrap=True) for head in ("documents", "share", "bytes"))
    example = Column("for example", no_wrap=True, ratio=1)  # gets what the others leave
    shown = Table(Column("", no_wrap=True), *right, example, expand=True)
    shown.add_row("kept", *_counts(report["kept"], report), end_section=True)
    for name, part in report["dropped"].items():
        shown.add_row(_words(name), *_counts(part, report), Text(repr(part["examples"][0])[:60]))
    for name, part in report["removed"].items():
        shown.caption = f"{shown.caption or 'lines removed:'} {part['lines']:,} {_words(name)}"
    return shown


def said(report: Report) -> list[str]:
    """What became of planted noise, a sentence each."""
    lines = [f"{_words(kind)}: {caught} of {of} caught" for kind, (caught, of) in report.get("planted", {}).items()]
    if lines:
        lines.append(f"clean documents dropped wrongly: {report['clean']['lost']} of {report['clean']['documents']}")
    return lines


def bars(report: Report) -> dict[str, Mapping[str, Mapping[str, Sequence[float | None]]]]:
    """The report as ``figures.bars`` draws it."""
    dropped = {
        _words(name): (100 * part["documents"] / report["documents"],) * 3 for name, part in report["dropped"].items()
    }
    found = {_words(kind): (100 * caught / of,) * 3 for kind, (caught, of) in report.get("planted", {}).items()}
    kept = {"kept": (100 * numbers(report)["kept"],) * 3}
    panels = {"Documents by the reason that dropped them, %": {"documents": kept | dropped}}
    return panels | ({"Planted noise that was caught, %": {"caught": found}} if found else {})


def _counts(part: Mapping[str, Any], report: Report) -> tuple[str, str, str]:
    return f"{part['documents']:,}", f"{part['documents'] / report['documents']:.2%}", f"{part['bytes']:,}"


def _words(name: str) -> str:
    return name.replace("_", " ")
