"""The GGUF format: metadata and arrays in and out, one array in memory at a time, with nothing else of the file in it.

A file is a header (metadata, and of each array its name, shape, type and offset) and the arrays behind it, each at a
multiple of the alignment. It is read by ``read`` calls and not mapped: mapped pages count as memory. What a block of
quantised numbers holds is the package ``gguf``'s business. (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
"""

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_PACKAGE = "gguf==0.19.0"
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
WRITABLE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_KINDS = {"I": 4, "i": 5, "f": 6, "?": 7}
_STRING, _ARRAY = 8, 9
_CHUNK = 1 << 20  # numbers that are unpacked or packed at a time: the package holds them twice meanwhile


class Entry(NamedTuple):
    """Where an array lies: ``bytes`` bytes from ``begin`` of the file on. ``kind`` is how its numbers are packed."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    begin: int
    bytes: int


def header(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Entry]]:
    """(metadata, name -> where its array lies). A shape's last dimension is the one that lies together in the file.

    Of a model that is cut into several files any of them may be given. Raises ``ValueError`` for what is no GGUF file,
    was cut short or is damaged, and for an array that is packed in an unknown way, with the array's name.
    """
    path = Path(path)
    metadata, found = _header(path)
    count = _number(path, metadata, "split.count", default=1, least=0)
    if count < 2:  # 0 is said where several were joined again
        return metadata, found
    names = [f"{path.stem[: -len('00001-of-00001')]}{n:05d}-of-{count:05d}{path.suffix}" for n in range(1, count + 1)]
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise FileNotFoundError(f"{path} is one of {count} files, and {missing} are not beside it; fetch them")
    parts = [_header(path.with_name(name)) for name in names]
    return parts[0][0], {name: entry for _, own in parts for name, entry in own.items()}


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise ValueError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
        reader = _Reader(file, path, size)
        version = reader.number("I")
        if version not in VERSIONS:
            raise ValueError(f"{path} is GGUF of version {version}; known are {VERSIONS}, little endian")
        arrays, pairs = reader.number("Q"), reader.number("Q")
        metadata = {reader.string(): reader.value(reader.number("I")) for _ in range(pairs)}
        said = [(reader.string(), *reader.array()) for _ in range(arrays)]
        start = _padded(file.tell(), _number(path, metadata, "general.alignment", default=ALIGNMENT, least=1))
    return metadata, {name: _entry(path, name, *each, start, size) for name, *each in said}


def _number(path: Path, metadata: Mapping, key: str, *, default: int, least: int) -> int:
    number = metadata.get(key, default)
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{path} has {key}={number!r}, no whole number from {least} on; is it broken?")
    return number


class _Reader:
    """The values of a header, in their order."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size = file, path, size

    def raw(self, length: int) -> bytes:
        found = self.file.read(length) if length <= self.size else b""
        if len(found) < length:
            raise ValueError(f"{self.path} was cut short, or is broken: its header goes past its end; fetch it again")
        return found

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.raw(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        return self.raw(self.number("Q")).decode(errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in (_STRING, _ARRAY):
                return [self.value(inner) for _ in range(min(count, self.size))]
            raw = self.raw(count * struct.calcsize(form := self.form(inner)))
            return list(struct.unpack(f"<{count}{form}", raw))
        number = self.number(self.form(kind))
        # 1e-5 in float32 is 9.99999975e-06: what was meant is the shortest number that has these bits.
        return float(str(np.float32(number))) if kind == 6 else number

    def form(self, kind: int) -> str:
        """How a number of this kind is packed."""
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path} has a value of the kind {kind}, which is not known; is it broken?")
        return _NUMBERS[kind]

    def array(self) -> tuple[tuple[int, ...], int, int]:
        """(shape, kind, offset)."""
        shape = struct.unpack(f"<{(rank := self.number('I'))}Q", self.raw(8 * rank))
        return shape[::-1], self.number("I"), self.number("Q")


def _entry(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int, size: int) -> Entry:
    package = package_gguf()
    known = {each.value: each for each in package.GGMLQuantizationType}
    spelled = known[kind].name if kind in known else str(kind)
    if spelled not in READABLE:
        raise ValueError(
            f"{path}: {name} is packed as {spelled}; known are {READABLE}. Convert the file to one of them"
        )
    block, width = package.GGML_QUANT_SIZES[known[kind]]
    if not shape or shape[-1] % block:
        raise ValueError(f"{path}: {name} has the shape {shape}, no rows of whole {spelled} blocks of {block}")
    entry = Entry(path, spelled, shape, start + offset, math.prod(shape) // block * width)
    if entry.begin + entry.bytes > size:
        raise ValueError(f"{path} was cut short: {name} ends at {entry.begin + entry.bytes}, the file at {size}")
    return entry


def read(entry: Entry) -> np.ndarray:
    """The array in float32, which holds every number of every kind that is read."""
    package = package_gguf()
    kind = package.GGMLQuantizationType[entry.kind]
    rows = math.prod(entry.shape[:-1])
    array = np.empty((rows, entry.shape[-1]), np.float32)
    width, some = entry.bytes // rows, max(1, _CHUNK // entry.shape[-1])
    with open(entry.path, "rb") as file:
        file.seek(entry.begin)
        for first in range(0, rows, some):
            packed = np.fromfile(file, np.uint8, width * min(some, rows - first)).reshape(-1, width)
            array[first : first + some] = package.quants.dequantize(packed, kind)
    return array.reshape(entry.shape)


def package_gguf():
    """The package; ``ValueError`` that names it where it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"GGUF files need a package: pip install {_PACKAGE}") from error
    return gguf


# ---- out ----


class Planned(NamedTuple):
    """An array that will be written: its shape, and how its numbers are packed."""

    shape: tuple[int, ...]
    kind: str


def planned(shape: tuple[int, ...], dtype: str) -> Planned:
    """How an array is packed in a file of this ``dtype``: vectors stay float32, rows that are no blocks float16."""
    kind = WRITABLE[dtype] if len(shape) > 1 else "F32"
    return Planned(shape, "F16" if kind == "Q8_0" and shape[-1] % 32 else kind)


def write(
    path: str | os.PathLike, metadata: Mapping[str, Any], plans: Mapping[str, Planned], arrays: Iterable[np.ndarray]
) -> None:
    """A file of the ``arrays``, in the order of ``plans``, each made when it is written.

    Metadata are texts, bools, ints (32 bits), floats (32 bits) and lists of one of them. The file appears when it is
    whole. Raises ``ValueError`` for an array of another shape than was said, and for numbers that do not fit float16.
    """
    package, path = package_gguf(), Path(path)
    kinds = {name: package.GGMLQuantizationType[plan.kind] for name, plan in plans.items()}
    sizes = {name: _bytes(package, plan, kinds[name]) for name, plan in plans.items()}
    said, offset = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(plans), len(metadata))], 0
    said += [part for key, value in metadata.items() for part in (_text(key), _packed(value))]
    for name, plan in plans.items():
        said += [_text(name), struct.pack(f"<I{len(plan.shape)}Q", len(plan.shape), *plan.shape[::-1])]
        said.append(struct.pack("<IQ", kinds[name].value, offset))
        offset += _padded(sizes[name])
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "wb") as file:
        whole = b"".join(said)
        file.write(whole.ljust(_padded(len(whole)), b"\0"))
        for (name, plan), array in zip(plans.items(), arrays, strict=True):
            if array.shape != plan.shape:
                raise ValueError(f"{name} is {array.shape}, not {plan.shape}")
            for block in _blocks(package, name, array, kinds[name]):
                block.tofile(file)
            file.write(bytes(_padded(sizes[name]) - sizes[name]))
    os.replace(beside, path)


def _bytes(package, plan: Planned, kind) -> int:
    block, width = package.GGML_QUANT_SIZES[kind]
    return math.prod(plan.shape) // block * width


def _blocks(package, name: str, array: np.ndarray, kind) -> Iterator[np.ndarray]:
    """The packed numbers of an array, some rows at a time."""
    rows = array.reshape(-1, array.shape[-1])
    some = max(1, _CHUNK // rows.shape[-1])
    for first in range(0, len(rows), some):
        part = np.ascontiguousarray(rows[first : first + some], np.float32)
        if kind.name == "F16" and not (np.abs(part) < 65520).all():
            raise ValueError(
                f"{name} has numbers up to {np.abs(part).max():.3g}, float16 up to 65504; use another dtype"
            )
        yield package.quants.quantize(part, kind)


def _padded(length: int, alignment: int = ALIGNMENT) -> int:
    return -(-length // alignment) * alignment


def _text(text: str) -> bytes:
    raw = text.encode(errors="surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _packed(value: Any) -> bytes:
    """A value with its kind before it."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<I", _ARRAY) + _packed_list(value)
    kind = _kind(value, "I")
    return struct.pack("<I" + kind, _KINDS[kind], value)


def _packed_list(values: Sequence) -> bytes:
    if not values or isinstance(values[0], str):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_text, values))
    kind = _kind(values[0], "i")
    return struct.pack(f"<IQ{len(values)}{kind}", _KINDS[kind], len(values), *values)


def _kind(value: bool | int | float, integer: str) -> str:
    return "?" if isinstance(value, bool) else "f" if isinstance(value, float) else integer
