"""What every tokenizer shares: an id stands for a fixed string of bytes, or is a control token.

Whoever needs a special token asks the tokenizer for it: other people's models have other ids for the same purposes.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTION, _BYTE_LENGTHS = "tokenizer.json", "byte_lengths.npy"


class Tokenizer:
    """The table of bytes of each id, the control tokens, and encoding and decoding on top of them.

    kind: the name under which `load` finds the class. special_tokens: how each control token is spelled, by its id;
    special_ids: these ids. bos_ids: what opens a document (nothing, in some vocabularies); eos_id ends it; end_id ends
    a turn; stop_ids: where sampling stops, the end of a turn first; pad_id fills up. template: the Jinja source of the
    chat template, which knows control tokens by template_names ("bos_token", ...); "" is our own (`chat`).
    """

    kind = ""
    bos_ids: tuple[int, ...]
    eos_id: int
    end_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    template = ""
    template_names: Mapping[str, str] = {}

    def __init__(self, table: Sequence[bytes], special_tokens: Mapping[int, str], content: bytes):
        """table: the bytes of each id, none for a control token. content: what the fingerprint is of."""
        self._table = list(table)
        self.special_tokens = dict(special_tokens)
        self.special_ids = frozenset(self.special_tokens)
        self.byte_lengths_V = np.array([len(piece) for piece in self._table], np.int32)
        self.fingerprint = hashlib.sha256(content).hexdigest()

    @functools.cached_property
    def special_pattern(self) -> re.Pattern:
        """Finds what spells a control token, and splits at it."""
        longest_first = sorted(self.special_tokens.values(), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that an id stands for: none for a special token, or past the vocabulary, where a model may
        have rows for nothing. Raises ValueError for an id below 0.
        """
        if token < 0:
            raise ValueError(f"token id {token} is outside of the vocabulary: ids are 0..{self.vocab_size - 1}")
        return self._table[token] if token < self.vocab_size else b""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no special token is added, and none is recognised in it.

        Raises ValueError where the text is not valid Unicode (a lone surrogate).
        """
        return self.encode_batch([text], threads=1)[0].tolist()

    def encode_batch(self, texts: Sequence[str], *, threads: int | None = None) -> list[np.ndarray]:
        """int32 ids of each text; threads: how many to use, all processors by default."""
        raise NotImplementedError

    def encode_pieces(self, sequences: Sequence[Sequence[int | str]]) -> list[list[np.ndarray]]:
        """int32 ids of each piece of each sequence, control tokens given by id between texts; all are read at once."""
        texts = [piece for pieces in sequences for piece in pieces if isinstance(piece, str)]
        encoded = iter(self.encode_batch(texts))
        return [
            [next(encoded) if isinstance(piece, str) else np.array([piece], np.int32) for piece in pieces]
            for pieces in sequences
        ]

    def documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text as a whole document: what opens it, its text, its end."""
        edges = np.array(self.bos_ids, np.int32), np.array([self.eos_id], np.int32)
        return [np.concatenate([edges[0], ids, edges[1]]) for ids in self.encode_batch(texts)]

    def opening(self, text: str) -> list[int]:
        """Ids of a document's beginning, never none: where nothing opens a document, it follows the end of another."""
        return [*self.bos_ids, *self.encode(text)] or [self.eos_id]

    def decode(self, tokens: Iterable[int]) -> str:
        """The bytes of the ids joined, read as UTF-8 (a cut character gives U+FFFD); special tokens as spelled."""
        spelled = (
            self.special_tokens[token].encode() if token in self.special_ids else self.token_bytes(token)
            for token in tokens
        )
        return b"".join(spelled).decode(errors="replace")

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the description, the files that the class adds, and the byte-length table."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files().items():
            (directory / name).write_bytes(content)
        np.save(directory / _BYTE_LENGTHS, self.byte_lengths_V)
        whole = {"kind": self.kind, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        # last, and by renaming: a directory with a description is whole
        partial = directory / (DESCRIPTION + ".partial")
        partial.write_text(json.dumps(whole | self._description(), indent=1) + "\n", encoding="utf-8")
        partial.replace(directory / DESCRIPTION)

    def _files(self) -> dict[str, bytes]:
        """What `save` writes beside the description, by name."""
        return {}

    def _description(self) -> dict[str, Any]:
        """What the description says beside the kind, the size and the fingerprint."""
        return {}


def utf8(text: str) -> bytes:
    """The bytes of a text. Raises ValueError where it is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text is not valid Unicode: lone surrogate {text[error.start]!a} at position {error.start}; decode the "
            "bytes as strict UTF-8, or with errors='replace'"
        ) from error
