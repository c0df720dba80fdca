"""Fields of a Hugging Face ``config.json`` beside values of our ``model`` section: pairs of functions, there and back.

What a field says and our decoder cannot do is a ``ValueError`` with the field's name. Defaults are those of the classes
in transformers 5, which is also what decides where a field is read by nobody.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxllm.model.config import WINDOWED

# Fields that do not say which model it is: names, ids, initialisation, how to sample, how to train, how to run.
HARMLESS = frozenset(
    """architectures model_type transformers_version torch_dtype dtype use_cache initializer_range bos_token_id
    max_position_embeddings eos_token_id pad_token_id sep_token_id decoder_start_token_id attention_dropout
    pretraining_tp is_llama_config is_decoder is_encoder_decoder cache_implementation attn_implementation name_or_path
    transformers.js_config return_dict output_attentions output_hidden_states torchscript task_specific_params
    id2label label2id num_labels problem_type finetuning_task tokenizer_class prefix chunk_size_feed_forward
    bad_words_ids begin_suppress_tokens forced_bos_token_id forced_eos_token_id suppress_tokens remove_invalid_values
    do_sample early_stopping temperature top_k top_p typical_p num_beams num_beam_groups diversity_penalty
    length_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size max_length min_length
    num_return_sequences exponential_decay_length_penalty return_dict_in_generate output_scores unsloth_fixed
    unsloth_version model_max_length""".split()
)
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


class Fields:
    """The fields of one model, each taken by who reads it."""

    def __init__(self, family: str, defaults: Mapping[str, Any], said: Mapping[str, Any]):
        self.family, self.given, self.values, self.taken = family, said, {**defaults, **said}, set()

    def __getitem__(self, key: str) -> Any:
        """The field's value; ``ValueError`` where there is none and the family has no default."""
        if key not in self.values:
            raise ValueError(f"config.json of model_type {self.family!r} lacks {key!r}")
        self.taken.add(key)
        return self.values[key]

    def said(self, key: str) -> Any:
        """The field's value in the file itself; None where it is not there."""
        self.taken.add(key)
        return self.given.get(key)

    def refuse_others(self) -> None:
        """``ValueError`` that names each field that nobody took, unless it is known to decide nothing, or is unset."""
        others = {key: x for key, x in self.values.items() if not (key in self.taken or _decides_nothing(key, x))}
        if others:
            named = ", ".join(f"{key}={_short(x)}" for key, x in sorted(others.items()))
            raise ValueError(
                f"config.json of model_type {self.family!r} has {named}: no such thing is known of this family here. "
                "If it does not change what the model computes, take it out of config.json"
            )


def _decides_nothing(key: str, value: Any) -> bool:
    return key in HARMLESS or key.startswith("_") or value is None or value is False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:76] + " ..."


class Part(NamedTuple):
    """Some fields beside some of our values. ``write`` may take ``layer_kinds`` too."""

    read: Callable[[Fields], dict]
    write: Callable[[Mapping[str, Any]], dict]


def same(theirs: str, ours: str) -> Part:
    """A field that is a value of ours under another name."""

    def read(taken):
        if taken[theirs] is None:
            raise ValueError(f"config.json of model_type {taken.family!r} has {theirs}=null")
        return {ours: taken[theirs]}

    return Part(read, lambda config: {theirs: config[ours]})


def fixed(**values: Any) -> Part:
    """What every model of the family is, and its config does not say."""
    return Part(lambda taken: values, lambda config: {})


def unread(key: str) -> Part:
    """A field that the family's published configs have and its code in transformers does not read."""

    def read(taken):
        taken.said(key)
        return {}

    return Part(read, lambda config: {})


def cap(theirs: str, ours: str) -> Part:
    """A soft cap, null where there is none."""
    return Part(lambda taken: {ours: float(taken[theirs] or 0.0)}, lambda config: {theirs: config[ours] or None})


def activation(theirs: str) -> Part:
    """The function of the mlp's gate, under any of its names."""

    def read(taken):
        if taken[theirs] not in ACTIVATIONS:
            raise ValueError(f"config.json has {theirs}={taken[theirs]!r}; known are {sorted(ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[taken[theirs]]}

    names = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return Part(read, lambda config: {theirs: names[config["activation"]]})


def _head_width(taken):
    width, heads = taken["hidden_size"], taken["num_attention_heads"]
    if taken["head_dim"] is None and width % heads:
        raise ValueError(f"config.json has hidden_size={width}, which is not a multiple of num_attention_heads={heads}")
    return {"head_width": taken["head_dim"] or width // heads}


KV_HEADS = Part(
    lambda taken: {"num_kv_heads": taken["num_key_value_heads"] or taken["num_attention_heads"]},
    lambda config: {"num_key_value_heads": config["num_kv_heads"]},
)
HEAD_WIDTH = Part(_head_width, lambda config: {"head_dim": config["head_width"]})
# Of queries, keys, values and the output alike.
ATTENTION_BIAS = Part(
    lambda taken: dict.fromkeys(("qkv_bias", "output_bias"), taken["attention_bias"]),
    lambda config: {"attention_bias": config["output_bias"]},
)
EMBEDDING_SCALE = Part(lambda taken: {"embedding_scale": taken["hidden_size"] ** 0.5}, lambda config: {})


def _score_scale(taken):
    scalar, same_width = taken["query_pre_attn_scalar"], _head_width(taken)["head_width"]
    return {"attention_scale": 0.0 if scalar == same_width else scalar**-0.5}


# An integer in transformers: another scale is one that the family does not have.
SCORE_SCALE = Part(
    _score_scale,
    lambda config: {
        "query_pre_attn_scalar": round(config["attention_scale"] ** -2)
        if config["attention_scale"]
        else config["head_width"]
    },
)
# Gemma 3's config has the field still, and its attention no cap.
UNCAPPED_SCORES = unread("attn_logit_softcapping")

# ---- which layers see how far ----


def _layers(kinds: list[str], window: int | None) -> dict:
    """The shortest pattern that repeats to these layers, and the window if any of them has one."""
    period = next((n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds))), 1)
    windowed = any(kind in WINDOWED for kind in kinds)
    if windowed and not window:
        raise ValueError(f"config.json has layers of sliding attention, but sliding_window={window}")
    return {"layer_pattern": tuple(kinds[:period]), "sliding_window": window if windowed else 0}


def _named_kinds(taken: Fields) -> list[str] | None:
    """The kinds that ``layer_types`` names, one per layer; None where it is not there."""
    types, count = taken["layer_types"], taken["num_hidden_layers"]
    if types is None:
        return None
    if len(types) != count:
        raise ValueError(f"config.json has {len(types)} layer_types and num_hidden_layers={count}; they must agree")
    for name in types:
        if name not in LAYER_TYPES:
            raise ValueError(f"config.json has the layer type {name!r}; known are {sorted(LAYER_TYPES)}")
    return [LAYER_TYPES[name] for name in types]


def _types(config: Mapping) -> list[str]:
    return ["sliding_attention" if kind in WINDOWED else "full_attention" for kind in config["layer_kinds"]]


def _window(config: Mapping) -> int | None:
    return config["sliding_window"] if any(kind in WINDOWED for kind in config["layer_kinds"]) else None


# Mistral: all layers have the window, or none.
ONE_WINDOW = Part(
    lambda taken: _layers(
        ["local" if taken["sliding_window"] else "global"] * taken["num_hidden_layers"], taken["sliding_window"]
    ),
    lambda config: {"sliding_window": _window(config)},
)


def _read_last_layers(taken):
    on, first, window = taken["use_sliding_window"], taken["max_window_layers"], taken["sliding_window"]
    count, kinds = taken["num_hidden_layers"], _named_kinds(taken)
    last = ["local" if on and window and layer >= first else "global" for layer in range(count)]
    return _layers(kinds or last, window if on else None)


def _write_last_layers(config):
    window, types = _window(config), _types(config)
    first = types.index("sliding_attention") if window else len(types)
    fields = dict(use_sliding_window=window is not None, sliding_window=window, max_window_layers=first)
    return fields | dict(layer_types=types)


# Qwen: the layers from max_window_layers on, unless layer_types says it of each.
LAST_LAYERS_WINDOW = Part(_read_last_layers, _write_last_layers)


def every_nth_layer_global(n: int) -> Part:
    """Gemma: layers have the window, but for every n-th; ``layer_types`` says it of each, or a field another n."""

    def read(taken):
        every = taken["sliding_window_pattern"] or n
        others = ["local" if (layer + 1) % every else "global" for layer in range(taken["num_hidden_layers"])]
        return _layers(_named_kinds(taken) or others, taken["sliding_window"])

    return Part(read, lambda config: {"sliding_window": _window(config) or 4096, "layer_types": _types(config)})


def _read_without_rope(taken):
    count, every, says = taken["num_hidden_layers"], taken["no_rope_layer_interval"], taken["no_rope_layers"]
    rotated = [(layer + 1) % every != 0 for layer in range(count)] if says is None else [bool(x) for x in says]
    if len(rotated) < count:
        raise ValueError(
            f"config.json has {len(rotated)} no_rope_layers and num_hidden_layers={count}; they must agree"
        )
    window = taken["sliding_window"] if taken["use_sliding_window"] else None
    others = ["local" if window and not rotates else "global" for rotates in rotated[:count]]
    plain = {"global": "nope", "local": "local_nope"}
    kinds = zip(_named_kinds(taken) or others, rotated, strict=False)
    return _layers([kind if rotates else plain[kind] for kind, rotates in kinds], window)


def _write_without_rope(config):
    window, rotated = _window(config), [int(not kind.endswith("nope")) for kind in config["layer_kinds"]]
    fields = dict(use_sliding_window=window is not None, sliding_window=window, layer_types=_types(config))
    return fields | dict(no_rope_layers=rotated)


# SmolLM 3: zeros in no_rope_layers are layers without positions, every fourth unless it says which.
LAYERS_WITHOUT_ROPE = Part(_read_without_rope, _write_without_rope)

# ---- positions ----

_ROPE_FIELDS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_frequency",
        "high_freq_factor": "high_frequency",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_slow": "low_frequency",
        "beta_fast": "high_frequency",
    },
}
UNSCALED = {"scaling": "none", "factor": 1.0, "original_length": 0, "low_frequency": 1.0, "high_frequency": 4.0}


def _read_scaling(said: Mapping[str, Any], length: int | None) -> dict:
    """Our rope values but for the bases, from one dict of theirs in either generation's spelling."""
    said = {key: x for key, x in said.items() if x is not None and key != "rope_theta"}
    kind, older = said.pop("rope_type", None), said.pop("type", None)
    kind = kind or older or "default"
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"config.json has the rope type {kind!r}; known are {sorted(_ROPE_FIELDS)}")
    table = _ROPE_FIELDS[kind]
    if kind == "yarn":
        said = {"beta_slow": 1.0, "beta_fast": 32.0} | said
        _check_yarn(said)
    if "original_max_position_embeddings" in table and length:
        said.setdefault("original_max_position_embeddings", length)
    if said.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json has a partial_rotary_factor; only whole heads are rotated here")
    if missing := sorted(set(table) - set(said)):
        raise ValueError(f"config.json has the rope type {kind!r} without {missing}")
    if others := {key: x for key, x in said.items() if key not in table}:
        raise ValueError(f"config.json has {others} with the rope type {kind!r}, which is not known here")
    numbers = {ours: float(said[theirs]) for theirs, ours in table.items()}
    if "original_length" in numbers:
        numbers["original_length"] = int(numbers["original_length"])
    return UNSCALED | {"scaling": "none" if kind == "default" else kind} | numbers


def _check_yarn(said: dict) -> None:
    """Takes out what says what the paper does anyway: the factor 0.1 ln(s) + 1, and whole pairs as bounds."""
    usual = 0.1 * math.log(max(said.get("factor", 1.0), 1.0)) + 1.0
    found = said.pop("attention_factor", usual)
    if said.get("factor", 1.0) < 1.0 or not math.isclose(found, usual, rel_tol=1e-6):
        raise ValueError(f"config.json has the rope type 'yarn' with attention_factor={found}; only {usual} is known")
    if said.pop("truncate", True) is not True:
        raise ValueError("config.json has the rope type 'yarn' with truncate=False, which is not known here")


def _write_scaling(rope: Mapping[str, Any]) -> dict:
    kind = "default" if rope["scaling"] == "none" else rope["scaling"]
    return {"rope_type": kind} | {theirs: rope[ours] for theirs, ours in _ROPE_FIELDS[kind].items()}


def _agreed(name: str, *said: Any) -> Any:
    """The one value of what may be said in several places; None where it is said nowhere."""
    values = [x for x in said if x is not None]
    if any(x != values[0] for x in values):
        raise ValueError(f"config.json says {name} twice and differently: {values[0]} and {values[-1]}")
    return values[0] if values else None


def _read_rope(taken):
    newer, older = taken["rope_parameters"] or {}, taken["rope_scaling"] or {}
    length, whole = taken["max_position_embeddings"], {"partial_rotary_factor": taken["partial_rotary_factor"]}
    scaling = _agreed("rope", *(_read_scaling(whole | said, length) for said in (newer, older) if said))
    scaling = scaling or _read_scaling(whole, length)
    theta = _agreed("rope_theta", newer.get("rope_theta"), older.get("rope_theta"), taken.said("rope_theta"))
    return {"rope": {"theta": float(theta or taken["rope_theta"]), "local_theta": 0.0} | scaling}


def _write_rope(config):
    rope = config["rope"]
    scaling = _write_scaling(rope)
    return {
        "rope_theta": rope["theta"],
        "rope_scaling": None if rope["scaling"] == "none" else scaling,
        "rope_parameters": scaling | {"rope_theta": rope["theta"]},
    }


# transformers 5 has all in rope_parameters; before it there were rope_theta and rope_scaling. Both are written.
ROPE = Part(_read_rope, _write_rope)


def _read_two_ropes(taken):
    newer, length = taken["rope_parameters"] or {}, taken["max_position_embeddings"]
    whole, local = newer.get("full_attention") or {}, newer.get("sliding_attention") or {}
    if others := sorted(set(newer) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"config.json has rope_parameters of {others}; known are full_attention and sliding_attention")
    if taken["partial_rotary_factor"] not in (None, 1.0):
        raise ValueError("config.json has a partial_rotary_factor; only whole heads are rotated here")
    scaling = _agreed("rope", *(_read_scaling(said, length) for said in (whole, taken["rope_scaling"]) if said))
    if _read_scaling(local, length) != UNSCALED:
        raise ValueError(f"config.json has rope_parameters of sliding_attention {local}; only 'default' is known there")
    theta = _agreed("rope_theta", whole.get("rope_theta"), taken.said("rope_theta"))
    local_theta = _agreed("rope_local_base_freq", local.get("rope_theta"), taken.said("rope_local_base_freq"))
    thetas = (theta or taken["rope_theta"], local_theta or taken["rope_local_base_freq"])
    return {"rope": dict(zip(("theta", "local_theta"), map(float, thetas), strict=True)) | (scaling or UNSCALED)}


def _write_two_ropes(config):
    rope = config["rope"]
    scaling, local_theta = _write_scaling(rope), rope["local_theta"] or rope["theta"]
    local = {"rope_type": "default", "rope_theta": local_theta}
    return {
        "rope_theta": rope["theta"],
        "rope_local_base_freq": local_theta,
        "rope_scaling": None if rope["scaling"] == "none" else scaling,
        "rope_parameters": {
            "full_attention": scaling | {"rope_theta": rope["theta"]},
            "sliding_attention": local,
        },
    }


# Gemma 3: local layers have a base of their own, and are never stretched.
TWO_ROPES = Part(_read_two_ropes, _write_two_ropes)
