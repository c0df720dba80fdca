"""Tokenizers of other people's models: a `tokenizer.json` of Hugging Face, read by the package `tokenizers`.

Ids are those of transformers without special tokens added, except that no text ever becomes a control token: one that
has no other ids is refused.
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np

from jaxllm.text import template as templates
from jaxllm.text.base import Tokenizer, utf8

_PACKAGE = "tokenizers==0.23.3"
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPACE_MARK = "\u2581"
DEFINITION, FACTS = "definition.json", ("template", "eos", "bos", "pad", "stop")  # what is saved, and by which names


class HuggingFaceTokenizer(Tokenizer):
    """A vocabulary of bytes (as GPT-2, Llama 3 and Qwen have) or of SentencePiece's kind (Llama 2, Gemma).

    `decode` joins the bytes of ids, so `decode(encode(text)) == text` wherever the definition keeps what it reads. It
    gives the text in its normal form where a normaliser makes one (Qwen: NFC), and with a space before it where the
    definition puts one there (Llama 2), which then counts as a byte.

    Args:
      definition: the JSON text of a `tokenizer.json`.
      template: the Jinja source of the chat template; "" for our own, which only our tokenizers can spell.
      eos: spelling of the token that ends a document. bos: of what templates call `bos_token`, where that is not what
        the definition itself puts before a text. pad: of the token that fills up; `eos` unless told.
      stop: spellings of further tokens that end an answer. What the template writes behind an answer is the end of a
        turn, or else the first of these, or `eos`.

    Raises:
      ValueError: a definition of another kind, a token that is not in it, a template that is no Jinja.
    """

    kind = "huggingface"

    def __init__(
        self, definition: str, *, template: str = "", eos: str, bos: str = "", pad: str = "", stop: Sequence[str] = ()
    ):
        self.definition, self.template = definition, template
        self._given = {"template": template, "eos": eos, "bos": bos, "pad": pad, "stop": list(stop)}
        self._values = _values(definition)
        added = {entry["content"]: entry for entry in self._values["added_tokens"]}
        for spelled in filter(None, (eos, bos, pad, *stop)):
            self._make_special(spelled, added)
        specials = {entry["id"]: name for name, entry in added.items() if entry["special"]}
        table = _table(self._values)
        content = json.dumps([self.kind, self._values, self._given], sort_keys=True).encode()
        super().__init__([b"" if id in specials else piece for id, piece in enumerate(table)], specials, content)
        self._takes_before, self._takes_behind = (
            {entry["id"] for entry in added.values() if entry[side]} for side in ("lstrip", "rstrip")
        )
        self._reader = _reader(self._values)
        moved = {name: entry["id"] for name, entry in added.items() if self._reader.token_to_id(name) != entry["id"]}
        if moved:
            raise ValueError(f"the definition gives ids that its vocabulary has not, and others would be read: {moved}")
        self.bos_ids = self._before_a_text()
        self.eos_id = added[eos]["id"]
        self.pad_id = added[pad]["id"] if pad else self.eos_id
        unknown = _unknown(self._values["model"])
        self._refused = np.array(sorted(self.special_ids - {id for id, name in specials.items() if name == unknown}))
        opening = bos or (specials[self.bos_ids[0]] if self.bos_ids else "")
        names = {"bos_token": opening, "eos_token": eos, "pad_token": pad, "unk_token": unknown}
        self.template_names = {name: spelled for name, spelled in names.items() if spelled}
        self.stop_ids = (*(added[name]["id"] for name in stop), self.eos_id)
        end = templates.turn_end(self) if template else None
        self.end_id = self.stop_ids[0] if end is None else end
        self.stop_ids = tuple(dict.fromkeys((self.end_id, *self.stop_ids)))

    def encode_batch(self, texts: Sequence[str], *, threads: int | None = None) -> list[np.ndarray]:
        del threads  # the package takes all processors, or as many as RAYON_NUM_THREADS says
        return self._encoded(texts, self._reader)

    def encode_pieces(self, sequences: Sequence[Sequence[int | str]]) -> list[list[np.ndarray]]:
        """As those of ``Tokenizer``. A space that the definition puts before texts comes where transformers puts it
        when it reads the whole: never before a text that goes on, and for some only where nothing precedes.
        """
        texts, places = defaultdict(list), defaultdict(list)
        encoded = [
            [None if isinstance(piece, str) else np.array([piece], np.int32) for piece in pieces]
            for pieces in sequences
        ]
        for own, pieces in zip(encoded, sequences, strict=True):
            around = zip([None, *pieces], pieces, [*pieces[1:], None], strict=False)
            for place, (before, piece, behind) in enumerate(around):
                if isinstance(piece, str):
                    texts[type(before)].append(self._stripped(before, piece, behind))
                    places[type(before)].append((own, place))
        for before, given in texts.items():
            for (own, place), ids in zip(places[before], self._encoded(given, self._reader_after(before)), strict=True):
                own[place] = ids
        return encoded

    def _stripped(self, before: int | str | None, text: str, behind: int | str | None) -> str:
        """The text without the blanks that the control tokens beside it take."""
        text = text.lstrip() if before in self._takes_behind else text
        return text.rstrip() if behind in self._takes_before else text

    def _reader_after(self, before: type):
        """What reads a text behind nothing, behind a control token (int), or behind another text."""
        if before is int:
            return self._reader_behind_control
        return self._reader_within if before is str else self._reader

    def _encoded(self, texts: Sequence[str], reader) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        encoded = []
        for text, found in zip(texts, reader.encode_batch(list(texts), add_special_tokens=False), strict=True):
            ids = np.array(found.ids, np.int32)
            refused = np.isin(ids, self._refused)
            encoded.append(self._apart(text, [*compress(found.offsets, refused)], reader) if refused.any() else ids)
        return encoded

    def _apart(self, text: str, spans: Sequence[tuple[int, int]], reader) -> np.ndarray:
        """Ids of a text in which the reader finds control tokens in these places: it is cut behind their first sign."""
        for start, stop in spans:
            if stop - start < 2:
                raise ValueError(
                    f"{text[start:stop]!r} at position {start} of a text is a control token of this tokenizer, which "
                    "has no other ids for it: take it out of the text, or do not name it as eos, pad or stop"
                )
        cuts = [start + 1 for start, _ in spans]
        first, *rest = (text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True))
        return np.concatenate([*self._encoded([first], reader), *self._encoded(rest, self._reader_within)])

    @functools.cached_property
    def _reader_behind_control(self):
        return _changed(self._values, self._reader, _first_only)

    @functools.cached_property
    def _reader_within(self):
        return _changed(self._values, self._reader, _never)

    def _before_a_text(self) -> tuple[int, ...]:
        """The control tokens that the definition puts before a text."""
        found = self._reader.encode("a")
        behind = next((n for n, mark in enumerate(found.special_tokens_mask) if not mark), len(found.ids))
        return tuple(found.ids[:behind])

    def _make_special(self, spelled: str, added: dict[str, dict]) -> None:
        """Makes a token one that no text becomes."""
        if spelled not in added:
            vocabulary = _vocabulary(self._values["model"])
            if spelled not in vocabulary:
                raise ValueError(f"the token {spelled!r} is not in the tokenizer's definition: name one that is")
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added[spelled] = {"id": vocabulary[spelled], "content": spelled, **flags}
            self._values["added_tokens"].append(added[spelled])
        added[spelled]["special"] = True

    def _files(self) -> dict[str, bytes]:
        return {DEFINITION: self.definition.encode()}

    def _description(self) -> dict[str, Any]:
        return self._given


def _values(definition: str) -> dict[str, Any]:
    """The definition as values, without what would cut or fill up texts."""
    try:
        values = json.loads(definition)
        values["added_tokens"], values["model"]["vocab"], values["decoder"]  # noqa: B018
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"this is no definition of a Hugging Face tokenizer ({error!r}): give a tokenizer.json"
        ) from error
    return values | {"truncation": None, "padding": None}


def _reader(values: Mapping[str, Any]):
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"tokenizers of other people's models need a package: pip install {_PACKAGE}") from error
    try:
        reader = tokenizers.Tokenizer.from_str(json.dumps(values))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"the package tokenizers cannot read the definition: {error}") from error
    reader.encode_special_tokens = True
    return reader


def _changed(values: Mapping[str, Any], reader, change):
    """A reader of the definition with its parts changed; the same one where nothing is."""
    parts = {name: _walked(values.get(name), change) for name in ("normalizer", "pre_tokenizer")}
    return reader if all(values.get(name) == part for name, part in parts.items()) else _reader({**values, **parts})


def _walked(part: Any, change) -> Any:
    """A normaliser or pre-tokenizer, each of whose steps is what ``change`` makes of it; None leaves it out."""
    if not isinstance(part, Mapping):
        return part
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return {**part, name: [kept for step in part[name] if (kept := _walked(step, change)) is not None]}
    return change(part)


def _first_only(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the space that only the very first text gets."""
    return {**step, "prepend_scheme": "never"} if step.get("prepend_scheme") == "first" else step


def _never(step: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Without the space that texts get."""
    if step["type"] == "Prepend":
        return None
    own = {"prepend_scheme": "never"} if step["type"] == "Metaspace" else {}
    return {**step, **own, **({"add_prefix_space": False} if "add_prefix_space" in step else {})}


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """Ids by spelling, of a BPE or a unigram model."""
    vocabulary = model["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {piece: id for id, (piece, _) in enumerate(vocabulary)}


def _unknown(model: Mapping[str, Any]) -> str | None:
    """The token that stands for signs without ids, which texts may become: a unigram model names it by its id."""
    place = model.get("unk_id")
    return model.get("unk_token") if place is None else model["vocab"][place][0]


def _table(values: Mapping[str, Any]) -> list[bytes]:
    """The bytes of each id, none for one that the definition leaves out."""
    own = _own_bytes(values)
    spelled = {id: own(piece) for piece, id in _vocabulary(values["model"]).items()}
    spelled |= {entry["id"]: entry["content"].encode() for entry in values["added_tokens"]}
    return [spelled.get(id, b"") for id in range(1 + max(spelled))]


def _own_bytes(values: Mapping[str, Any]):
    """A function: a piece of the vocabulary -> the bytes that it stands for."""
    kinds = {step["type"] for name in ("decoder", "pre_tokenizer") for step in _steps(values.get(name))}
    if "ByteLevel" in kinds:
        return _gpt2_bytes
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return _sentencepiece_bytes
    raise ValueError(
        f"the tokenizer's definition decodes by {sorted(kinds)}: ids stand for bytes in vocabularies of bytes "
        "(ByteLevel) and of SentencePiece (Metaspace, ByteFallback) only"
    )


def _steps(part: Any) -> list[Mapping[str, Any]]:
    if not isinstance(part, Mapping):
        return []
    inner = next((part[name] for name in ("decoders", "pretokenizers") if name in part), None)
    return [part] if inner is None else [step for each in inner for step in _steps(each)]


@functools.cache
def gpt2_alphabet() -> dict[str, int]:
    """Which byte a sign of GPT-2's vocabulary is: what is printable stands for itself, the rest are moved up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _gpt2_bytes(piece: str) -> bytes:
    alphabet = gpt2_alphabet()
    return bytes(alphabet[sign] for sign in piece) if all(sign in alphabet for sign in piece) else piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE_MARK, " ").encode()
