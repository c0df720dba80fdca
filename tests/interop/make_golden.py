"""Golden numbers of tiny random models as transformers computes them: run by hand where torch and transformers are.

    python tests/interop/make_golden.py

Weights are drawn by name, so that a test draws them again and needs only ``golden/hf_*.json``. Made with transformers
5.23 and torch 2.13 on a CPU, in float32.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, T, NEW, SHOWN = 48, 20, 64, (0, 7, 19)
PROMPT_LENGTHS = (3, 14, 8)
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
WINDOW = dict(use_sliding_window=True, sliding_window=5)
GEMMA = dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=4)
LOCAL_ROPE = dict(rope_type="default", rope_theta=300.0)
# Name -> (model_type, what differs from SIZES). Windows and caps are small enough to matter; heads are 12 wide or 8.
CASES = {
    "llama2": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": (
        "llama",
        dict(head_dim=12, tie_word_embeddings=True, rope_parameters=LLAMA3 | dict(original_max_position_embeddings=32)),
    ),
    "llama_biases": ("llama", dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "llama_linear": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=700.0, factor=4.0))),
    "mistral": ("mistral", dict(sliding_window=5, head_dim=12, rope_parameters=dict(rope_theta=3000.0))),
    "mistral_whole": ("mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(rope_theta=1000000.0))),
    "qwen2_windows": ("qwen2", dict(num_hidden_layers=3, max_window_layers=1, head_dim=12, **WINDOW)),
    "qwen2_yarn": (
        "qwen2",
        dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e4)),
    ),
    "qwen3": ("qwen3", dict(head_dim=16, attention_bias=True, rope_parameters=dict(rope_theta=1000000.0))),
    "qwen3_tied": ("qwen3", dict(head_dim=12, tie_word_embeddings=True, max_window_layers=1, **WINDOW)),
    "smollm3": ("smollm3", dict(num_hidden_layers=5, head_dim=12, rope_parameters=dict(rope_theta=5000.0))),
    "smollm3_windows": (
        "smollm3",
        dict(no_rope_layers=[0, 1, 0], num_hidden_layers=3, tie_word_embeddings=False, **WINDOW),
    ),
    "olmo2": ("olmo2", dict(head_dim=12, rope_parameters=dict(rope_theta=500000.0))),
    "olmo2_tied": ("olmo2", dict(num_hidden_layers=5, attention_bias=True, tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(num_hidden_layers=3, attn_logit_softcapping=2.0, final_logit_softcapping=0.7, **GEMMA)),
    "gemma2_untied": ("gemma2", dict(tie_word_embeddings=False, rope_parameters=dict(rope_theta=300.0), **GEMMA)),
    "gemma3": (
        "gemma3_text",
        dict(
            num_hidden_layers=7,
            final_logit_softcapping=0.7,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=50000.0), sliding_attention=LOCAL_ROPE
            ),
            **GEMMA,
        ),
    ),
    # transformers reads no cap of Gemma 3's scores, whatever its config says.
    "gemma3_untied": (
        "gemma3_text",
        dict(
            tie_word_embeddings=False,
            layer_types=["full_attention", "sliding_attention"],
            attn_logit_softcapping=1.0,
            **GEMMA,
        ),
    ),
}  # fmt: skip


def draw(name: str, shape: tuple[int, ...], *, norm_mean: float) -> np.ndarray:
    """The weights of this name: no norm is 1 and no bias 0."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if "norm" in name:
        return np.float32(norm_mean + 0.2 * normal)
    deviation = 0.1 if "embed" in name else 0.3 if name.endswith("bias") else 1.3 * shape[-1] ** -0.5
    return np.float32(normal * deviation)


def tokens() -> np.ndarray:
    """Two rows that are scored."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, T))


def prompts() -> list[list[int]]:
    """Rows of several lengths that are answered."""
    draws = np.random.default_rng(1)
    return [draws.integers(0, VOCABULARY, length).tolist() for length in PROMPT_LENGTHS]


def probe(name: str, gradient: np.ndarray) -> list[float]:
    """Two numbers that tell a gradient: its norm, and its product with drawn numbers."""
    direction = np.random.default_rng(zlib.crc32(name.encode()) + 1).normal(size=gradient.shape)
    return [float(np.linalg.norm(gradient)), float(np.sum(gradient * direction))]


# ---- by hand ----


def golden(model_type: str, changes: dict) -> dict:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    norm_mean = 0.0 if model_type.startswith("gemma") else 1.0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
        said = json.loads((Path(folder) / "config.json").read_text())
    shapes = {name: list(x.shape) for name, x in saved.items()}
    weights = {name: torch.tensor(draw(name, shape, norm_mean=norm_mean)) for name, shape in shapes.items()}
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}, left
    model.tie_weights()
    model.float()
    row = torch.tensor(tokens())
    logits = model(row).logits
    logp = torch.log_softmax(logits[:, :-1], -1).gather(-1, row[:, 1:, None])[..., 0]
    (-logp.mean()).backward()
    gradients = {name: x.grad.numpy() for name, x in model.named_parameters()}
    rows, width = prompts(), max(PROMPT_LENGTHS)
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in rows])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    made = model.generate(padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return {
        "config": said,
        "norm_mean": norm_mean,
        "shapes": shapes,
        "logits": logits[:, list(SHOWN)].detach().double().numpy().round(6).tolist(),
        "logp": logp.detach().double().numpy().round(6).tolist(),
        "gradients": {name: [float(f"{x:.7g}") for x in probe(name, g)] for name, g in gradients.items()},
        "greedy": made[:, width:].tolist(),
    }


def main(names: list[str]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in names or CASES:
        content = golden(*CASES[name])
        lines = [f'"{key}": {json.dumps(value, sort_keys=True)}' for key, value in content.items()]
        (GOLDEN / f"hf_{name}.json").write_text("{" + ",\n".join(lines) + "}\n")
        print(name, len(set(sum(content["greedy"], []))), "tokens sampled")


if __name__ == "__main__":
    main(sys.argv[1:])
