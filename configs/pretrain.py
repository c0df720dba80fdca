"""Pretraining on the English prose that every Python carries: no download, two CPU cores, under five minutes.

python experiments/train.py --config=configs/pretrain.py --workdir=runs/pretrain
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for one of seconds."""
    config = common.get_config()
    if arg == "tiny":
        config.tokenizer.kind = "bytes"
        config.model = common.llama(num_layers=2, width=64, mlp_width=128, num_heads=4, num_kv_heads=2, head_width=16)
        config.data.sequence_length = 64
        config.loop.update(dict(steps=20, batch_size=8, micro_batches=2, log_every=5, evaluate_every=10, save_every=10))
        config.loop.update(dict(evaluate_batches=4, sample_every=20, sample_tokens=16))
        config.optimizer.warmup = 5
    elif arg:
        raise ValueError(f"configs/pretrain.py takes no argument or 'tiny', not {arg!r}")
    return config
