"""The architecture of a decoder as plain numbers: Llama, Qwen, Mistral, SmolLM, OLMo and Gemma are values of one
dataclass.
"""

import dataclasses

# What a layer of the repeated pattern may be: full attention, attention inside a sliding window, and both without RoPE.
LAYER_KINDS = ("global", "local", "nope", "local_nope")
WINDOWED, UNROTATED = ("local", "local_nope"), ("nope", "local_nope")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
QK_NORMS = ("none", "head", "all")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
DTYPES = ("float32", "bfloat16")
REMATS = ("none", "full", "projections")
ATTENTIONS = ("einsum", "dot_product")
# The keys that say how a model is computed, and not which one it is.
COMPUTATION = ("dropout", "activation_dtype", "operand_dtype", "attention", "remat", "unroll", "loss_chunk")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the variants that stretch it beyond the trained
    length.
    """

    theta: float  # base of the wavelengths
    local_theta: float  # base in local layers; 0 means theta, and then scaling applies to local layers too
    scaling: str  # "none" | "linear" | "llama3" | "yarn"
    factor: float  # how many times the context is stretched
    original_length: int  # context length before stretching (llama3, yarn)
    low_frequency: (
        float  # llama3: rotations over original_length below which a wave is stretched in full; yarn: beta_slow
    )
    high_frequency: float  # llama3: above which it is left alone; yarn: beta_fast

    def __post_init__(self):
        _choice("model.rope.scaling", self.scaling, ROPE_SCALINGS)
        if not self.theta > 0:
            raise ValueError(f"model.rope.theta={self.theta} must be positive")
        if not self.local_theta >= 0:
            raise ValueError(f"model.rope.local_theta={self.local_theta} must be positive, or 0 to take theta")
        if self.scaling != "none" and not self.factor > 0:
            raise ValueError(
                f"model.rope.factor={self.factor} must be positive where model.rope.scaling={self.scaling!r}"
            )
        if self.scaling in ("llama3", "yarn") and not (
            self.original_length > 0 and self.low_frequency < self.high_frequency
        ):
            raise ValueError(
                f"model.rope.scaling={self.scaling!r} needs original_length > 0, low_frequency < high_frequency, not "
                f"{self.original_length}, {self.low_frequency} and {self.high_frequency}"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer. ``configs/common.py`` explains each key beside its default."""

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    activation: str
    norm_eps: float
    norm_offset: float
    pre_norm: bool
    post_norm: bool
    qk_norm: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied_head: bool
    scalar_head: bool
    critic: bool
    embedding_scale: float
    attention_scale: float
    attention_soft_cap: float
    logit_soft_cap: float
    layer_pattern: tuple[str, ...]
    sliding_window: int
    dropout: float
    rope: RopeConfig
    activation_dtype: str
    operand_dtype: str
    attention: str
    remat: str
    unroll: int
    loss_chunk: int

    def __post_init__(self):
        if self.vocab_size < 0:
            raise ValueError(f"model.vocab_size={self.vocab_size} must be at least 1, or 0 to take the tokenizer's")
        sizes = ("num_layers", "width", "mlp_width", "num_heads", "num_kv_heads", "head_width", "loss_chunk")
        for key in sizes:
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        for key in ("norm_eps", "attention_scale", "attention_soft_cap", "logit_soft_cap"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must not be negative")
        if self.unroll < 0:
            raise ValueError(f"model.unroll={self.unroll} must be at least 1, or 0 to unroll all layers")
        if self.critic and not self.scalar_head:
            raise ValueError("model.critic=True is what a scalar head stands on: set model.scalar_head=True too")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"model.head_width={self.head_width} must be even: RoPE rotates pairs")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")
        for kind in self.layer_pattern:
            _choice("model.layer_pattern", kind, LAYER_KINDS)
        if not self.layer_pattern:
            raise ValueError(
                "model.layer_pattern=() must name at least one layer kind; ('global',) makes every layer attend to all"
            )
        windowed = next((kind for kind in self.layer_pattern if kind in WINDOWED), None)
        if windowed and self.sliding_window < 1:
            raise ValueError(
                f"model.sliding_window={self.sliding_window} must be at least 1 where model.layer_pattern has "
                f"{windowed!r}"
            )
        if not (self.pre_norm or self.post_norm):
            raise ValueError("model.pre_norm and model.post_norm are both False: a block needs one of them")
        _choice("model.activation", self.activation, ACTIVATIONS)
        _choice("model.qk_norm", self.qk_norm, QK_NORMS)
        _choice("model.activation_dtype", self.activation_dtype, DTYPES)
        _choice("model.operand_dtype", self.operand_dtype, DTYPES)
        _choice("model.attention", self.attention, ATTENTIONS)
        _choice("model.remat", self.remat, REMATS)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of each layer: the pattern repeated over the depth."""
        return tuple(self.layer_pattern[layer % len(self.layer_pattern)] for layer in range(self.num_layers))

    def with_vocabulary(self, size: int) -> "DecoderConfig":
        """This architecture for a tokenizer of ``size`` ids; a smaller ``vocab_size`` than that is an error, 0 takes
        it.
        """
        if self.vocab_size == 0:
            return dataclasses.replace(self, vocab_size=size)
        if self.vocab_size < size:
            raise ValueError(
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's {size}: "
                "ids past its end would have no row; raise it, or set 0 to take the tokenizer's"
            )
        return self


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} must be one of {choices}")
