"""Other people's models, in and out: run directories, Hugging Face folders and GGUF files are loaded alike."""

import importlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxllm import workdir
from jaxllm.model import Model, build
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

FORMATS = ("hf", "gguf")
DTYPES = {"hf": ("float32", "bfloat16", "float16"), "gguf": ("float32", "bfloat16", "float16", "q8_0")}


def kind(path: str | os.PathLike) -> str:
    """What lies there: "run", a run directory; "hf", a Hugging Face folder; "gguf", a GGUF file.

    Raises ``FileNotFoundError`` where nothing does, ``ValueError`` where it is something else.
    """
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                return "gguf"
        raise ValueError(f"{path} is no GGUF file; give one, or the folder of a model")
    if not path.is_dir():
        raise FileNotFoundError(f"there is no {path}: give a run directory, a Hugging Face folder or a GGUF file")
    config = path / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    found = "hf" if "model_type" in said else "run" if "model" in said else ""
    if not found:
        files = sorted(str(file.name) for file in path.glob("*.gguf"))
        mend = f"give one of {files}" if files else "it has no config.json of a run, or of a Hugging Face model"
        raise ValueError(f"{path} holds no model: {mend}")
    return found


def load(path: str | os.PathLike, *, shardings: Tree = None, **computed: Any) -> tuple[Model, Tree, Tokenizer]:
    """(model, float32 params, tokenizer) of a run directory, a Hugging Face folder or a GGUF file.

    Parameters lie as ``shardings`` say, or on the first device. A run is computed as its config says; the others
    exactly (float32 products), unless ``computed``, keys of the ``model`` section such as ``operand_dtype``, say
    otherwise. Raises ``FileNotFoundError`` and ``ValueError`` that name what is missing, and what is not known.
    """
    found = kind(path)
    if found == "run":
        if computed:
            raise ValueError(f"{path} is a run, which says itself how it is computed: leave out {sorted(computed)}")
        saved = workdir.saved(path)
        return saved.model, saved.params(shardings), saved.tokenizer
    tokenizer = read_tokenizer(path)
    config, params = _module(found).read(path, shardings=shardings, **computed)
    return build(config.with_vocabulary(tokenizer.vocab_size)), params, tokenizer


def read_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file."""
    return (_module("tokenizers").read if kind(path) == "hf" else _module("gguf").read_tokenizer)(path)


def save(
    path: str | os.PathLike,
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    *,
    format: str,
    dtype: str = "",
    max_positions: int = 0,
) -> None:
    """Writes the language model for others; it appears when it is whole, and where that fails nothing is left.

    Args:
      path: the folder of ``format="hf"``, the file of "gguf". It may not exist, a folder may be empty.
      format: "hf", which transformers and vLLM load; "gguf", which llama.cpp runs.
      dtype: "float32", "bfloat16" or "float16"; of "gguf" "q8_0" too. "" is float32 of "hf", float16 of "gguf".
      max_positions: the longest text that the model is for, as the files say; 0: what RoPE was stretched to, or 4096.

    Raises:
      ValueError: a model or a tokenizer that the format cannot say, with what is in the way.
      FileExistsError: where something is already.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {FORMATS}")
    dtype = dtype or DTYPES[format][0 if format == "hf" else 2]
    if dtype not in DTYPES[format]:
        raise ValueError(f"dtype={dtype!r} must be one of {DTYPES[format]} where format={format!r}")
    path = Path(path).resolve()
    if path.exists() and not (format == "hf" and path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; remove it, or write elsewhere")
    how = dict(dtype=dtype, max_positions=max_positions)
    with beside(path) as place:
        if format == "gguf":
            return _module("gguf").write(place, model.config, params, tokenizer, **how)
        hf = _module("hf")
        _module("tokenizers").write(place, tokenizer)
        hf.write(place, model.config, params, tokenizer_facts=hf.tokenizer_facts(tokenizer), **how)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Inside, a place for what shall be at ``path``, where an empty folder may be: it comes there when the block ends,
    and is gone where the block fails.
    """
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        if path.exists():
            path.rmdir()  # first, so that a folder that cannot make way, a mount, is refused before the work
        yield scratch / path.name
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _module(name: str):
    """A file of this folder: each format has packages of its own, which others do not wait for."""
    return importlib.import_module(f"jaxllm.interop.{name}")
