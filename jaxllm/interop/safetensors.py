"""The safetensors format: arrays one at a time from a file and to it, with nothing else of it in memory.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, offsets of begin
and end in what follows) and the arrays' bytes. It is read and not mapped: mapped pages count as memory.
"""

import json
import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(jnp.bfloat16)}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # as the format's own reader has it


class Entry(NamedTuple):
    """Where an array lies: bytes from ``begin`` of the file on."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def entries(path: str | os.PathLike) -> dict[str, Entry]:
    """Name -> where its array lies, of a whole file.

    Raises ``ValueError`` for what is no such file, was cut short or is damaged, and for a dtype that is none of F32,
    F16, BF16, with the name of the file and of the array.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise ValueError(f"{path} is no safetensors file, or was cut short: its header would have {length} bytes")
        try:
            header = {**json.loads(file.read(length))}
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file: its header is not a JSON object ({error})") from None
    header.pop("__metadata__", None)
    return {name: _entry(path, name, said, 8 + length, size) for name, said in header.items()}


def _entry(path: Path, name: str, said: Any, start: int, size: int) -> Entry:
    dtype, shape, (begin, end) = _said(path, name, said)
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {name} has the dtype {dtype}; known are {sorted(DTYPES)}")
    entry = Entry(path, dtype, shape, start + begin)
    if end - begin != entry.bytes:
        raise ValueError(f"{path}: {name} has {end - begin} bytes, not the {entry.bytes} of {dtype} {shape}")
    if start + end > size:
        raise ValueError(f"{path} was cut short: {name} ends at byte {start + end}, the file at {size}; fetch it again")
    return entry


def _said(path: Path, name: str, said: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """(dtype, shape, offsets) of an array, as the header has them."""
    try:
        shape, offsets = (tuple(map(operator.index, said[key])) for key in ("shape", "data_offsets"))
        if min(shape + offsets) < 0 or len(offsets) != 2:
            raise ValueError(f"shape {shape}, offsets {offsets}")
        return str(said["dtype"]), shape, offsets
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged in what its header says of {name} ({error!r}); fetch it again") from None


def read(entry: Entry) -> np.ndarray:
    """The array."""
    with open(entry.path, "rb") as file:
        array = np.fromfile(file, DTYPES[entry.dtype], math.prod(entry.shape), offset=entry.begin)
    return array.reshape(entry.shape)


def write(path: str | os.PathLike, shapes: Mapping[str, tuple], arrays: Iterable[np.ndarray], dtype: str) -> None:
    """A file of the ``arrays``, in the order of ``shapes``, each made when it is written, all of one dtype's name.

    The file appears when it is whole. ``ValueError`` for an array of another shape or dtype than was said.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPES[NAMES[dtype]].itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    said = json.dumps(header, separators=(",", ":")).encode()
    said += b" " * (-len(said) % 8)
    beside = Path(path).with_suffix(".tmp")
    with open(beside, "wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != tuple(shape) or array.dtype.name != dtype:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not {dtype} {tuple(shape)}")
            np.ascontiguousarray(array).tofile(file)
    os.replace(beside, path)


def shards(shapes: Mapping[str, tuple], dtype: str, limit: int) -> Iterator[dict[str, tuple]]:
    """The arrays in their order, cut where a file would have more than ``limit`` bytes; one alone may have more."""
    shard, held = {}, 0
    for name, shape in shapes.items():
        more = math.prod(shape) * DTYPES[NAMES[dtype]].itemsize
        if shard and held + more > limit:
            yield shard
            shard, held = {}, 0
        shard[name], held = shape, held + more
    yield shard
