"""Writes a run's newest checkpoint for others: transformers and vLLM, or llama.cpp.

python experiments/export_model.py --workdir=runs/sft --out=exported
python experiments/export_model.py --workdir=runs/sft --out=sft.gguf --format=gguf --dtype=q8_0
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm import interop, workdir  # noqa: E402  the checkout must be importable first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run directory that train.py or import_model.py made")
    parser.add_argument("--out", required=True, help="folder to write, or file where the format is gguf")
    parser.add_argument("--format", default="hf", choices=interop.FORMATS, help="hf: a Hugging Face folder")
    parser.add_argument("--dtype", default="", help="float32 (of hf), bfloat16, float16 (of gguf), and of gguf q8_0")
    parser.add_argument("--max_positions", type=int, default=0, help="tokens that it says it reads; 0: 4096, or RoPE's")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to use; the newest, unless told")
    args = parser.parse_args()
    model, params, tokenizer = workdir.load(args.workdir, step=args.step)
    how = dict(format=args.format, dtype=args.dtype, max_positions=args.max_positions)
    interop.save(args.out, model, params, tokenizer, **how)
    out = Path(args.out)
    files = [out] if out.is_file() else sorted(out.iterdir())
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
