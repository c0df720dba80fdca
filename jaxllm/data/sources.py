"""Documents out of files: `.txt`, `.jsonl` (`.gz`, `.zst`), `.parquet`, folders and globs, or the embedded prose.

Nothing is skipped silently: what cannot be read as text is an error that names the file, the line and the mend.
"""

import functools
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxllm.data import embedded

EMBEDDED = "embedded"


Reading = Iterator[tuple[str, int]]  # text, and bytes of the file read so far


class Document(NamedTuple):
    """A text, and how many bytes of its source had been read when it came: the measure of progress."""

    text: str
    read: int


@dataclass(frozen=True)
class DocumentSource:
    """The files of one source, in the order of their documents. `field` names the text in jsonl and parquet."""

    path: str
    field: str = "text"

    def __post_init__(self):
        if not self.path:
            raise ValueError(f"path='' names no source: give a file, a folder, a glob, or {EMBEDDED!r}")

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        return embedded.files() if self.path == EMBEDDED else _matches(self.path)

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, compressed where they are."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the content of the files, their order and the field: the same wherever the files lie."""
        digest = hashlib.sha256(json.dumps([self.path == EMBEDDED, self.field]).encode())
        for path in self.files:
            with path.open("rb") as file:
                digest.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Every document in order. Raises ValueError at the first one that cannot be read."""
        if self.path == EMBEDDED:
            texts, size = embedded.documents(), self.num_bytes
            yield from (Document(text, size * count // len(texts)) for count, text in enumerate(texts, 1))
            return
        finished = 0
        for path in self.files:
            read = None
            for text, read in READERS[_suffix(path)](path, self.field):
                yield Document(text, finished + read)
            if read is None:
                raise ValueError(f"{path} is empty: remove it, or leave it out of {self.path!r}")
            finished += path.stat().st_size


def _matches(path: str) -> tuple[Path, ...]:
    """The readable files that a path, folder or glob stands for, sorted by name."""
    root = Path(path)
    if root.is_file():
        if _suffix(root) not in READERS:
            raise ValueError(f"{path} is of no kind that can be read: {_KINDS}; rename or convert it")
        return (root,)
    if root.is_dir():
        candidates = root.rglob("*")
    elif glob.has_magic(path):
        candidates = map(Path, glob.glob(path, recursive=True))
    else:
        raise FileNotFoundError(f"{path} does not exist: give a file, a folder, a glob, or {EMBEDDED!r}")
    found = tuple(sorted(file for file in candidates if file.is_file() and _suffix(file) in READERS))
    if not found:
        raise FileNotFoundError(f"{path} matches no file of a kind that can be read: {_KINDS}")
    return found


def _suffix(path: Path) -> str:
    """`.jsonl.gz` of `a.b.jsonl.gz`: the last suffix, and the one before where the last is a compression."""
    suffixes = path.suffixes[-2:]
    return "".join(suffixes if suffixes[-1:] in ([".gz"], [".zst"]) else suffixes[-1:]).lower()


def _read_txt(path: Path, field: str) -> Reading:
    data = path.read_bytes()  # bytes, since text mode would rewrite \r\n
    if data:
        yield _decoded(data, path, 1), len(data)


def _read_jsonl(path: Path, field: str, opened: Callable[[BinaryIO], Iterable[bytes]] = iter) -> Reading:
    with path.open("rb") as raw:
        for number, line in enumerate(_whole_lines(opened(raw), path), 1):
            if line.strip():
                yield _record_text(_decoded(line, path, number), field, f"{path}, line {number}"), raw.tell()


def _read_jsonl_gz(path: Path, field: str) -> Reading:
    return _read_jsonl(path, field, lambda raw: gzip.GzipFile(fileobj=raw))


def _read_jsonl_zst(path: Path, field: str) -> Reading:
    return _read_jsonl(path, field, _zst_lines)


def _read_parquet(path: Path, field: str) -> Reading:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowException as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from error
    with file:
        if field not in file.schema_arrow.names:
            raise ValueError(f"{path}: no column {field!r} in {file.schema_arrow.names}; set field to one of them")
        size, row = path.stat().st_size, 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _text(value, field, f"{path}, row {row}"), size * row // file.metadata.num_rows


READERS: dict[str, Callable[[Path, str], Reading]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
}
_KINDS = ", ".join(READERS)


def _zst_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstd stream. Its own reader takes a stream cut short for whole, so the frames are followed here."""
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"reading {raw.name} needs the package zstandard: pip install zstandard") from error
    frame, tail = None, b""
    while chunk := raw.read(1 << 20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                tail += frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            chunk = frame.unused_data
            if frame.eof:
                frame = None
        *lines, tail = tail.split(b"\n")
        yield from lines
    if frame is not None:
        raise EOFError("the last frame has no end")
    yield tail


def _whole_lines(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Lines of a file that may be compressed; one cut short or damaged is an error."""
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from error


def _record_text(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); mend or remove the line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {type(record).__name__} is not an object with a field {field!r}; mend the line")
    if field not in record:
        raise ValueError(f"{where}: no field {field!r} in {sorted(record)}; set field to the one that holds the text")
    return _text(record[field], field, where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} holds {type(value).__name__} {value!r:.40}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: lone surrogate at character {error.start} of {field!r}; mend the record") from error
    return value


def _decoded(data: bytes, path: Path, line: int) -> str:
    """data as UTF-8; line: the number of its first line."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: invalid UTF-8, byte 0x{data[error.start]:02x}; convert the file to UTF-8"
        ) from error
