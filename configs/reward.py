"""A reward model: a fine-tuned network with a scalar head learns which of two answers people prefer.

python experiments/train.py --config=configs/reward.py --workdir=runs/reward --config.start=runs/sft \\
    --config.data.sources.pairs.path=preferences.jsonl

Any .json, .jsonl or .parquet of pairs, scored answers or thumbs will do: their format is detected. Two CPU cores, two
minutes. ``experiments/evaluate.py --suite=reward`` has the accuracy with its interval, and how sure it may be.
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for one of seconds."""
    common.no_argument("reward", arg)
    config = common.get_config()
    config.optimizer.update(learning_rate=3e-4, warmup=10, weight_decay=0.0)
    config.loop.update(steps=100, batch_size=16, micro_batches=4, evaluate_every=25, sample_every=0, save_every=25)
    if arg == "tiny":
        config = common.tiny(config)
    config.stage = "reward"
    config.model.scalar_head = True
    config.data.sources = {
        "pairs": common.source("preferences.jsonl", format="preference", packing="best_fit_truncated"),
    }
    config.data.validation = 0.1
    config.loop.update(evaluate_first=True, sample_every=0, best_metric="validation_pair_loss")
    return config
