"""Supervised fine-tuning of a pretrained model on instructions, with some of the pretraining text against forgetting.

python experiments/train.py --config=configs/sft.py --workdir=runs/sft --config.start=runs/pretrain \\
    --config.data.sources.chat.path=instructions.json

Any .json, .jsonl or .parquet of conversations will do: their format is detected. Two CPU cores, three minutes.
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for one of seconds."""
    common.no_argument("sft", arg)
    config = common.get_config()
    config.optimizer.update(learning_rate=5e-4, warmup=20, weight_decay=0.0)
    config.loop.update(steps=200, batch_size=16, micro_batches=4, evaluate_every=40, sample_every=40, save_every=40)
    if arg == "tiny":
        config = common.tiny(config)
    config.stage = "sft"
    config.data.sources = {
        "chat": common.source("instructions.json", weights=(0.85,), format="auto", packing="best_fit_whole"),
        "replay": common.source(weights=(0.15,)),
    }
    config.data.validation = 0.1
    config.objective.neftune_alpha = 5.0
    config.loop.update(evaluate_first=True, evaluate_answers=64, sample_prompts=("What is the capital of France?",))
    config.loop.best_metric = "validation_loss/chat"
    return config
