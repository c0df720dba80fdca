"""The tokenizer of a run: loaded from where the config says, or learned from the run's own text, or before any run."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.text import hub, tokenizer
from jaxllm.text.huggingface import HuggingFaceTokenizer
from jaxllm.text.tokenizer import Tokenizer

LEARNED = "learned.json"  # beside a tokenizer: from what it was learned, and how well it does
MAX_BYTES = 2**28  # of text that a tokenizer is learned from
KINDS = ("sentencepiece", "bytes", HuggingFaceTokenizer.kind)


@dataclass(frozen=True)
class TokenizerConfig:
    """kind: one of ``KINDS``. vocab_size: ids in all, for training one. path: a saved one to use instead, or the folder
    of a Hugging Face model.
    """

    kind: str
    vocab_size: int
    path: str

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"tokenizer.kind={self.kind!r} must be one of {KINDS}")


def prepare(config: TokenizerConfig, texts: Iterable[str], *, directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer saved in ``directory``, or else the one that ``config`` describes, made and saved there."""
    if (Path(directory) / tokenizer.DESCRIPTION).exists():  # written last, so the rest is there
        return tokenizer.load(directory)
    made = _made(config, texts)
    made.save(directory)
    return made


def _made(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    if config.path:
        return hub.read(config.path) if hub.is_folder(config.path) else tokenizer.load(config.path)
    if config.kind == HuggingFaceTokenizer.kind:
        raise ValueError(f"tokenizer.kind={config.kind!r} is not made here: name its folder in tokenizer.path")
    if config.kind == "bytes":
        return tokenizer.byte_tokenizer()
    return tokenizer.train(texts, vocab_size=config.vocab_size)


def learn(
    texts: Iterable[str], *, out: str | os.PathLike, vocab_size: int, held_out: float = 0.05
) -> dict[str, int | float]:
    """Learns a SentencePiece tokenizer, saves it in the folder ``out``, and measures it on texts that it did not learn.

    Which texts are held out depends on each alone, so that a copy never lies on the other side; where none falls to
    this share, the one nearest to it. Done again, it finds what it did.

    Returns:
      vocab_size, bytes_per_token (of the held-out texts), documents and bytes learned from, held_out_documents and
      held_out_bytes.

    Raises:
      ValueError: a share that is none, fewer than two different texts, files in ``out`` that say something else, and
        as ``tokenizer.train``.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} must be a share of the texts above 0 and below 1")
    learned, measured = _split(texts, held_out)
    made_from = {"vocab_size": vocab_size, "learned": _digest(learned), "held_out": _digest(measured)}
    path = Path(out) / LEARNED
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("from") != made_from:
            raise ValueError(f"{path} is of other texts, or of another vocab_size: give --out another folder")
        return found
    made = tokenizer.train(learned, vocab_size=vocab_size, max_bytes=MAX_BYTES)
    tokens = sum(map(len, made.encode_batch(measured)))
    found = {"vocab_size": made.vocab_size, "bytes_per_token": _bytes(measured) / tokens}
    found |= {"documents": len(learned), "bytes": _bytes(learned)}
    found |= {"held_out_documents": len(measured), "held_out_bytes": _bytes(measured)}
    _write(made, {"from": made_from, **found}, Path(out))
    return found


def _split(texts: Iterable[str], held_out: float) -> tuple[list[str], list[str]]:
    """(texts to learn from, texts to measure on) of the first ``MAX_BYTES`` of them."""
    kept, keys, size = [], {}, 0
    for text in filter(None, texts):
        kept.append(text)
        keys[text] = hashlib.blake2b(text.encode(), digest_size=8, key=b"held out").digest()
        size += len(text.encode())
        if size >= MAX_BYTES:
            break
    if len(keys) < 2:
        raise ValueError(f"texts={len(keys)}: one to learn from and another to measure on are needed; add documents")
    least = max(int(held_out * 2**64).to_bytes(8, "big"), min(keys.values()))
    return [text for text in kept if keys[text] > least], [text for text in kept if keys[text] <= least]


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _write(made: Tokenizer, found: dict[str, Any], directory: Path) -> None:
    """Saves it beside and then gives the files their names, the description last; none is replaced by another."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial") as beside:
        made.save(beside)
        (Path(beside) / LEARNED).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        paths = sorted(Path(beside).iterdir(), key=lambda path: path.name == tokenizer.DESCRIPTION)
        for path in paths:
            there = directory / path.name
            if there.exists() and there.read_bytes() != path.read_bytes():
                raise ValueError(f"{there} exists and says something else: give --out another folder")
        for path in paths:
            path.replace(directory / path.name)
