"""Preferences without a reward model: DPO and its kin, from a fine-tuned policy.

python experiments/train.py --config=configs/preference.py --workdir=runs/dpo --config.start=runs/sft \\
    --config.data.sources.pairs.path=preferences.jsonl

``--config.preference.loss`` chooses among dpo, robust_dpo, ipo, hinge, orpo (with sft_weight=1), simpo and kto. Two CPU
cores, two minutes. Any format of pairs, scored answers or thumbs will do.
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for one of seconds."""
    common.no_argument("preference", arg)
    config = common.get_config()
    config.optimizer.update(learning_rate=5e-5, warmup=10, weight_decay=0.0)
    config.loop.update(steps=100, batch_size=16, micro_batches=4, evaluate_every=25, sample_every=25, save_every=25)
    if arg == "tiny":
        config = common.tiny(config)
    config.stage = "preference"
    config.data.sources = {
        "pairs": common.source("preferences.jsonl", format="preference", packing="best_fit_truncated"),
    }
    config.data.validation = 0.1
    config.loop.update(evaluate_first=True, evaluate_answers=32, sample_prompts=("What is the capital of France?",))
    return config
