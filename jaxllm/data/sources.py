"""Records out of files: `.txt`, `.json`, `.jsonl` (`.gz`, `.zst`), `.parquet`, folders and globs, or embedded prose.

Nothing is skipped silently: what cannot be read is an error that names the file, the line and the mend, and files of
other kinds among those of a folder or glob are named on stderr. Hidden files of a folder, named ".x", are none of it.
"""

import functools
import glob
import gzip
import hashlib
import json
import re
import sys
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from jaxllm.data import embedded
from jaxllm.text.chat import Malformed

EMBEDDED = "embedded"
T = TypeVar("T")


class Record(NamedTuple):
    """One entry of a file.

    value: an object's fields, a text file's text, or the Malformed that was met in its place.
    where: file and line, for errors. read: bytes of the file, or of the source, read so far.
    """

    value: Any
    where: str
    read: int

    def parsed(self, parse: Callable[[Any], T]) -> T:
        """parse(value). Raises Malformed with the place before the reason."""
        try:
            if isinstance(self.value, Malformed):
                raise self.value
            return parse(self.value)
        except Malformed as error:
            raise Malformed(error.reason, f"{self.where}: {error}") from error


Reading = Iterator[Record]


class Document(NamedTuple):
    """A text, and how many bytes of its source had been read when it came: the measure of progress."""

    text: str
    read: int


@dataclass(frozen=True)
class DocumentSource:
    """The files of one source, in the order of their documents. `field` names the text in a record."""

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

    def records(self, columns: tuple[str, ...] = ()) -> Reading:
        """Every record in order; columns: those to read of a parquet file, all where there are none.

        Raises ValueError for a file that cannot be read. A record that cannot be raises Malformed when it is parsed.
        """
        if self.path == EMBEDDED:
            texts, size = embedded.documents(), self.num_bytes
            yield from (Record(text, EMBEDDED, size * n // len(texts)) for n, text in enumerate(texts, 1))
            return
        finished = 0
        for path in self.files:
            record = None
            for record in READERS[_suffix(path)](path, columns):
                yield record._replace(read=finished + record.read)
            if record is None:
                raise ValueError(f"{path} is empty: remove it, or leave it out of {self.path!r}")
            finished += path.stat().st_size

    def documents(self) -> Iterator[Document]:
        """Every text in order. Raises ValueError at the first one that cannot be read."""
        for record in self.records((self.field,)):
            yield Document(record.parsed(functools.partial(record_text, field=self.field)), record.read)


def record_text(value: str | dict[str, Any], field: str) -> str:
    """The text of a record, which a text file is itself. Raises Malformed where the field holds none."""
    if isinstance(value, str):
        return value
    if field not in value:
        message = f"no field {field!r} in {sorted(value)}; set field to the one that holds the text"
        raise Malformed("no_field", message)
    text = value[field]
    if not isinstance(text, str):
        raise Malformed("not_text", f"field {field!r} holds {type(text).__name__} {text!r:.40}, not text; mend it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"lone surrogate at character {error.start} of {field!r}; mend the record"
        raise Malformed("lone_surrogate", message) from error
    return text


def json_line(value: Mapping[str, Any]) -> str:
    """A record's line of a jsonl file. Raises Malformed that names the field which JSON in UTF-8 cannot hold."""
    try:
        line = json.dumps(value, ensure_ascii=False) + "\n"
        line.encode()
        return line
    except (TypeError, ValueError) as error:
        if len(value) > 1:
            for part in value.items():
                json_line(dict([part]))
        ((field, held),) = value.items()
        message = f"field {field!r} holds {held!r:.40}, which JSON cannot ({error}); leave it out, or make it text"
        raise Malformed("not_json", message) from error


def _matches(path: str) -> tuple[Path, ...]:
    """The readable files that a path, folder or glob stands for, sorted by name."""
    root = Path(path)
    if root.is_file():
        if _suffix(root) not in READERS:
            raise ValueError(f"{path} is of no kind that can be read: {_KINDS}; rename or convert it")
        return (root,)
    if root.is_dir():
        inside = ((file, file.relative_to(root).parts) for file in root.rglob("*"))
        candidates = (file for file, parts in inside if not any(part.startswith(".") for part in parts))
    elif glob.has_magic(path):
        candidates = map(Path, glob.glob(path, recursive=True))
    else:
        raise FileNotFoundError(f"{path} does not exist: give a file, a folder, a glob, or {EMBEDDED!r}")
    files = sorted(file for file in candidates if file.is_file())
    found = tuple(file for file in files if _suffix(file) in READERS)
    if not found:
        raise FileNotFoundError(f"{path} matches no file of a kind that can be read: {_KINDS}")
    _name_unread(path, tuple(str(file) for file in files if _suffix(file) not in READERS))
    return found


@functools.cache  # a source looks for its files several times, and says this once
def _name_unread(path: str, unread: tuple[str, ...]) -> None:
    if unread:
        names = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
        print(f"{path}: not read, for its kind is none of {_KINDS}: {names}", file=sys.stderr)


def _suffix(path: Path) -> str:
    """`.jsonl.gz` of `a.b.jsonl.gz`: the last suffix, and the one before where the last is a compression."""
    suffixes = path.suffixes[-2:]
    return "".join(suffixes if suffixes[-1:] in ([".gz"], [".zst"]) else suffixes[-1:]).lower()


def _read_txt(path: Path, columns: tuple[str, ...]) -> Reading:
    data = path.read_bytes().removeprefix(BOM_UTF8)  # bytes, since text mode would rewrite \r\n
    if data:
        value, line = _decoded(data)
        yield Record(value, f"{path}, line {line}", len(data))


def _read_json(path: Path, columns: tuple[str, ...]) -> Reading:
    """One array of objects, whose items are read one at a time so that each has its line."""
    data = path.read_bytes().removeprefix(BOM_UTF8)
    if not data.strip():
        return
    text, line = _decoded(data)
    if isinstance(text, Malformed):
        raise ValueError(f"{path}, line {line}: {text}") from text
    before = 0
    try:
        for start, stop, value in _items(text):
            line, before = line + text.count("\n", before, start), start
            yield Record(_object(value), f"{path}, line {line}", len(data) * stop // len(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); mend the file") from error


def _read_jsonl(path: Path, columns: tuple[str, ...], opened: Callable[[BinaryIO], Iterable[bytes]] = iter) -> Reading:
    with path.open("rb") as raw:
        for number, line in enumerate(_whole(opened(raw), path, EOFError, gzip.BadGzipFile, zlib.error), 1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if line.strip():
                yield Record(_json_line(line), f"{path}, line {number}", raw.tell())


def _read_jsonl_gz(path: Path, columns: tuple[str, ...]) -> Reading:
    return _read_jsonl(path, columns, lambda raw: gzip.GzipFile(fileobj=raw))


def _read_jsonl_zst(path: Path, columns: tuple[str, ...]) -> Reading:
    return _read_jsonl(path, columns, _zst_lines)


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Reading:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowException as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from error
    with file:
        names = file.schema_arrow.names
        for missing in set(columns) - set(names):
            raise ValueError(f"{path}: no column {missing!r} in {names}; set field to one of them")
        size = path.stat().st_size
        batches = file.iter_batches(batch_size=1024, columns=list(columns or names))
        values = (value for batch in batches for value in batch.to_pylist())
        for row, value in enumerate(_whole(values, path, ArrowException, OSError, UnicodeDecodeError), 1):
            yield Record(value, f"{path}, row {row}", size * row // file.metadata.num_rows)


READERS: dict[str, Callable[[Path, tuple[str, ...]], Reading]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
}
_KINDS = ", ".join(READERS)
_OPEN, _NEXT = re.compile(r"\s*\[\s*(\]?)\s*"), re.compile(r"\s*([,\]])\s*")


def _items(text: str) -> Iterator[tuple[int, int, Any]]:
    """Start, stop and value of each item of a JSON array."""
    scan, bracket = json.JSONDecoder().raw_decode, _OPEN.match(text)
    if bracket is None:
        raise json.JSONDecodeError("Expecting an array of objects: '['", text, 0)
    while bracket[1] != "]":
        start = bracket.end()
        value, stop = scan(text, start)
        yield start, stop, value
        bracket = _NEXT.match(text, stop)
        if bracket is None:
            raise json.JSONDecodeError("Expecting ',' or ']'", text, stop)
    if bracket.end() < len(text):
        raise json.JSONDecodeError("Extra data", text, bracket.end())


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


def _whole(parts: Iterable[T], path: Path, *damage: type[Exception]) -> Iterator[T]:
    """Lines or rows of a file; damage: what is raised where it is cut short or damaged, which is an error."""
    try:
        yield from parts
    except damage as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from error


def _json_line(line: bytes) -> dict[str, Any] | Malformed:
    text, _ = _decoded(line)
    if isinstance(text, Malformed):
        return text
    try:
        return _object(json.loads(text))
    except (ValueError, RecursionError) as error:
        return Malformed("not_json", f"not JSON ({error}); mend or remove the line")


def _object(value: Any) -> dict[str, Any] | Malformed:
    if isinstance(value, dict):
        return value
    return Malformed("not_an_object", f"{type(value).__name__} is not an object with named fields; mend or remove it")


def _decoded(data: bytes) -> tuple[str | Malformed, int]:
    """data as UTF-8 and 1, or what is wrong with it and its line."""
    try:
        return data.decode(), 1
    except UnicodeDecodeError as error:
        message = f"invalid UTF-8, byte 0x{data[error.start]:02x}; convert the file to UTF-8"
        return Malformed("invalid_utf8", message), 1 + data.count(b"\n", 0, error.start)
