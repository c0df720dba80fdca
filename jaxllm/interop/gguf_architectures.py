"""The architectures of llama.cpp beside families of Hugging Face's: metadata of a GGUF file are fields of a
``config.json`` under other names, and its arrays are the tensors, so that a family's table in ``families`` holds for
both.

Where they differ: rows of queries and keys are interleaved for the architectures that llama.cpp rotates in neighbouring
pairs (a wrong choice still answers plausibly: a likelihood sees it), Gemma's norms are stored with their 1, and RoPE of
Llama 3 is an array of factors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.interop import families, gguf_format
from jaxllm.interop.families import FAMILIES, Tensor
from jaxllm.interop.fields import UNSCALED
from jaxllm.interop.gguf_format import Entry
from jaxllm.model import DecoderConfig
from jaxllm.model.config import RopeConfig
from jaxllm.model.rope import wavelengths


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One ``general.architecture`` of llama.cpp.

    family: whose ``config.json`` says the same. interleaved: whether the two halves of a head are. keys: further names
    of fields; needed: those that have no default here. biases: which of them llama.cpp knows; tied: whether it knows
    no head but the embedding; square: whether it wants a query's heads to be as wide together as the model.
    old_scale: depth of the one model whose scores are scaled by width / heads.
    """

    name: str
    family: str
    interleaved: bool = False
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needed: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    tied: bool = False
    square: bool = False
    old_scale: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The family's table, with the names of this format."""
        return tuple(tensor._replace(name=NAMES[tensor.parameter]) for tensor in FAMILIES[self.family].tensors)


_BLOCK = {
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/output": "attn_output",
    "attention/query_norm": "attn_q_norm",
    "attention/key_norm": "attn_k_norm",
    "attention_pre_norm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
    "mlp_pre_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
}
_ENDINGS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Our parameter -> its array, or the array of each of its layers.
NAMES = {"embedding/table": EMBEDDING, "final_norm/scale": "output_norm.weight", "head/kernel": HEAD} | {
    f"blocks/{ours}/{ending}": f"blk.{{}}.{theirs}.{spelled}"
    for ours, theirs in _BLOCK.items()
    for ending, spelled in _ENDINGS.items()
}

# Key behind the architecture's name -> field of a config.json.
KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}
NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
NEEDED += ("attention.layer_norm_rms_epsilon",)
SCALING = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# What decides nothing that is not said elsewhere.
_UNREAD = ("vocab_size", "rope.scaling.finetuned", "rope.dimension_count_swa", "attention.key_length_swa")
_UNREAD += ("attention.value_length_swa",)
# What nothing but the factors themselves say of Llama 3's RoPE is as it was published.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH = 8192
_SOFT_CAPS = {key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")}
_WINDOW = {"attention.sliding_window": "sliding_window"}

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", "llama", interleaved=True, biases=("qkv_bias", "output_bias", "mlp_bias")),
        Architecture("qwen2", "qwen2", biases=("qkv_bias",), square=True),
        Architecture("qwen3", "qwen3"),
        Architecture("smollm3", "smollm3", interleaved=True),
        Architecture("olmo2", "olmo2", square=True),
        Architecture("gemma2", "gemma2", keys=_SOFT_CAPS | _WINDOW, needed=(*_WINDOW,), tied=True, old_scale=46),
        Architecture(
            "gemma3",
            "gemma3_text",
            keys={**_WINDOW, "final_logit_softcapping": "final_logit_softcapping"}
            | {"rope.freq_base_swa": "rope_local_base_freq"},
            needed=(*_WINDOW,),
            old_scale=62,
        ),
    )
}
BIASES = {"qkv_bias": "blk.0.attn_q.bias", "output_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_gate.bias"}


# ---- what the metadata say ----


def fields(architecture: Architecture, metadata: Mapping[str, Any], arrays: Mapping[str, Entry]) -> dict:
    """The fields of the ``config.json`` that would say the same."""
    name, keys = architecture.name, KEYS | dict(architecture.keys)
    own = {key.removeprefix(f"{name}."): x for key, x in metadata.items() if key.startswith(f"{name}.")}
    if missing := [f"{name}.{key}" for key in (*NEEDED, *architecture.needed) if key not in own]:
        raise ValueError(f"the metadata of this {name!r} lack {missing}")
    if EMBEDDING not in arrays:
        raise ValueError(f"the arrays of this {name!r} lack {EMBEDDING}")
    said = {theirs: own.pop(key) for key, theirs in keys.items() if key in own}
    heads, width = said["num_attention_heads"], said["hidden_size"]
    said = {"num_key_value_heads": heads, "head_dim": width // heads, "rope_theta": 10000.0} | said
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.pop(key, said["head_dim"]) != said["head_dim"]:
            raise ValueError(f"{name}.{key} is not the {said['head_dim']} of a head; only whole heads are known here")
    if architecture.old_scale:
        old = said["num_hidden_layers"] == architecture.old_scale
        said["query_pre_attn_scalar"] = width // heads if old else said["head_dim"]
    if "attention.sliding_window_pattern" in own:
        said |= _pattern(own.pop("attention.sliding_window_pattern"))
    said["rope_scaling"] = _scaling(own, said, arrays)
    if others := {f"{name}.{key}": x for key, x in own.items() if x and key not in _UNREAD}:
        raise ValueError(f"the metadata have {others}: no such thing is known of {name!r} here")
    sizes = {"vocab_size": arrays[EMBEDDING].shape[0], "tie_word_embeddings": HEAD not in arrays}
    return {"model_type": architecture.family} | sizes | said


def _pattern(said: int | list[bool]) -> dict:
    """Which layers have the window: all but every n-th, or those that are listed."""
    if isinstance(said, int):
        return {"sliding_window_pattern": said}
    return {"layer_types": ["sliding_attention" if each else "full_attention" for each in said]}


def _scaling(own: dict, fields: Mapping, arrays: Mapping[str, Entry]) -> dict | None:
    """``rope_scaling``; takes what says it from ``own``."""
    kind = own.pop("rope.scaling.type", "none")
    said = {theirs: own.pop(key) for key, theirs in SCALING.items() if key in own}
    if ROPE_FACTORS not in arrays:
        return None if kind == "none" else {"rope_type": kind} | said
    found = gguf_format.read(arrays[ROPE_FACTORS]).reshape(-1)
    length = said.get("original_max_position_embeddings", _LLAMA3_LENGTH)
    scaling = _LLAMA3 | {"factor": float(found.max()), "original_max_position_embeddings": length}
    expected = factors(FAMILIES["llama"].read(_smallest(fields) | {"rope_scaling": scaling})["rope"], fields)
    if kind != "none" or found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise ValueError(f"{ROPE_FACTORS} are not those of Llama 3's RoPE, low_freq_factor 1, high_freq_factor 4")
    return scaling


def _smallest(fields: Mapping) -> dict:
    """Fields enough to read what they say of RoPE."""
    return {"vocab_size": 1, "tie_word_embeddings": True} | {key: fields[key] for key in KEYS.values() if key in fields}


def factors(said: Mapping, fields: Mapping) -> np.ndarray:
    """By how much each frequency is divided."""
    width = fields["head_dim"]
    ropes = RopeConfig(**said | UNSCALED), RopeConfig(**said)
    (before, _), (after, _) = (wavelengths(each, width, local=False) for each in ropes)
    return (before / after).astype(np.float32)


# ---- between their arrays and ours ----


def _heads(tensor: Tensor, config: DecoderConfig) -> int:
    """How many heads the rows are of whose halves may be interleaved; 0 where there are none."""
    heads = {"attention/query": config.num_heads, "attention/key": config.num_kv_heads}
    return next((count for part, count in heads.items() if f"{part}/" in tensor.parameter), 0)


def _offset(tensor: Tensor, config: DecoderConfig) -> float:
    return config.norm_offset if tensor.parameter.endswith("norm/scale") else 0.0


def to_ours(
    architecture: Architecture, config: DecoderConfig, tensor: Tensor, array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    if architecture.interleaved and (heads := _heads(tensor, config)):
        apart = array.reshape(heads, -1, 2, *array.shape[1:])
        array = apart.swapaxes(1, 2).reshape(array.shape)
    return families.to_ours(tensor, array - np.float32(_offset(tensor, config)), shape)


def to_theirs(architecture: Architecture, config: DecoderConfig, tensor: Tensor, array: np.ndarray) -> np.ndarray:
    array = families.to_theirs(tensor, array) + np.float32(_offset(tensor, config))
    if architecture.interleaved and (heads := _heads(tensor, config)):
        apart = array.reshape(heads, 2, -1, *array.shape[1:])
        array = apart.swapaxes(1, 2).reshape(array.shape)
    return array
