"""Tokenizers in and out: the files of a Hugging Face folder, which transformers loads with the same ids and texts.

There the spelling of a control token in a text becomes the token; here it never does.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from jaxllm.text import chat, hub
from jaxllm.text.hub import read
from jaxllm.text.huggingface import HuggingFaceTokenizer, gpt2_alphabet
from jaxllm.text.special_tokens import (
    ANSWER,
    BOS,
    END_ANSWER,
    END_THINK,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    THINK,
    UNK,
)
from jaxllm.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

__all__ = ["definition", "merges", "read", "template_of", "write"]

# What an assistant's own text may hold is shown when special tokens are not.
_SHOWN = (THINK, END_THINK, ANSWER, END_ANSWER)
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def write(folder: str | os.PathLike, tokenizer: Tokenizer) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json`` and ``chat_template.jinja``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = _names(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        **names,
    }
    (folder / hub.DEFINITION).write_text(definition(tokenizer), encoding="utf-8")
    for name, values in ((hub.CONFIG, config), (hub.SPECIAL, names)):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template := template_of(tokenizer):
        (folder / hub.TEMPLATE).write_text(template, encoding="utf-8")


def definition(tokenizer: Tokenizer) -> str:
    """The text of a ``tokenizer.json`` that reads and writes as the tokenizer does."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.definition
    return json.dumps(_OWN[tokenizer.kind](tokenizer), ensure_ascii=False)


def template_of(tokenizer: Tokenizer) -> str:
    """The Jinja source of the chat template: the tokenizer's own, or ours; none for other people's base models."""
    return tokenizer.template if isinstance(tokenizer, HuggingFaceTokenizer) else chat.JINJA


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return dict(tokenizer.template_names)
    return {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}


def _bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    alphabet = {byte: sign for sign, byte in gpt2_alphabet().items()}
    first = len(SPECIAL_TOKENS)
    vocabulary = {alphabet[tokenizer.token_bytes(id)[0]]: id for id in range(first, tokenizer.vocab_size)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _values(_bpe(vocabulary, [], byte_fallback=False)) | {"pre_tokenizer": level, "decoder": level}


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """A space is spelled as itself, not as U+2581, so that neither that sign nor a newline is in any piece, and both
    fall back to their bytes, as we encode them.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    vocabulary, scores = {}, {}
    for id in range(len(SPECIAL_TOKENS), tokenizer.vocab_size):
        spelled = processor.id_to_piece(id)
        if not processor.is_byte(id):
            spelled = spelled.replace("\u2581", " ")
            scores[spelled] = processor.get_score(id)
        vocabulary[spelled] = id
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    model = _bpe(vocabulary, merges(scores), byte_fallback=True)
    return _values(model) | {"decoder": decoder}


def merges(scores: Mapping[str, float]) -> list[list[str]]:
    """Every way to make a piece out of two, the best pieces first: a BPE of SentencePiece's joins what scores best."""
    ranked = sorted((piece for piece in scores if len(piece) > 1), key=lambda piece: -scores[piece])
    cuts = ((piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece)))
    return [[left, right] for left, right in cuts if left in scores and right in scores]


def _bpe(vocabulary: dict[str, int], merges: list, *, byte_fallback: bool) -> dict[str, Any]:
    special = {spelled: id for id, spelled in enumerate(SPECIAL_TOKENS)}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": UNK if byte_fallback else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": special | vocabulary,
        "merges": merges,
    }


def _values(model: dict[str, Any]) -> dict[str, Any]:
    """A definition with our special tokens around this model, which opens a text with <|bos|>."""
    added = [
        {"id": id, "content": spelled, **_PLAIN, "special": spelled not in _SHOWN}
        for id, spelled in enumerate(SPECIAL_TOKENS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": hub.opening_with(BOS, SPECIAL_TOKENS.index(BOS)),
        "decoder": None,
        "model": model,
    }


_OWN = {ByteTokenizer.kind: _bytes, SentencePieceTokenizer.kind: _sentencepiece}
