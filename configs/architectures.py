"""Published decoders as values of ``common.llama``: ``config.model = architectures.llama3_8b()``."""

import ml_collections

from configs import common


def llama3_8b() -> ml_collections.ConfigDict:
    """Llama 3 8B (arXiv:2407.21783, table 3)."""
    sizes = dict(
        vocab_size=128256, num_layers=32, width=4096, mlp_width=14336, num_heads=32, num_kv_heads=8, head_width=128
    )
    return common.llama(**sizes, tied_head=False, rope={"theta": 500000.0})


def llama3_2_1b() -> ml_collections.ConfigDict:
    """Llama 3.2 1B: tied, RoPE stretched 32 times."""
    sizes = dict(
        vocab_size=128256, num_layers=16, width=2048, mlp_width=8192, num_heads=32, num_kv_heads=8, head_width=64
    )
    rope = {"theta": 500000.0, "scaling": "llama3", "factor": 32.0, "original_length": 8192}
    return common.llama(**sizes, rope=rope)


def mistral_7b() -> ml_collections.ConfigDict:
    """Mistral 7B v0.1 (arXiv:2310.06825): every layer looks 4096 back."""
    sizes = dict(
        vocab_size=32000, num_layers=32, width=4096, mlp_width=14336, num_heads=32, num_kv_heads=8, head_width=128
    )
    return common.llama(**sizes, tied_head=False, layer_pattern=("local",), sliding_window=4096)


def qwen2_7b() -> ml_collections.ConfigDict:
    """Qwen 2 and 2.5 7B (arXiv:2412.15115): biases on queries, keys and values."""
    sizes = dict(
        vocab_size=152064, num_layers=28, width=3584, mlp_width=18944, num_heads=28, num_kv_heads=4, head_width=128
    )
    return common.llama(**sizes, tied_head=False, qkv_bias=True, norm_eps=1e-6, rope={"theta": 1000000.0})


def qwen2_5_0_5b() -> ml_collections.ConfigDict:
    """Qwen 2.5 0.5B: the tied small one."""
    sizes = dict(
        vocab_size=151936, num_layers=24, width=896, mlp_width=4864, num_heads=14, num_kv_heads=2, head_width=64
    )
    return common.llama(**sizes, qkv_bias=True, norm_eps=1e-6, rope={"theta": 1000000.0})


def qwen3_0_6b() -> ml_collections.ConfigDict:
    """Qwen 3 0.6B (arXiv:2505.09388): norms on query and key heads, heads wider than width / num_heads."""
    sizes = dict(
        vocab_size=151936, num_layers=28, width=1024, mlp_width=3072, num_heads=16, num_kv_heads=8, head_width=128
    )
    return common.llama(**sizes, qk_norm="head", norm_eps=1e-6, rope={"theta": 1000000.0})


def smollm2_135m() -> ml_collections.ConfigDict:
    """SmolLM2 135M (arXiv:2502.02737)."""
    sizes = dict(vocab_size=49152, num_layers=30, width=576, mlp_width=1536, num_heads=9, num_kv_heads=3, head_width=64)
    return common.llama(**sizes, rope={"theta": 100000.0})


def gemma2_2b() -> ml_collections.ConfigDict:
    """Gemma 2 2B (arXiv:2408.00118, table 1): local and global layers in turn, norms on both sides, soft caps."""
    sizes = dict(
        vocab_size=256000, num_layers=26, width=2304, mlp_width=9216, num_heads=8, num_kv_heads=4, head_width=256
    )
    caps = dict(attention_soft_cap=50.0, logit_soft_cap=30.0, attention_scale=256**-0.5)
    return common.llama(**sizes, **caps, **_gemma(2304), layer_pattern=("local", "global"), sliding_window=4096)


def gemma3_1b() -> ml_collections.ConfigDict:
    """Gemma 3 1B, text (arXiv:2503.19786): five local layers to a global one, each with its own RoPE base, norms on
    heads.
    """
    sizes = dict(
        vocab_size=262144, num_layers=26, width=1152, mlp_width=6912, num_heads=4, num_kv_heads=1, head_width=256
    )
    rope = {"theta": 1000000.0, "local_theta": 10000.0}
    pattern = ("local",) * 5 + ("global",)
    return common.llama(**sizes, **_gemma(1152), qk_norm="head", layer_pattern=pattern, sliding_window=512, rope=rope)


def olmo2_1b() -> ml_collections.ConfigDict:
    """OLMo 2 1B (arXiv:2501.00656): norms after attention and mlp only, and over all heads together."""
    sizes = dict(
        vocab_size=100352, num_layers=16, width=2048, mlp_width=8192, num_heads=16, num_kv_heads=16, head_width=128
    )
    norms = dict(pre_norm=False, post_norm=True, qk_norm="all", norm_eps=1e-6)
    return common.llama(**sizes, **norms, tied_head=False, rope={"theta": 500000.0})


def _gemma(width: int) -> dict:
    return dict(
        activation="gelu_tanh",
        norm_offset=1.0,
        norm_eps=1e-6,
        pre_norm=True,
        post_norm=True,
        embedding_scale=width**0.5,
    )
