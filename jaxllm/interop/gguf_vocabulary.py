"""Tokenizers in the metadata of GGUF files: a definition of Hugging Face's out of them, and them out of a tokenizer.

llama.cpp knows two kinds: "gpt2", byte-level BPE whose texts are cut by an expression that has a name, and "llama",
SentencePiece's BPE by scores.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sentencepiece

from jaxllm.interop import tokenizers
from jaxllm.text.hub import opening_with
from jaxllm.text.huggingface import HuggingFaceTokenizer
from jaxllm.text.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_SPACE_MARK = "\u2581"
_KEY = "tokenizer.ggml."
_PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}

# ---- how byte-level texts are cut ----

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Cut(NamedTuple):
    """steps: of a definition's pre-tokenizer, before the bytes are spelled. bos: whether llama.cpp puts it before texts
    unless it is told. ignore_merges: whether a whole word that is a piece is one.
    """

    steps: tuple[Mapping[str, Any], ...]
    normalizer: str = ""
    bos: bool = False
    ignore_merges: bool = False


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT2 = {"type": "ByteLevel", "use_regex": True}
CUTS = {
    "gpt-2": Cut((_GPT2,)),
    "smollm": Cut((_DIGITS, _GPT2)),
    "llama-bpe": Cut((_split(_LLAMA3),), bos=True, ignore_merges=True),
    "smaug-bpe": Cut((_split(_LLAMA3),), ignore_merges=True),
    "dbrx": Cut((_split(_LLAMA3),)),
    "qwen2": Cut((_split(_QWEN2),), normalizer="NFC"),
    "tekken": Cut((_split(_TEKKEN),), bos=True, ignore_merges=True),
}
_SAME_CUTS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "olmo": "gpt-2"}
_SAME_CUTS |= dict.fromkeys(("starcoder", "refact", "command-r"), "smollm")
_SAME_CUTS |= {"phi-2": "gpt-2", "mpt": "gpt-2"}


# ---- in ----


def read(metadata: Mapping[str, Any]) -> HuggingFaceTokenizer:
    """The tokenizer with its chat template.

    Raises ``ValueError`` for metadata without a tokenizer, and for another kind, or another way to cut texts, than
    those known here.
    """
    kind, pieces = metadata.get(f"{_KEY}model"), metadata.get(f"{_KEY}tokens")
    if kind not in _MODELS or not pieces:
        raise ValueError(f"the metadata have {_KEY}model={kind!r}; known are {sorted(_MODELS)}, with {_KEY}tokens")
    types = metadata.get(f"{_KEY}token_type") or [NORMAL] * len(pieces)
    values = _MODELS[kind](metadata, pieces, types)
    control = {id for id, type in enumerate(types) if type in (CONTROL, UNKNOWN)}
    named = {name: pieces[metadata[key]] for name, suffix in _ROLES.items() if (key := _KEY + suffix) in metadata}
    opening = metadata.get(f"{_KEY}add_bos_token", values.pop("bos")) and "bos" in named
    added = [
        {"id": id, "content": pieces[id], **_PLAIN, "special": id in control}
        for id, type in enumerate(types)
        if id in control or type == USER_DEFINED
    ]
    before = opening_with(named.get("bos", ""), metadata[f"{_KEY}bos_token_id"] if opening else None)
    shape = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": before}
    if "eos" not in named:
        raise ValueError(f"the metadata have no {_KEY}eos_token_id: nothing says where a text ends")
    turn = metadata.get(f"{_KEY}eot_token_id")
    stop = [] if turn is None else [pieces[turn]]
    template = metadata.get("tokenizer.chat_template", "")
    return HuggingFaceTokenizer(json.dumps(shape | values), template=template, stop=stop, **named)


def _byte_level(metadata: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    name = metadata.get(f"{_KEY}pre")
    name = _SAME_CUTS.get(name, name)
    if name not in CUTS:
        known = sorted({*CUTS, *_SAME_CUTS})
        raise ValueError(f"the metadata have {_KEY}pre={name!r}: how its texts are cut is known for {known}")
    cut = CUTS[name]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": _GPT2 in cut.steps}
    steps = [*(step for step in cut.steps if step != _GPT2), level]
    vocabulary = _vocabulary(pieces, types)
    merges = [pair.split(" ", 1) for pair in metadata[f"{_KEY}merges"]]
    return {
        "model": _bpe(vocabulary, merges, ignore_merges=cut.ignore_merges),
        "normalizer": {"type": cut.normalizer} if cut.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**level, "use_regex": True},
        "bos": cut.bos,
    }


def _by_scores(metadata: Mapping[str, Any], pieces: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    scores = metadata[f"{_KEY}scores"]
    vocabulary = _vocabulary(pieces, types)
    joined = {piece: scores[id] for piece, id in vocabulary.items() if types[id] in (NORMAL, USER_DEFINED)}
    merges = tokenizers.merges(joined)
    unknown = next((pieces[id] for id, type in enumerate(types) if type == UNKNOWN), None)
    prefix = metadata.get(f"{_KEY}add_space_prefix", True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}
    back = {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    before = [{"type": "Prepend", "prepend": _SPACE_MARK}] if prefix else []
    return {
        "model": _bpe(vocabulary, merges, unk_token=unknown, byte_fallback=BYTE in types, fuse_unk=True),
        "normalizer": {"type": "Sequence", "normalizers": [*before, space]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "bos": True,
    }


def _vocabulary(pieces: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Control tokens too: the package gives those that are not in it the ids that follow."""
    return {piece: id for id, (piece, type) in enumerate(zip(pieces, types, strict=True)) if type != UNUSED}


_MODELS = {"gpt2": _byte_level, "llama": _by_scores}


def _bpe(vocabulary: Mapping[str, int], merges: list, **changed: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    plain |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE"} | plain | changed | {"vocab": vocabulary, "merges": merges}


# ---- out ----


def metadata(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """What says this tokenizer to llama.cpp, for a model with ``size`` rows in its embedding.

    There a text has the same ids, but for the sign U+2581, which SentencePiece means a space by. Raises ``ValueError``
    for a tokenizer that llama.cpp has not.
    """
    said = _kind(tokenizer)
    tokens, types = said.pop("tokens"), said.pop("token_type")
    more = range(len(tokens), size)
    said |= {"tokens": [*tokens, *(f"[PAD{id}]" for id in more)], "token_type": [*types, *(UNUSED for _ in more)]}
    if "scores" in said:
        said["scores"] = [*said["scores"], *(0.0 for _ in more)]
    ids = {"eos_token_id": tokenizer.eos_id, "padding_token_id": tokenizer.pad_id, "eot_token_id": tokenizer.end_id}
    opening = tokenizer.template_names.get("bos_token") if tokenizer.template_names else None
    spelled = {name: id for id, name in tokenizer.special_tokens.items()}
    bos = tokenizer.bos_ids[0] if tokenizer.bos_ids else spelled.get(opening)
    ids |= {} if bos is None else {"bos_token_id": bos}
    said |= ids | {"add_bos_token": bool(tokenizer.bos_ids), "add_eos_token": False}
    template = tokenizers.template_of(tokenizer)
    return {_KEY + key: x for key, x in said.items()} | ({"tokenizer.chat_template": template} if template else {})


def _kind(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _own(tokenizer, _pieces(tokenizer))
    if isinstance(tokenizer, ByteTokenizer):
        first = len(tokenizer.special_tokens)
        spelled = [(f"<0x{id - first:02X}>", 0.0, BYTE) for id in range(first, tokenizer.vocab_size)]
        # A space is U+2581 before it is looked for, and would fall back to that sign's bytes.
        spelled[ord(" ")] = (_SPACE_MARK, 0.0, NORMAL)
        return _own(tokenizer, spelled)
    values = json.loads(tokenizer.definition)
    if values["model"]["type"] != "BPE":
        raise ValueError(f"llama.cpp is given BPE here, and the tokenizer is {values['model']['type']!r}")
    said = _listed(tokenizer, values["model"]["vocab"], values["added_tokens"])
    byte_level = '"ByteLevel"' in json.dumps([values["pre_tokenizer"], values["decoder"]])
    return said | (_cut_as(values) if byte_level else _scored(values, said))


def _pieces(tokenizer: SentencePieceTokenizer) -> list[tuple[str, float, int]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = range(len(tokenizer.special_tokens), tokenizer.vocab_size)
    kinds = (BYTE if processor.is_byte(id) else NORMAL for id in ids)
    return [(processor.id_to_piece(id), processor.get_score(id), kind) for id, kind in zip(ids, kinds, strict=True)]


def _own(tokenizer: Tokenizer, pieces: Iterable[tuple[str, float, int]]) -> dict[str, Any]:
    special = [(name, 0.0, UNKNOWN if id == 1 else CONTROL) for id, name in sorted(tokenizer.special_tokens.items())]
    tokens, scores, types = map(list, zip(*special, *pieces, strict=True))
    said = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": types}
    return said | {"add_space_prefix": False, "unknown_token_id": 1}


def _listed(tokenizer: Tokenizer, vocabulary: Mapping[str, int], added: Iterable[Mapping]) -> dict[str, Any]:
    """The pieces of other people's tokenizer in the order of their ids."""
    spelled = {id: (piece, NORMAL) for piece, id in vocabulary.items()}
    spelled |= {entry["id"]: (entry["content"], USER_DEFINED) for entry in added}
    spelled |= {id: (name, CONTROL) for id, name in tokenizer.special_tokens.items()}
    pieces = [spelled.get(id, (f"[PAD{id}]", UNUSED)) for id in range(1 + max(spelled))]
    return {"tokens": [piece for piece, _ in pieces], "token_type": [type for _, type in pieces]}


def _cut_as(values: Mapping[str, Any]) -> dict[str, Any]:
    """What says a byte-level tokenizer, with the name of how it cuts."""
    steps, normalizer = _essence(values["pre_tokenizer"]), (values.get("normalizer") or {}).get("type", "")
    whole = bool(values["model"].get("ignore_merges"))
    same = [name for name, cut in CUTS.items() if list(map(_bare, cut.steps)) == steps and cut.normalizer == normalizer]
    name = next((name for name in same if CUTS[name].ignore_merges == whole), None)
    if name is None:
        raise ValueError(f"llama.cpp has no name for how this tokenizer cuts texts: {values['pre_tokenizer']}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in values["model"]["merges"]]
    return {"model": "gpt2", "pre": name, "merges": merges}


def _essence(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps that cut, each without what does not decide where."""
    steps = [] if part is None else part.get("pretokenizers", [part])
    return [_bare(step) for step in steps if step["type"] != "ByteLevel" or step.get("use_regex", True)]


def _bare(step: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x for key, x in step.items() if key in ("type", "pattern", "behavior", "individual_digits")}


def _scored(values: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """What says a tokenizer of SentencePiece's kind: a piece scores by how early it is joined."""
    merges = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in values["model"]["merges"])
    scores: dict[str, float] = {}
    for left, right in merges:
        scores.setdefault(left + right, -float(len(scores)))
    types = [BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else type for piece, type in _pairs(said)]
    unknown = values["model"]["unk_token"]
    types = [UNKNOWN if piece == unknown else type for piece, type in zip(said["tokens"], types, strict=True)]
    prefix = "Prepend" in json.dumps(values["normalizer"]) or '"prepend_scheme": "' in json.dumps(
        values["pre_tokenizer"]
    ).replace('"prepend_scheme": "never"', "")
    last = -float(len(scores))
    own = {"model": "llama", "pre": "default", "add_space_prefix": prefix, "token_type": types}
    own["scores"] = [scores.get(piece, last) for piece in said["tokens"]]
    return own | ({"unknown_token_id": said["tokens"].index(unknown)} if unknown else {})


def _pairs(said: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    return zip(said["tokens"], said["token_type"], strict=True)
