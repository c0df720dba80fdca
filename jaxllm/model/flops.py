"""Floating-point operations of a training step, counted from the configuration."""

from jaxllm.model.config import WINDOWED, DecoderConfig


def flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token: 6 per parameter of a matrix product and 12 N H S per layer for
    attention.

    S is the sequence length, or the window where that is shorter; masked scores count, the embedding's look-up does
    not, what rematerialisation repeats does not (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    D, F, N, K, H = config.width, config.mlp_width, config.num_heads, config.num_kv_heads, config.head_width
    layer = D * H * (2 * N + 2 * K) + 3 * D * F
    spans = [
        min(sequence_length, config.sliding_window) if kind in WINDOWED else sequence_length
        for kind in config.layer_kinds
    ]
    return 6.0 * (config.num_layers * layer + D * config.vocab_size) + 12.0 * N * H * sum(spans)
