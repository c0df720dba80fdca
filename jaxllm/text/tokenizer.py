"""Text to ids and back, exactly: `decode(encode(text)) == text` for every Unicode text, whatever it contains.

Two tokenizers are made here: a byte per id, and SentencePiece BPE with byte fallback. An id stands for a fixed string
of bytes, so that decoding is joining bytes and bits per byte is exact. Text never becomes a special token.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from jaxllm.text.base import DESCRIPTION, Tokenizer, utf8
from jaxllm.text.huggingface import DEFINITION, FACTS, HuggingFaceTokenizer
from jaxllm.text.special_tokens import BOS_ID, END_ID, EOS_ID, NUM_SPECIAL_TOKENS, PAD_ID, SPECIAL_TOKENS, UNK_ID

_SPACE_MARK = "\u2581"  # how SentencePiece spells a space inside its pieces
_CUTS = re.compile("([\n\u2581])")  # encoded as bytes, by us: see `SentencePieceTokenizer`
_UNTRAINABLE = re.compile("[\0\t\n\r\u2581\u2585]")  # SentencePiece skips a sentence with one of these, or cuts at it
_MODEL = "tokenizer.model"


class _Own(Tokenizer):
    """A tokenizer made here: the special tokens of `special_tokens`, with the same ids in all of them."""

    bos_ids, eos_id, end_id, pad_id, stop_ids = (BOS_ID,), EOS_ID, END_ID, PAD_ID, (END_ID, EOS_ID)

    def __init__(self, table: Sequence[bytes], model: bytes = b""):
        """table: the bytes of the ids behind the special ones. model: a serialized SentencePiece model, or nothing."""
        self.model, table = model, [b""] * NUM_SPECIAL_TOKENS + list(table)
        content = json.dumps([self.kind, SPECIAL_TOKENS, [piece.hex() for piece in table]]).encode()
        super().__init__(table, dict(enumerate(SPECIAL_TOKENS)), content + model)

    def _files(self) -> dict[str, bytes]:
        return {_MODEL: self.model} if self.model else {}

    def _description(self) -> dict[str, Any]:
        return {"special_tokens": SPECIAL_TOKENS}


class ByteTokenizer(_Own):
    """One id per byte of UTF-8, after the special tokens."""

    kind = "bytes"

    def __init__(self):
        super().__init__([bytes([value]) for value in range(256)])

    def encode_batch(self, texts: Sequence[str], *, threads: int | None = None) -> list[np.ndarray]:
        del threads  # copying bytes is not worth one
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) + NUM_SPECIAL_TOKENS for text in texts]


class SentencePieceTokenizer(_Own):
    """BPE over identity-normalised text; a character that no piece covers falls back to its bytes.

    SentencePiece reads its space mark U+2581 as a space, so text is cut there and we emit the three bytes. It is cut at
    newlines too, which no piece contains: the ids are the same, and short pieces of text are encoded twice as fast.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = range(NUM_SPECIAL_TOKENS, self._processor.vocab_size())
        super().__init__([_piece_bytes(self._processor, index) for index in ids], model)
        byte_id = {self._table[index]: index for index in ids if self._processor.is_byte(index)}
        self._cut_ids = {
            cut: np.array([byte_id[bytes([value])] for value in cut.encode()], np.int32) for cut in ("\n", _SPACE_MARK)
        }

    def encode_batch(self, texts: Sequence[str], *, threads: int | None = None) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        parts = [_CUTS.split(text) for text in texts]  # text, cut, text, cut, ..., text
        flat = [part for pieces in parts for part in pieces[::2]]
        encoded = iter(self._processor.encode(flat, return_type="numpy", num_threads=threads or os.cpu_count()))
        return [
            np.concatenate([self._cut_ids[part] if i % 2 else next(encoded) for i, part in enumerate(pieces)])
            for pieces in parts
        ]


def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def train(texts: Iterable[str], *, vocab_size: int, max_bytes: int = 2**28) -> SentencePieceTokenizer:
    """Learns BPE pieces from the first `max_bytes` bytes of the texts; the same texts give the same model file.

    Args:
      texts: any iterable of texts.
      vocab_size: ids in all, the special tokens and the 256 bytes included.
      max_bytes: the corpus is kept in memory; this bounds it.

    Raises:
      ValueError: no text, or a vocabulary smaller or larger than the corpus supports.
    """
    sentences = list(_sentences(texts, max_bytes))
    if not sentences:
        raise ValueError("the corpus holds no text to train a tokenizer on: name a source with text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, **_TRAINING
        )
    except RuntimeError as error:
        smallest = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        least = int(smallest[1]) if smallest else NUM_SPECIAL_TOKENS + 256
        if vocab_size >= least:
            raise
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {NUM_SPECIAL_TOKENS} special tokens, 256 bytes and this corpus's "
            f"characters need at least {least}; raise vocab_size, or use the byte tokenizer"
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is larger than the corpus supports: at most {tokenizer.vocab_size} "
            "pieces can be learned from it; lower vocab_size, or train on more text"
        )
    return tokenizer


def load(directory: str | os.PathLike) -> Tokenizer:
    """Reads what `save` wrote. Raises FileNotFoundError where it is missing, ValueError where it was changed."""
    path = Path(directory) / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer in {directory}: {DESCRIPTION} is missing; give where one was saved")
    description = json.loads(path.read_text(encoding="utf-8"))
    if "kind" not in description:
        raise ValueError(
            f"{path} was not saved here: import the model that it comes with, or give its folder as a path"
        )
    if description["kind"] not in _READERS:
        raise ValueError(
            f"{path}: kind {description['kind']!r} is not one of {tuple(_READERS)}; save the tokenizer again"
        )
    try:
        tokenizer = _READERS[description["kind"]](path.parent, description)
        found = tokenizer.fingerprint
    except (RuntimeError, LookupError) as error:  # SentencePiece cannot read it, or reads no bytes in it
        found = error
    if found != description["fingerprint"]:
        raise ValueError(
            f"the tokenizer in {directory} was changed or cut short: fingerprint {found}, where {DESCRIPTION} says "
            f"{description['fingerprint']}; save it again"
        )
    return tokenizer


def _read_huggingface(directory: Path, description: dict[str, Any]) -> HuggingFaceTokenizer:
    definition = (directory / DEFINITION).read_text(encoding="utf-8")
    return HuggingFaceTokenizer(definition, **{name: description[name] for name in FACTS})


_READERS: dict[str, Callable[[Path, dict[str, Any]], Tokenizer]] = {
    ByteTokenizer.kind: lambda directory, description: ByteTokenizer(),
    SentencePieceTokenizer.kind: lambda directory, description: SentencePieceTokenizer(
        (directory / _MODEL).read_bytes()
    ),
    HuggingFaceTokenizer.kind: _read_huggingface,
}

_TRAINING = dict(
    model_type="bpe",
    byte_fallback=True,
    hard_vocab_limit=False,  # a corpus too small gives a smaller vocabulary, which we refuse with its size
    # identity: the text comes back as it was
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    # the longest sentence that is not silently skipped
    max_sentence_length=2**30,
    num_threads=1,  # the count is written into the model file, so it may not depend on the machine
    pad_id=PAD_ID, unk_id=UNK_ID, bos_id=BOS_ID, eos_id=EOS_ID,
    pad_piece=SPECIAL_TOKENS[PAD_ID], unk_piece=SPECIAL_TOKENS[UNK_ID],
    bos_piece=SPECIAL_TOKENS[BOS_ID], eos_piece=SPECIAL_TOKENS[EOS_ID],
    control_symbols=list(SPECIAL_TOKENS[EOS_ID + 1:]),  # control: never matched in text
    minloglevel=2,
)  # fmt: skip


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The texts cut where SentencePiece would skip or cut them itself."""
    read = 0
    for text in texts:
        read += len(utf8(text))
        yield from filter(None, _UNTRAINABLE.split(text))
        if read >= max_bytes:
            return


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    piece = processor.id_to_piece(index)
    if processor.is_byte(index):
        return bytes([int(piece[3:5], 16)])  # spelled <0x0A>
    return piece.replace(_SPACE_MARK, " ").encode()
