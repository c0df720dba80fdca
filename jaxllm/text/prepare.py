"""The tokenizer of a run: loaded from where the config says, or learned from the run's own text."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxllm.text import hub, tokenizer
from jaxllm.text.huggingface import HuggingFaceTokenizer
from jaxllm.text.tokenizer import Tokenizer

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
