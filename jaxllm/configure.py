"""From a section of an ``ml_collections`` config to the frozen dataclass of the same keys, so that a typo raises."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Section = TypeVar("Section")


def section(cls: type[Section], values: Mapping[str, Any], *, path: str = "config") -> Section:
    """``cls(**values)``, nested dataclasses from nested mappings.

    Raises ``ValueError`` for a key that ``cls`` lacks, naming the nearest one, and for a key of ``cls`` that ``values``
    lacks.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    check_keys(values, fields, path=path, needed=fields, mend="; configs/common.py holds its default")
    return cls(**{key: _value(fields[key], values[key], f"{path}.{key}") for key in fields})


def check_keys(
    values: Mapping[str, Any], known: Iterable[str], *, path: str, needed: Iterable[str] = (), mend: str = ""
) -> None:
    """Raises ``ValueError`` for a key that is not known, naming the nearest one, and for one that is needed and lacks,
    with the mend.
    """
    for key in values:
        if key not in known:
            raise ValueError(f"{path}.{key} is not a known key{nearest(key, known)}")
    for key in needed:
        if key not in values:
            raise ValueError(f"{path}.{key} is missing{mend}")


def nearest(key: str, known: Any) -> str:
    """``; did you mean 'batch_size'?`` for an unknown key, or the list of what is known."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys are {sorted(known)}"


def _value(cls: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(cls):
        return section(cls, value, path=path)
    if isinstance(value, list):
        return tuple(value)
    return value
