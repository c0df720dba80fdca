"""The benchmark's model: a 13.8M-parameter Llama on the embedded text, global batch 16 x 256 in eight micro-batches.

python experiments/train.py --config=configs/llama_14m.py --workdir=runs/llama_14m
python experiments/benchmark.py --config=configs/llama_14m.py

Two CPU cores, 300 updates, four minutes: 1.959 bits per byte, held out.
"""

from configs import common


def get_config(arg: str = ""):
    """``arg``: "" for the run above, "tiny" for the same program in miniature."""
    common.no_argument("llama_14m", arg)
    config = common.get_config()
    if arg == "tiny":
        return common.tiny(config)
    sizes = dict(num_layers=6, width=384, num_heads=6, num_kv_heads=6, head_width=64, mlp_width=1024)
    config.tokenizer.vocab_size = 8192
    config.model = common.llama(vocab_size=8192, **sizes)
    # What a CPU's caches hold: two sequences at a time, and all of their logits.
    config.loop.micro_batches = 8
    config.model.loss_chunk = 256
    return config
