"""Raw documents in, a clean corpus out: judged one after the other, then written in their order.

Filters and duplicates are judged on what is left of a text without the boilerplate of its site. Of each document that
is kept the hashes of its words and lines stay in memory; the texts never do.
"""

import dataclasses
import filecmp
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from jaxllm import figures
from jaxllm.curate import duplicates, filters, lines
from jaxllm.curate.limits import Limits, limits
from jaxllm.curate.report import DUPLICATE, NEAR_DUPLICATE, Report, Tally, Verdict, bars, planted
from jaxllm.data.sources import DocumentSource, Record, json_line, record_text

CLEAN, DROPPED, REPORT, FIGURE = "clean.jsonl", "dropped.jsonl", "report.json", "figures/curate.png"
RULES = 2  # of this folder: another number, and what was cleaned before is not taken for done
NOTHING = {"documents": 0, "bytes": 0, "examples": []}
BOILERPLATE, RECURRING, NOISE = "boilerplate", "recurring_lines", "noise"


class Judged(NamedTuple):
    """A verdict on each document, in order, and the keys of lines that recur on too many of those kept."""

    verdicts: list[Verdict]
    recurring: set[bytes]


def clean(*, files: str, out: str | os.PathLike, field: str = "text", preset: str = "any", **thresholds) -> Report:
    """Writes the documents worth reading to ``clean.jsonl`` in ``out``, the others to ``dropped.jsonl`` as {"reason",
    "record"} (of duplicates also the number of the first one, "duplicate_of"), and what this did to ``report.json``.

    Records are kept whole, but for lines removed from their text; ``report`` says what is in the report, which is
    returned. Where it was done already, nothing is done; where it fails, nothing is left half written.

    Args:
      files: a file, folder or glob of documents, as ``DocumentSource`` reads them.
      out: folder; files in it that say something else are never replaced.
      field: names the text in a record.
      preset: of ``PRESETS``.
      thresholds: fields of ``Limits`` to change of it.

    Raises:
      ValueError: an unknown or impossible threshold, a record without a text or with a field that JSON cannot hold, a
        result of something else in ``out``, or no document that is worth keeping.
      OSError: files that are missing or cannot be written.
    """
    allowed, source, directory = limits(preset, **thresholds), DocumentSource(files, field), Path(out)
    made_from = {"documents": source.fingerprint, "limits": dataclasses.asdict(allowed), "rules": RULES}
    report = finished(directory, made_from)
    if report:
        print(f"{directory} holds these documents already, cleaned by these limits", file=sys.stderr)
    else:
        with _bar(source) as advance:
            judged = judge((text for _, text in _read(source, advance)), allowed)
            directory.mkdir(parents=True, exist_ok=True)
            with _nothing_partial(directory):
                report = {"from": made_from, **_write(_read(source, advance), judged, allowed, directory, field)}
                _partial(directory / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                _publish(directory, report)
    if not (directory / FIGURE).exists():
        figures.bars(bars(report), directory / FIGURE)
    return report


def finished(directory: Path, made_from: Mapping[str, Any]) -> Report | None:
    """The report of the same cleaning in this folder. Raises ``ValueError`` where it is of another one."""
    path = directory / REPORT
    if not path.exists():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("from") != made_from:
        raise ValueError(f"{path} is of other documents, or of other limits: give --out another folder")
    return report


def judge(texts: Iterable[str], allowed: Limits) -> Judged:
    """A pure function of the texts, held one at a time."""
    exact, near = duplicates.Exact(), duplicates.Near(allowed.similarity)
    verdicts, counts = [], Counter()
    for number, text in enumerate(texts):
        verdict = _verdict(number, text, exact, near, allowed)
        verdicts.append(verdict)
        if not verdict.reason and allowed.max_recurring:
            counts.update(lines.keys(text))
    return Judged(verdicts, {key for key, count in counts.items() if count > allowed.max_recurring})


def _verdict(number: int, text: str, exact: duplicates.Exact, near: duplicates.Near, allowed: Limits) -> Verdict:
    if lines.boilerplate(text) > allowed.max_boilerplate:
        return Verdict(BOILERPLATE)
    text = lines.without_boilerplate(text, allowed.max_boilerplate).text
    if found := filters.reason(text, allowed):
        return Verdict(found)
    for name, seen in ((DUPLICATE, exact), (NEAR_DUPLICATE, near)):
        if (first := seen.before(number, text)) is not None:
            return Verdict(name, first)
    return Verdict()


def _write(
    documents: Iterable[tuple[Record, str]], judged: Judged, allowed: Limits, directory: Path, field: str
) -> Report:
    """Writes both files of documents under other names, and returns the report of them."""
    found, removed, noise, verdicts = Tally("documents"), Tally("lines"), [], []
    with (
        _partial(directory / CLEAN).open("w", encoding="utf-8") as kept,
        _partial(directory / DROPPED).open("w", encoding="utf-8") as dropped,
    ):
        for (record, text), verdict in zip(documents, judged.verdicts, strict=True):
            whole = record.value if isinstance(record.value, dict) else {field: text}
            left, cuts = text, {}
            if not verdict.reason:
                left, cuts = _cut(text, judged.recurring, allowed)
                verdict = Verdict(RECURRING if left != text and filters.reason(left, allowed) else "")
            verdicts.append(verdict)
            noise.append(kind if isinstance(kind := whole.get(NOISE), str) else "")
            found.add(verdict.reason, text if verdict.reason else left)
            if verdict.reason:
                of = {} if verdict.of is None else {"duplicate_of": verdict.of}
                dropped.write(json_line({"reason": verdict.reason, **of, "record": whole}))
                continue
            kept.write(json_line({**whole, field: left}))
            for name, gone in cuts.items():
                for line in gone:
                    removed.add(name, line)
    parts = found.parts()
    whole = {unit: sum(part[unit] for part in parts.values()) for unit in ("documents", "bytes")}
    lost = planted(verdicts, noise)
    return {**whole, "kept": parts.pop("", NOTHING), "dropped": parts, "removed": removed.parts(), **lost}


def _cut(text: str, recurring: set[bytes], allowed: Limits) -> tuple[str, dict[str, list[str]]]:
    """What is left of a text, and the lines that are not, by the reason."""
    first = lines.without_boilerplate(text, allowed.max_boilerplate)
    recurs = (lambda line: lines.key(line) in recurring) if recurring else (lambda line: False)
    second = lines.without(first.text, recurs)
    return second.text, {BOILERPLATE: first.removed, RECURRING: second.removed}


def _read(source: DocumentSource, advance: Callable[[int], None]) -> Iterator[tuple[Record, str]]:
    parse = functools.partial(_text, field=source.field)
    before = 0
    for record in source.records():
        yield record, record.parsed(parse)
        advance(record.read - before)
        before = record.read


def _text(value: str | dict[str, Any], field: str) -> str:
    """The text of a record; raises where there is none, or where the record could not be written in the end."""
    text = record_text(value, field)
    if isinstance(value, dict):
        json_line(value)
    return text


@contextmanager
def _bar(source: DocumentSource) -> Iterator[Callable[[int], None]]:
    """How far it is through two readings, where somebody watches."""
    hidden = not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), disable=hidden, transient=True) as bar:
        yield functools.partial(bar.advance, bar.add_task("clean", total=2 * source.num_bytes))


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _nothing_partial(directory: Path) -> Iterator[None]:
    """Whatever happens, no file is left that has no name of its own."""
    try:
        yield
    finally:
        for name in (CLEAN, DROPPED, REPORT):
            _partial(directory / name).unlink(missing_ok=True)


def _publish(directory: Path, report: Report) -> None:
    """Gives the files their names, the report last, unless nothing was kept, or a file would be replaced."""
    paths = [directory / name for name in (CLEAN, DROPPED, REPORT)]
    replaced = [path for path in paths if path.exists() and not filecmp.cmp(path, _partial(path), shallow=False)]
    if replaced or not report["kept"]["documents"]:
        why = {name: part["documents"] for name, part in report["dropped"].items()}
        raise ValueError(
            f"{replaced[0]} exists and says something else: give --out another folder"
            if replaced
            else f"none of the {report['documents']} documents is kept: {why}; change the limits, or the documents"
        )
    for path in paths:
        os.replace(_partial(path), path)
