"""Weights and ``config.json`` of a Hugging Face folder, in and out, one tensor in memory at a time.

Everything is checked before the first weight is read: a tensor that is missing or not known, another shape, a dtype or
a field that is not known is a ``ValueError`` that names it. Files may hold float32, float16 and bfloat16, parameters
here are always float32: NARROW FILES ARE WIDENED, exactly.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree, workdir
from jaxllm.interop import families, placing, safetensors
from jaxllm.interop.families import Family, Tensor
from jaxllm.interop.placing import SHOWN, Progress, layered
from jaxllm.model import DecoderConfig, build
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# What files hold beside the parameters: tables that are made again here, and what sees pictures.
NO_PARAMETERS = re.compile(r".*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*")
TEXT_OF_PICTURES = re.compile(r"(model\.language_model|language_model\.model)\.")


def read(
    folder: str | os.PathLike, *, shardings: Tree = None, progress: Progress | None = None, **computed: Any
) -> tuple[DecoderConfig, Tree]:
    """(config, float32 parameters) of the folder's model.

    Parameters lie as ``shardings`` say, a tree like theirs, or on the first device; each process reads what its own
    devices need. Beside them the host holds one tensor of the files at a time; a device that is not the host itself
    holds one of our stacked parameters twice while it is stacked. ``computed`` are the config's keys that say how a
    model is computed; it is exact unless told. Raises ``FileNotFoundError`` where a file is missing, and ``ValueError``
    that names what we do not have: a field, or a tensor that is missing, that is not known, that has another shape.
    """
    folder = Path(folder)
    family, values = families.read(_json(folder / "config.json"))
    config = families.decoder(values, **computed)
    abstract = jax.eval_shape(build(config).init, jax.random.key(0))
    found = _entries(folder)
    said = dict(what="tensors", model=f"the {family.name!r} that config.json describes")
    known = {"lm_head.weight"} if config.tied_head else ()
    tensors = placing.matched(family.tensors, abstract, found, known=known, **said)
    if config.tied_head:
        _require_same_head(found)

    def read_one(tensor: Tensor, entry: safetensors.Entry, shape: tuple[int, ...]) -> np.ndarray:
        return families.to_ours(tensor, safetensors.read(entry), shape)

    return config, placing.placed(abstract, tensors, read_one, shardings=shardings, progress=progress)


def _require_same_head(found: Mapping[str, safetensors.Entry]) -> None:
    """A tied head may lie in the files too, as the embedding once more."""
    if "lm_head.weight" not in found:
        return
    head, embedding = (safetensors.read(found[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if not np.array_equal(head, embedding):
        raise ValueError(
            "config.json has tie_word_embeddings=True, and lm_head.weight is not model.embed_tokens.weight: "
            "one of them is wrong; set tie_word_embeddings to False to keep both"
        )


# ---- the folder ----


def _entries(folder: Path) -> dict[str, safetensors.Entry]:
    """The folder's tensors by their name in a model of text alone, without those that are no parameters."""
    found = {}
    for name, entry in _all_entries(folder).items():
        if not NO_PARAMETERS.fullmatch(name):
            found[TEXT_OF_PICTURES.sub("model.", name).replace("language_model.lm_head", "lm_head")] = entry
    return found


def _all_entries(folder: Path) -> dict[str, safetensors.Entry]:
    if (folder / ONE_FILE).is_file():
        return safetensors.entries(folder / ONE_FILE)
    if not (folder / INDEX).is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern))
        mend = f"; {others} are of another format, save the model as safetensors" if others else ""
        raise FileNotFoundError(f"{folder} has neither {ONE_FILE} nor {INDEX}{mend}")
    places = _json(folder / INDEX)["weight_map"]
    files = {file: folder / file for file in sorted(set(places.values()))}
    if missing := [file for file, path in files.items() if not path.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {missing}, which {INDEX} names; fetch them")
    found = {file: safetensors.entries(path) for file, path in files.items()}
    for file, own in found.items():
        if wrong := sorted({name for name, place in places.items() if place == file} ^ set(own)):
            raise ValueError(f"{INDEX} and {file} disagree about {wrong[:SHOWN]}; fetch both again")
    return {name: entry for own in found.values() for name, entry in own.items()}


def _json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a Hugging Face folder has config.json and .safetensors files")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


# ---- out ----


def tokenizer_facts(tokenizer: Tokenizer) -> dict:
    """The ids that ``config.json`` and ``generation_config.json`` name: what opens a document, ends it, and pads."""
    stops = [int(token) for token in tokenizer.stop_ids]
    return {
        "bos_token_id": int(tokenizer.bos_ids[0]) if tokenizer.bos_ids else None,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": tokenizer.pad_id,
    }


def write(
    folder: str | os.PathLike,
    config: DecoderConfig,
    params: Tree,
    *,
    dtype: str = "float32",
    tokenizer_facts: Mapping[str, Any],
    max_positions: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes ``config.json``, ``generation_config.json`` and the weights, which transformers and vLLM load.

    ``dtype`` is "float32" (read back bit for bit), "bfloat16" or "float16"; ``tokenizer_facts`` are fields of both JSON
    files; ``max_positions`` is the longest text that the model is for (0: what RoPE was stretched to, or 4096). A file
    has at most ``shard_bytes``. Scalar heads and critics stay behind: what is written is the language model.
    ``config.json`` comes last, so that nothing is taken for whole before it is. Raises ``ValueError`` for a model that
    no family can say, parameters of another one, a dtype that is not known, numbers that do not fit float16;
    ``FileExistsError`` where the folder holds weights.
    """
    folder = Path(folder)
    family, fields = families.write(config)
    if dtype not in safetensors.NAMES:
        raise ValueError(f"dtype={dtype!r} must be one of {sorted(safetensors.NAMES)}")
    if old := sorted(path.name for path in folder.glob("*.safetensors*")):
        raise FileExistsError(f"{folder} holds {old[:SHOWN]}; remove them, or write to another folder")
    said = {name: params[name] for name in ("embedding", "blocks", "final_norm", "head") if name in params}
    _require_those_of(config, said)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, list(_rows(family, said)), dtype, shard_bytes)
    # Null where there is none: a field that is left out is the id of that name in the family's first model.
    facts = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | dict(tokenizer_facts)
    sizes = {"max_position_embeddings": max_positions or families.reach(config)}
    sizes |= {"initializer_range": 0.02, "use_cache": True}
    kind = {"architectures": [family.architecture], "model_type": family.name}
    # Both spellings of the dtype, as of the rotary embedding: older versions know one, newer the other.
    kind |= {"dtype": dtype, "torch_dtype": dtype, "attention_dropout": 0.0}
    workdir.write_json(folder / "generation_config.json", facts)
    workdir.write_json(folder / "config.json", kind | sizes | fields | facts)


def _require_those_of(config: DecoderConfig, params: Tree) -> None:
    """``ValueError`` that names the parameters that the config's model has and these are not, or the other way."""
    plain = dataclasses.replace(config, scalar_head=False, critic=False)
    wanted, found = (
        {name: leaf.shape for name, leaf in zip(tree.names(each), jax.tree.leaves(each), strict=True)}
        for each in (jax.eval_shape(build(plain).init, jax.random.key(0)), params)
    )
    if wrong := sorted({name for name, _ in wanted.items() ^ found.items()}):
        shown = ", ".join(f"{name} {found.get(name)} and not {wanted.get(name)}" for name in wrong[:SHOWN])
        raise ValueError(f"the parameters are not those of the config's model: {shown}")


def _rows(family: Family, params: Tree) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(their name, its shape, a function that makes it) of every tensor: the layers in their order, the head last."""
    leaves = dict(zip(tree.names(params), jax.tree.leaves(params), strict=True))
    tensors = [tensor for tensor in family.tensors if tensor.parameter in leaves]
    inside = [tensor for tensor in tensors if layered(tensor)]
    depth = len(leaves[inside[0].parameter])
    order = [(tensor, None) for tensor in tensors if tensor.parameter == "embedding/table"]
    order += [(tensor, layer) for layer in range(depth) for tensor in inside]
    order += [(tensor, None) for tensor in tensors if tensor.parameter in ("final_norm/scale", "head/kernel")]
    for tensor, layer in order:
        leaf = leaves[tensor.parameter]
        shape = families.their_shape(tensor, leaf.shape if layer is None else leaf.shape[1:])
        yield tensor.name.format(layer), shape, lambda t=tensor, x=leaf, i=layer: _theirs(t, x, i)


def _theirs(tensor: Tensor, leaf: jax.Array, layer: int | None) -> np.ndarray:
    return families.to_theirs(tensor, np.asarray(leaf if layer is None else leaf[layer]))


def _write_weights(folder: Path, rows: list, dtype: str, shard_bytes: int) -> None:
    shapes, make = {name: shape for name, shape, _ in rows}, {name: function for name, _, function in rows}
    files = list(safetensors.shards(shapes, dtype, shard_bytes))
    several, places = len(files) > 1, {}
    for number, shard in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if several else ONE_FILE
        places |= dict.fromkeys(shard, name)
        safetensors.write(folder / name, shard, (_narrowed(each, make[each](), dtype) for each in shard), dtype)
    if several:
        width = safetensors.DTYPES[safetensors.NAMES[dtype]].itemsize
        size = width * sum(math.prod(shape) for shape in shapes.values())
        workdir.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _narrowed(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = array.astype(jnp.dtype(dtype), copy=False)
    if dtype == "float16" and np.isinf(narrow).any() and not np.isinf(array).any():
        raise ValueError(f"{name} has numbers up to {np.abs(array).max():.3g}, float16 up to 65504; use 'bfloat16'")
    return narrow
