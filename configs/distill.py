"""Distillation: a small model learns from the distributions of a trained one, on the same text, with its tokenizer.

python experiments/train.py --config=configs/distill.py --workdir=runs/distill --config.teacher=runs/pretrain

Two CPU cores, about a minute. ``objective.hard_weight=1`` learns from the data alone, for comparison.
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for one of seconds."""
    common.no_argument("distill", arg)
    config = common.get_config()
    config.loop.update(steps=200, batch_size=8, micro_batches=2, evaluate_every=40, sample_every=100, save_every=100)
    config.optimizer.update(learning_rate=3e-3, warmup=20)
    if arg == "tiny":
        config = common.tiny(config)
    else:
        config.model = common.llama(num_layers=2, width=96, mlp_width=256, num_heads=3, num_kv_heads=3, head_width=32)
    config.stage = "distill"
    config.teacher = "runs/pretrain"
    config.objective.update(beta=0.0, hard_weight=0.5)
    return config
