"""Files of records that were made from a seed: written as .jsonl, never over what says something else; and how many."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def write(directory: str | os.PathLike, files: Mapping[str, Iterable[Mapping[str, Any]]]) -> Iterator[tuple[Path, int]]:
    """Writes the records of each name to ``NAME.jsonl``, and yields each path with how many these are.

    All are made before the first is written. Raises ``ValueError`` for a file that exists with other content.
    """
    written = {name: [json.dumps(record) + "\n" for record in records] for name, records in files.items()}
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, lines in written.items():
        path = Path(directory) / f"{name}.jsonl"
        if path.exists() and path.read_text(encoding="utf-8") != "".join(lines):
            raise ValueError(f"{path} exists and says something else: give --out another folder")
        beside = path.with_suffix(".tmp")  # whoever is killed here leaves nothing that says something else
        beside.write_text("".join(lines), encoding="utf-8")
        os.replace(beside, path)
        yield path, len(lines)


def require(least: int, **counts: int) -> None:
    """Raises ``ValueError`` for a count below the least, by its name."""
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name}={count} must be at least {least}")
