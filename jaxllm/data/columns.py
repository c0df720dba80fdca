"""Numbers beside the tokens of a store, a line for each token: a directory holds them all, or does not exist."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from jaxllm.data.tokens import TokenStore, mapped, open_store, write_whole

# The dtype and the numbers per token of each column, by its name in a batch; 0 for one number without a further axis.
Kinds = Mapping[str, tuple[str, int]]
# First token and length of consecutive runs of tokens, and the lines of all of them in each column.
Part = tuple[tuple[np.ndarray, np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class AnnotatedStore(TokenStore):
    """A token store whose rows hold ``columns`` as well; its fingerprint is that of both."""

    beside: Path = Path()

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """[num_tokens, K] each, or [num_tokens] where K is 0, mapped from its file."""
        kinds = json.loads((self.beside / "columns.json").read_text(encoding="utf-8"))
        return {
            name: mapped(self.beside / f"{name}.bin", dtype, self.num_tokens * max(width, 1)).reshape(
                self.num_tokens, *[width] * (width > 0)
            )
            for name, (dtype, width) in kinds.items()
        }

    def __reduce__(self):
        return open_annotated, (self.directory, self.beside)


def annotated(store: TokenStore, beside: Path, kinds: Kinds, parts: Callable[[], Iterable[Part]]) -> AnnotatedStore:
    """The store with the columns in the directory ``beside``, which ``parts`` fill where it does not exist yet.

    Its name is that of their content: whoever asks for others gives another. Lines in no part are zeros.
    """
    if not beside.is_dir():
        write_whole(beside, lambda partial: _write(partial, store.num_tokens, kinds, parts()))
    return open_annotated(store.directory, beside)


def open_annotated(directory: Path, beside: Path) -> AnnotatedStore:
    """Raises ValueError where a file is missing, or not as long as the store has tokens."""
    store = open_store(directory)
    values = {field.name: getattr(store, field.name) for field in fields(store)}
    values["fingerprint"] = hashlib.sha256(f"{store.fingerprint} {beside.name}".encode()).hexdigest()
    try:
        found = AnnotatedStore(**values, beside=beside)
        found.columns  # noqa: B018  mapping them checks their length
    except (OSError, ValueError) as error:
        raise ValueError(f"the columns beside the tokens in {beside} are damaged ({error}): delete them") from error
    return found


def _write(directory: Path, num_tokens: int, kinds: Kinds, parts: Iterable[Part]) -> None:
    with ExitStack() as stack:
        files = {name: stack.enter_context((directory / f"{name}.bin").open("wb")) for name in kinds}
        line = {name: max(width, 1) * np.dtype(dtype).itemsize for name, (dtype, width) in kinds.items()}
        for name, file in files.items():
            file.truncate(num_tokens * line[name])
        for (starts, counts), values in parts:
            ends = np.cumsum(counts)
            for start, first, end in zip(starts, ends - counts, ends, strict=True):
                for name, file in files.items():
                    # written, not mapped: on a full disk a write fails, a mapped page kills the process
                    file.seek(int(start) * line[name])
                    file.write(values[name][first:end].astype(kinds[name][0]).tobytes())
    (directory / "columns.json").write_text(json.dumps(kinds) + "\n", encoding="utf-8")
