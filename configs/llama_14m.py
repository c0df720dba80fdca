"""The benchmark's model: a 13.8M-parameter Llama on the embedded text, global batch 16 x 256 in four micro-batches.

python experiments/train.py --config=configs/llama_14m.py --workdir=runs/llama_14m
python experiments/benchmark.py --config=configs/llama_14m.py

Two CPU cores, 300 updates in about ten minutes: validation loss below 5.0 nats per token of an 8192-token vocabulary.
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for the same program in miniature."""
    config = common.get_config()
    config.tokenizer.vocab_size = 8192
    config.model = common.llama(
        vocab_size=8192, num_layers=6, width=384, num_heads=6, num_kv_heads=6, head_width=64, mlp_width=1024
    )
    if arg == "tiny":
        config.tokenizer.kind = "bytes"
        config.model = common.llama(num_layers=2, width=64, mlp_width=128, num_heads=4, num_kv_heads=2, head_width=16)
        config.data.sequence_length = 64
        config.loop.update(dict(steps=10, batch_size=8, micro_batches=2, log_every=5, evaluate_every=10, save_every=10))
        config.loop.update(dict(evaluate_batches=2, sample_every=0))
        config.optimizer.warmup = 2
    elif arg:
        raise ValueError(f"configs/llama_14m.py takes no argument or 'tiny', not {arg!r}")
    return config
