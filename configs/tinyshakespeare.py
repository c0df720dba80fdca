"""The field's smallest real corpus: bytes of plays, 4 layers of width 128, context 64, batch 12, 2000 steps (published:
1.88 nats).

python experiments/train.py --config=configs/tinyshakespeare.py --workdir=runs/tinyshakespeare
--config.data.sources.main.path=input.txt
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for ten steps of it."""
    config = common.get_config()
    config.tokenizer.kind = "bytes"
    config.data.sources.main.path = "input.txt"
    config.data.split = "tail"
    config.data.validation = 0.1
    config.data.sequence_length = 64
    config.model = common.llama(num_layers=4, width=128, mlp_width=344, num_heads=4, num_kv_heads=4, head_width=32)
    config.model.loss_chunk = 64
    config.optimizer.learning_rate = 3e-3
    config.loop.update(
        dict(steps=2000, batch_size=12, micro_batches=1, log_every=20, evaluate_every=500, save_every=500)
    )
    config.loop.update(dict(sample_prompts=("ROMEO:", "First Citizen:\n"), sample_every=500, sample_tokens=128))
    if arg == "tiny":
        config.loop.update(dict(steps=10, evaluate_every=10, evaluate_batches=2, sample_every=0, save_every=10))
        config.optimizer.warmup = 2
    elif arg:
        raise ValueError(f"configs/tinyshakespeare.py takes no argument or 'tiny', not {arg!r}")
    return config
