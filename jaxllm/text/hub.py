"""The tokenizer of a Hugging Face folder: a definition, and files beside it that say what its tokens are for.

What transformers would load is loaded; where two files differ, the one that it believes is believed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.text.huggingface import HuggingFaceTokenizer

DEFINITION, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, GENERATION, MODEL = "chat_template.jinja", "generation_config.json", "config.json"


def is_folder(directory: str | os.PathLike) -> bool:
    """Whether a definition of Hugging Face's lies here: the description of a tokenizer of ours has the same name."""
    path = Path(directory) / DEFINITION
    return path.is_file() and "kind" not in _json(path)


def read(folder: str | os.PathLike) -> HuggingFaceTokenizer:
    """The tokenizer with its chat template, if it has one, and the ends that ``generation_config.json`` lists.

    Raises ``FileNotFoundError`` where there is no ``tokenizer.json``, and ``ValueError`` where no token ends a text, or
    where the files name tokens that the definition lacks.
    """
    folder = Path(folder)
    path = folder / DEFINITION
    if not path.is_file():
        raise FileNotFoundError(_missing(folder))
    config, special = (_json(folder / name) for name in (CONFIG, SPECIAL))
    names = {name: _spelling(config.get(name) or special.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    definition = path.read_text(encoding="utf-8")
    spelled = _spellings(path, definition, config)
    ends = [spelled[id] for id in _ends(folder) if id in spelled]
    if not (eos := names["eos_token"] or next(iter(ends), "")):
        raise ValueError(f"{folder} names no token that ends a text: give eos_token in {CONFIG}")
    facts = dict(eos=eos, bos=names["bos_token"], pad=names["pad_token"], stop=ends)
    made = HuggingFaceTokenizer(definition, template=_template(folder, config), **facts)
    if "add_bos_token" not in config:
        return made
    # What the config says replaces what the definition puts around a text.
    wanted = config["add_bos_token"] and bool(names["bos_token"])
    id = next(id for id, token in made.special_tokens.items() if token == names["bos_token"]) if wanted else None
    if made.bos_ids == (() if id is None else (id,)):
        return made
    values = json.loads(definition) | {"post_processor": opening_with(names["bos_token"], id)}
    return HuggingFaceTokenizer(json.dumps(values, ensure_ascii=False), template=made.template, **facts)


def _missing(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has a tokenizer.model and no {DEFINITION}: write one with transformers, "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"no tokenizer in {folder}: {DEFINITION} is missing; give the folder of a Hugging Face model"


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object: fetch it again")
    return values


def _spelling(token: str | Mapping | None) -> str:
    return token["content"] if isinstance(token, Mapping) else token or ""


def _spellings(path: Path, definition: str, config: Mapping[str, Any]) -> dict[int, str]:
    """The added tokens by id. ``ValueError`` where the config adds others than the definition."""
    try:
        added = {entry["id"]: entry["content"] for entry in json.loads(definition)["added_tokens"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is no definition of a Hugging Face tokenizer ({error!r})") from error
    further = {int(id): _spelling(token) for id, token in config.get("added_tokens_decoder", {}).items()}
    unknown = {id: token for id, token in further.items() if added.get(id) != token}
    if unknown:
        raise ValueError(f"{CONFIG} adds tokens that {path} lacks: {unknown}; write both with one transformers")
    return added


def _ends(folder: Path) -> list[int]:
    """What ``generation_config.json`` stops at, or else ``config.json``."""
    found = [_json(folder / name).get("eos_token_id") for name in (GENERATION, MODEL)]
    ids = next((each for each in found if each is not None), [])
    return ids if isinstance(ids, list) else [ids]


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default", "")
    return template


def opening_with(spelled: str, id: int | None) -> dict[str, Any]:
    """The part of a definition that puts this token before a text, or nothing where there is no id."""
    single, known = [{"Sequence": {"id": "A", "type_id": 0}}], {}
    if id is not None:
        single.insert(0, {"SpecialToken": {"id": spelled, "type_id": 0}})
        known[spelled] = {"id": spelled, "ids": [id], "tokens": [spelled]}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
