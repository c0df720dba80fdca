"""The field's smallest real corpus: bytes of plays, 4 layers of width 128, context 64, batch 12, 2000 updates.

python experiments/train.py --config=configs/tinyshakespeare.py --workdir=runs/tinyshakespeare \\
    --config.data.sources.main.path=input.txt

Two CPU cores, one to three minutes: 1.66 nats per byte on the last tenth of the text (published for characters: 1.88).
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for one of seconds; both need the path of the text."""
    common.no_argument("tinyshakespeare", arg)
    config = common.get_config()
    config.data.sources.main.path = "input.txt"
    config.data.split = "tail"
    config.data.validation = 0.1
    if arg == "tiny":
        return common.tiny(config)
    config.tokenizer.kind = "bytes"
    config.data.sequence_length = 64
    config.model = common.llama(num_layers=4, width=128, mlp_width=344, num_heads=4, num_kv_heads=4, head_width=32)
    config.optimizer.learning_rate = 3e-3
    config.loop.update(steps=2000, batch_size=12, micro_batches=1, log_every=20, evaluate_every=500, save_every=500)
    config.loop.update(sample_prompts=("ROMEO:", "First Citizen:\n"), sample_every=500, sample_tokens=128)
    return config
