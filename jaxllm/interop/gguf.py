"""Models in GGUF files, in and out, one array in memory at a time.

Everything is checked before the first array is read or written: what is missing or not known is a ``ValueError`` that
names it. Parameters are float32; what was quantised is what its blocks stand for.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm import tree
from jaxllm.interop import families, gguf_format, gguf_vocabulary, placing
from jaxllm.interop import gguf_architectures as architectures
from jaxllm.interop.families import Tensor
from jaxllm.interop.gguf_architectures import ARCHITECTURES, BIASES, EMBEDDING, HEAD, ROPE_FACTORS, Architecture
from jaxllm.interop.gguf_format import Entry
from jaxllm.model import DecoderConfig, build
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

# ---- in ----


class Source(NamedTuple):
    """A GGUF file's header, and what it says."""

    path: Path
    architecture: Architecture
    metadata: dict[str, Any]
    arrays: dict[str, Entry]


def source(path: str | os.PathLike) -> Source:
    """Reads a header; ``ValueError`` where the architecture is none that is known."""
    metadata, arrays = gguf_format.header(path)
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"{path} has general.architecture={name!r}; known are {sorted(ARCHITECTURES)}")
    return Source(Path(path), ARCHITECTURES[name], metadata, arrays)


def read_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer that the metadata describe, with its chat template. Raises as ``gguf_vocabulary.read`` does."""
    return gguf_vocabulary.read(source(path).metadata)


def read(
    path: str | os.PathLike, *, shardings: Tree = None, progress: placing.Progress | None = None, **computed: Any
) -> tuple[DecoderConfig, Tree]:
    """(config, float32 parameters) of a GGUF file's model: what was quantised is what its blocks stand for.

    ``shardings``, ``progress`` and ``computed`` as of ``hf.read``. Raises ``ValueError`` that names a key or an array
    that is missing, is not known, is packed in an unknown way, or has another shape.
    """
    said = source(path)
    config = families.decoder(_values(said), **computed)
    abstract = jax.eval_shape(build(config).init, jax.random.key(0))
    how = dict(what=f"{said.path}: arrays", model=f"the {said.architecture.name!r} it says it is")
    matched = placing.matched(said.architecture.tensors, abstract, said.arrays, known={ROPE_FACTORS}, **how)

    def read_one(tensor: Tensor, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
        return architectures.to_ours(said.architecture, config, tensor, gguf_format.read(entry), shape)

    return config, placing.placed(abstract, matched, read_one, shardings=shardings, progress=progress)


def _values(said: Source) -> dict:
    fields = architectures.fields(said.architecture, said.metadata, said.arrays)
    return families.read(fields)[1] | {key: name in said.arrays for key, name in BIASES.items()}


# ---- out ----


def write(
    path: str | os.PathLike,
    config: DecoderConfig,
    params: Tree,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float16",
    name: str = "",
    max_positions: int = 0,
) -> None:
    """Writes a file that llama.cpp runs; it appears when it is whole.

    ``dtype`` is how matrices are packed: "float32", "float16", "bfloat16" or "q8_0"; vectors stay float32, and so does
    what is computed. ``max_positions`` is the longest text that the model is for (0: what RoPE was stretched to, or
    4096). Scalar heads and critics stay behind. Raises ``ValueError`` for a model or a tokenizer that llama.cpp has
    not, a dtype that is not known, numbers that do not fit float16; ``FileExistsError`` where there is a file.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it, or write to another file")
    if dtype not in gguf_format.WRITABLE:
        raise ValueError(f"dtype={dtype!r} must be one of {sorted(gguf_format.WRITABLE)}")
    architecture, metadata = _metadata(config, max_positions)
    rows = list(_rows(architecture, config, params))
    plans = {row: gguf_format.planned(shape, dtype) for row, shape, _ in rows}
    general = {"general.architecture": architecture.name, "general.type": "model", "general.name": name or path.stem}
    general |= {"general.quantization_version": 2, "general.file_type": _FILE_TYPES[dtype]}
    vocabulary = gguf_vocabulary.metadata(tokenizer, config.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    gguf_format.write(path, general | metadata | vocabulary, plans, (make() for *_, make in rows))


_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}


def _metadata(config: DecoderConfig, max_positions: int) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that is this model, and what its metadata say; ``ValueError`` where llama.cpp has none."""
    family, fields = families.write(config)
    found = [each for each in ARCHITECTURES.values() if each.family == family.name]
    if not found:
        has = sorted(each.family for each in ARCHITECTURES.values())
        raise ValueError(f"llama.cpp has no architecture for this {family.name!r} model; here are those of {has}")
    architecture = found[0]
    unknown = [f"model.{key}=True" for key in BIASES if getattr(config, key) and key not in architecture.biases]
    unknown += ["model.tied_head=False"] * (architecture.tied and not config.tied_head)
    if architecture.square and config.num_heads * config.head_width != config.width:
        unknown.append(f"model.head_width={config.head_width} of {config.num_heads} heads in a width of {config.width}")
    if unknown:
        raise ValueError(f"llama.cpp's {architecture.name!r} has no {', '.join(unknown)}: it cannot run this model")
    said = {
        key: fields[theirs]
        for key, theirs in (architectures.KEYS | dict(architecture.keys)).items()
        if fields.get(theirs)
    }
    said |= {"context_length": max_positions or families.reach(config), "vocab_size": config.vocab_size}
    said |= {"rope.dimension_count": config.head_width, "attention.value_length": config.head_width}
    scaling = dict(fields["rope_scaling"] or {})
    if scaling.pop("rope_type", "llama3") != "llama3":
        said["rope.scaling.type"] = config.rope.scaling
    said |= {key: scaling[theirs] for key, theirs in architectures.SCALING.items() if theirs in scaling}
    if config.rope.scaling == "llama3":
        said.pop("rope.scaling.factor")
    metadata = {f"{architecture.name}.{key}": x for key, x in said.items()}
    _require_same(architecture, config, fields, metadata)
    return architecture, metadata


def _require_same(architecture: Architecture, config: DecoderConfig, fields: Mapping, metadata: Mapping) -> None:
    """``ValueError`` where llama.cpp would run another model than this one."""
    arrays = {EMBEDDING: Entry(Path(), "F32", (config.vocab_size, config.width), 0, 0)}
    arrays |= {} if config.tied_head else {HEAD: arrays[EMBEDDING]}
    read = architectures.fields(architecture, metadata, arrays)
    read["rope_scaling"] = fields["rope_scaling"] if config.rope.scaling == "llama3" else read["rope_scaling"]
    biases = {key: getattr(config, key) for key in BIASES}
    again = families.write(families.decoder(families.read(read)[1] | biases))[1]
    wrong = {key: (x, again.get(key)) for key, x in fields.items() if not _alike(x, again.get(key))}
    if wrong:
        named = ", ".join(f"{key}={ours!r} where it has {theirs!r}" for key, (ours, theirs) in wrong.items())
        raise ValueError(f"llama.cpp's {architecture.name!r} is not this model: it is one with {named}")


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether two fields say the same in float32."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(_alike(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


Row = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def _rows(architecture: Architecture, config: DecoderConfig, params: Tree) -> Iterator[Row]:
    """(name, shape, a function that makes it) of every array, the layers in their order."""
    said = {name: params[name] for name in ("embedding", "blocks", "final_norm", "head") if name in params}
    leaves = dict(zip(tree.names(said), jax.tree.leaves(said), strict=True))
    tensors = [tensor for tensor in architecture.tensors if tensor.parameter in leaves]
    if config.rope.scaling == "llama3":
        divided = architectures.factors(dataclasses.asdict(config.rope), {"head_dim": config.head_width})
        yield ROPE_FACTORS, divided.shape, lambda: divided
    order = [(tensor, None) for tensor in tensors if not placing.layered(tensor)]
    order += [(tensor, layer) for layer in range(config.num_layers) for tensor in tensors if placing.layered(tensor)]
    for tensor, layer in order:
        leaf = leaves[tensor.parameter]
        shape = families.their_shape(tensor, leaf.shape if layer is None else leaf.shape[1:])

        def make(tensor=tensor, leaf=leaf, layer=layer) -> np.ndarray:
            array = np.asarray(leaf if layer is None else leaf[layer])
            return architectures.to_theirs(architecture, config, tensor, array)

        yield tensor.name.format(layer), shape, make
