"""Decoders as Hugging Face writes them: one table per family, read from its ``config.json`` and written to it.

A family says which fields of theirs hold which values of our ``model`` section, what is fixed in it, and what its norms
are called. It expresses a config of ours where what it writes is read back as the same model: nothing else is exported.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxllm.configure import section
from jaxllm.interop import fields
from jaxllm.interop.fields import Fields, Part
from jaxllm.model import DecoderConfig
from jaxllm.model.config import COMPUTATION, WINDOWED

# How a model is computed that nobody said it of: exactly.
COMPUTED = dict(
    dropout=0.0,
    activation_dtype="float32",
    operand_dtype="float32",
    attention="einsum",
    remat="none",
    unroll=0,
    loss_chunk=128,
)


class Tensor(NamedTuple):
    """One of their tensors, or one per layer where the name has ``{}``: the parameter of ours that it is, and the
    layouts of both. ``(nh)d`` is a matrix whose rows are N heads of H each.
    """

    parameter: str
    name: str
    theirs: str
    ours: str


_SHARED = (
    ("embedding/table", "model.embed_tokens.weight", "vd", "vd"),
    ("blocks/attention/query/kernel", "self_attn.q_proj.weight", "(nh)d", "dnh"),
    ("blocks/attention/query/bias", "self_attn.q_proj.bias", "(nh)", "nh"),
    ("blocks/attention/key/kernel", "self_attn.k_proj.weight", "(kh)d", "dkh"),
    ("blocks/attention/key/bias", "self_attn.k_proj.bias", "(kh)", "kh"),
    ("blocks/attention/value/kernel", "self_attn.v_proj.weight", "(kh)d", "dkh"),
    ("blocks/attention/value/bias", "self_attn.v_proj.bias", "(kh)", "kh"),
    ("blocks/attention/output/kernel", "self_attn.o_proj.weight", "d(nh)", "nhd"),
    ("blocks/attention/output/bias", "self_attn.o_proj.bias", "d", "d"),
    ("blocks/mlp/gate/kernel", "mlp.gate_proj.weight", "fd", "df"),
    ("blocks/mlp/gate/bias", "mlp.gate_proj.bias", "f", "f"),
    ("blocks/mlp/up/kernel", "mlp.up_proj.weight", "fd", "df"),
    ("blocks/mlp/up/bias", "mlp.up_proj.bias", "f", "f"),
    ("blocks/mlp/down/kernel", "mlp.down_proj.weight", "df", "fd"),
    ("blocks/mlp/down/bias", "mlp.down_proj.bias", "d", "d"),
    ("final_norm/scale", "model.norm.weight", "d", "d"),
    ("head/kernel", "lm_head.weight", "vd", "dv"),
)
_BEFORE = {"attention_pre": "input_layernorm", "mlp_pre": "post_attention_layernorm"}
_BEHIND = {"attention_post": "post_attention_layernorm", "mlp_post": "post_feedforward_layernorm"}
_AROUND = {"attention_pre": "input_layernorm", "mlp_pre": "pre_feedforward_layernorm"} | _BEHIND
_HEAD_NORMS = ("h", "h"), ("h", "h")
_WHOLE_NORMS = ("(nh)", "nh"), ("(kh)", "kh")


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``. ``defaults`` are what its fields are where ``config.json`` leaves them out."""

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    parts: tuple[Part, ...]
    norms: Mapping[str, str]
    query_key_norms: tuple = ()
    whole_heads: bool = False  # transformers wants the width to be a multiple of the heads, whatever a head's width is

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that a model of this family may have."""
        rows = [*_SHARED]
        rows += [(f"blocks/{ours}_norm/scale", f"{theirs}.weight", "d", "d") for ours, theirs in self.norms.items()]
        for (ours, theirs), layout in zip((("query", "q"), ("key", "k")), self.query_key_norms, strict=False):
            rows.append((f"blocks/attention/{ours}_norm/scale", f"self_attn.{theirs}_norm.weight", *layout))
        prefixes = {True: "model.layers.{}.", False: ""}
        return tuple(
            Tensor(row, prefixes[row.startswith("blocks/")] + name, theirs, ours) for row, name, theirs, ours in rows
        )

    def read(self, theirs: Mapping[str, Any]) -> dict:
        """The values of our ``model`` section that say which model it is; ``ValueError`` names what we do not have."""
        taken = Fields(self.name, self.defaults, theirs)
        values = dict(scalar_head=False, critic=False)
        for part in self.parts:
            values |= part.read(taken)
        taken.refuse_others()
        return values

    def write(self, config: DecoderConfig) -> dict:
        """Its fields for this model, as far as it can say it."""
        ours, theirs = dataclasses.asdict(config) | {"layer_kinds": config.layer_kinds}, {}
        for part in self.parts:
            theirs |= part.write(ours)
        return theirs


_SIZES = (
    fields.same("vocab_size", "vocab_size"),
    fields.same("num_hidden_layers", "num_layers"),
    fields.same("hidden_size", "width"),
    fields.same("intermediate_size", "mlp_width"),
    fields.same("num_attention_heads", "num_heads"),
    fields.KV_HEADS,
    fields.HEAD_WIDTH,
    fields.same("rms_norm_eps", "norm_eps"),
    fields.same("tie_word_embeddings", "tied_head"),
)
_NO_BIASES = dict(qkv_bias=False, output_bias=False, mlp_bias=False)
_NO_CAPS = dict(attention_scale=0.0, attention_soft_cap=0.0, logit_soft_cap=0.0, embedding_scale=1.0)
_PLAIN = dict(norm_offset=0.0, pre_norm=True, post_norm=False, qk_norm="none") | _NO_CAPS
_EVERYWHERE = fields.fixed(layer_pattern=("global",), sliding_window=0)
_NULL = dict.fromkeys(
    ("num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling", "partial_rotary_factor")
    + ("max_position_embeddings", "layer_types", "sliding_window_pattern")
)
_LLAMA = _NULL | dict(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False)
_BIASES = dict(attention_bias=False, mlp_bias=False)
_WINDOWS = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
_QWEN = _LLAMA | _WINDOWS | dict(num_key_value_heads=32)
_GEMMA_SIZES = dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8)
_GEMMA = (
    _NULL
    | _GEMMA_SIZES
    | dict(
        num_key_value_heads=4,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    )
)
_GEMMA_PARTS = (
    *_SIZES,
    fields.activation("hidden_activation"),
    fields.unread("hidden_act"),
    fields.fixed(norm_offset=1.0, pre_norm=True, post_norm=True, mlp_bias=False),
    fields.EMBEDDING_SCALE,
    fields.SCORE_SCALE,
    fields.ATTENTION_BIAS,
    fields.cap("final_logit_softcapping", "logit_soft_cap"),
)

_MLP_BIAS = fields.same("mlp_bias", "mlp_bias")
_PARTS = (*_SIZES, fields.activation("hidden_act"))

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            _LLAMA | _BIASES,
            (*_PARTS, fields.fixed(**_PLAIN), fields.ATTENTION_BIAS, _MLP_BIAS, _EVERYWHERE, fields.ROPE),
            _BEFORE,
            whole_heads=True,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            _LLAMA | dict(num_key_value_heads=8, sliding_window=4096),
            (*_PARTS, fields.fixed(**_PLAIN, **_NO_BIASES), fields.ONE_WINDOW, fields.ROPE),
            _BEFORE,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            _QWEN,
            (*_PARTS, fields.fixed(**_PLAIN, **_NO_BIASES | dict(qkv_bias=True)))
            + (fields.LAST_LAYERS_WINDOW, fields.ROPE),
            _BEFORE,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            _QWEN | dict(head_dim=128, attention_bias=False),
            (*_PARTS, fields.fixed(**_PLAIN | dict(qk_norm="head"), mlp_bias=False), fields.ATTENTION_BIAS)
            + (fields.LAST_LAYERS_WINDOW, fields.ROPE),
            _BEFORE,
            _HEAD_NORMS,
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            _LLAMA
            | _BIASES
            | dict(num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2000000.0, no_rope_layers=None)
            | dict(use_sliding_window=False, sliding_window=None, no_rope_layer_interval=4),
            (*_PARTS, fields.fixed(**_PLAIN), fields.unread("max_window_layers"), fields.ATTENTION_BIAS, _MLP_BIAS)
            + (fields.LAYERS_WITHOUT_ROPE, fields.ROPE),
            _BEFORE,
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            _LLAMA | dict(rms_norm_eps=1e-5, attention_bias=False),
            (*_PARTS, fields.fixed(**_PLAIN | dict(pre_norm=False, post_norm=True, qk_norm="all"), mlp_bias=False))
            + (fields.ATTENTION_BIAS, _EVERYWHERE, fields.ROPE),
            _BEHIND,
            _WHOLE_NORMS,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA | dict(rope_theta=10000.0, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
            (*_GEMMA_PARTS, fields.fixed(qk_norm="none"), fields.cap("attn_logit_softcapping", "attention_soft_cap"))
            + (fields.unread("sliding_window_size"), fields.every_nth_layer_global(2), fields.ROPE),
            _AROUND,
            whole_heads=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _GEMMA | dict(rope_theta=1000000.0, rope_local_base_freq=10000.0, vocab_size=262208),
            (*_GEMMA_PARTS, fields.fixed(qk_norm="head", attention_soft_cap=0.0), fields.UNCAPPED_SCORES)
            + (fields.every_nth_layer_global(6), fields.TWO_ROPES),
            _AROUND,
            _HEAD_NORMS,
            whole_heads=True,
        ),
    )
}
# A text model inside of one that sees pictures: its config is a section, and these are the other fields' names.
NESTED = {"gemma3": "gemma3_text"}
_PICTURES = frozenset(
    """vision_config text_config boi_token_index eoi_token_index image_token_index mm_tokens_per_image boi_token_id
    eoi_token_id image_token_id""".split()
)


def read(theirs: Mapping[str, Any]) -> tuple[Family, dict]:
    """(family, values of our ``model`` section but for how it is computed) of what a ``config.json`` holds.

    Of a Gemma 3 that sees pictures it is the text model. Raises ``ValueError`` that names the model type, or the field,
    that we do not have.
    """
    name = theirs.get("model_type")
    if name in NESTED:
        others = {key: x for key, x in theirs.items() if key not in _PICTURES and key not in ("model_type", _TIED)}
        Fields(name, {}, others).refuse_others()
        tied = {_TIED: theirs[_TIED]} if theirs.get(_TIED) is not None else {}
        theirs, name = tied | theirs["text_config"], NESTED[name]
    if name not in FAMILIES:
        raise ValueError(f"config.json has model_type={name!r}; known are {sorted([*FAMILIES, *NESTED])}")
    return FAMILIES[name], FAMILIES[name].read(theirs)


_TIED = "tie_word_embeddings"


def decoder(values: Mapping[str, Any], **computed: Any) -> DecoderConfig:
    """The config of a model with these values, computed exactly unless ``computed`` says otherwise."""
    return section(DecoderConfig, COMPUTED | dict(values) | computed, path="config.model")


def write(config: DecoderConfig) -> tuple[Family, dict]:
    """(family, its fields of ``config.json``) of the first family that can say all that ``config`` is.

    Raises ``ValueError`` where there is none, with what the nearest family says instead. Scalar heads are not said.
    """
    nearest = None
    for family in FAMILIES.values():
        differing = _differing(family, config)
        if not differing:
            return family, family.write(config)
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = family, differing
    family, differing = nearest
    wrong = ", ".join(f"model.{key}={ours!r} where it has {theirs!r}" for key, (ours, theirs) in differing.items())
    raise ValueError(f"no family of {sorted(FAMILIES)} is this model; the nearest, {family.name!r}, differs in {wrong}")


def _differing(family: Family, config: DecoderConfig) -> dict:
    """Key -> (our value, the family's), for all in which the model that the family would write is another one."""
    differing = _differences(config, decoder(family.read(family.write(config))))
    if family.whole_heads and config.width % config.num_heads:
        differing["width"] = config.width, f"a multiple of num_heads={config.num_heads}"
    return differing


def _differences(config: DecoderConfig, other: DecoderConfig) -> dict:
    """Key -> both values, for all in which they are different models, however each is said or computed."""
    ours, theirs = _essence(config), _essence(other)
    return {key: (x, theirs[key]) for key, x in ours.items() if not _alike(x, theirs[key])}


def _essence(config: DecoderConfig) -> dict:
    """What decides which model it is, each of it said in one way."""
    said = dataclasses.asdict(config) | {"layer_pattern": config.layer_kinds}
    windowed = any(kind in WINDOWED for kind in config.layer_kinds)
    rope = said.pop("rope")
    used = {"none": (), "linear": ("factor",)}.get(rope["scaling"], tuple(fields.UNSCALED))
    rope |= {key: x for key, x in fields.UNSCALED.items() if key not in ("scaling", *used)}
    if "local" not in config.layer_kinds or (rope["scaling"] == "none" and rope["local_theta"] == rope["theta"]):
        rope["local_theta"] = 0.0
    said["sliding_window"] = config.sliding_window if windowed else 0
    said["attention_scale"] = config.attention_scale or config.head_width**-0.5
    said |= {f"rope.{key}": x for key, x in rope.items()}
    return {key: x for key, x in said.items() if key not in (*COMPUTATION, "scalar_head", "critic")}


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return ours == theirs


def reach(config: DecoderConfig) -> int:
    """The longest text that files say a model is for, where nobody knows: what RoPE was stretched to, or 4096."""
    return int(config.rope.factor * config.rope.original_length) or 4096


# ---- layouts ----


def _axes(layout: str) -> list[str]:
    """``(nh)d`` -> ["nh", "d"]."""
    return [several or one for several, one in re.findall(r"\((\w+)\)|(\w)", layout)]


def their_shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their tensor whose array of ours (of one layer) has this shape."""
    lengths = dict(zip(tensor.ours, shape, strict=True))
    return tuple(math.prod(lengths[letter] for letter in axis) for axis in _axes(tensor.theirs))


def to_ours(tensor: Tensor, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Their array as ours of this shape: a view, nothing is copied."""
    lengths, letters = dict(zip(tensor.ours, shape, strict=True)), "".join(_axes(tensor.theirs))
    apart = theirs.reshape([lengths[letter] for letter in letters])
    return apart.transpose([letters.index(letter) for letter in tensor.ours])


def to_theirs(tensor: Tensor, ours: np.ndarray) -> np.ndarray:
    """Our array (of one layer) as theirs."""
    letters = "".join(_axes(tensor.theirs))
    return ours.transpose([tensor.ours.index(letter) for letter in letters]).reshape(their_shape(tensor, ours.shape))
