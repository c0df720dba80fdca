"""Streams text from a run's newest checkpoint.

    python experiments/generate.py --workdir=runs/pretrain --prompt="The function returns" --temperature=0.8

The prompt is read as the start of a document; the text ends where the model ends the document.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402  the checkout must be importable first

from jaxllm import workdir  # noqa: E402
from jaxllm.generate import SamplerConfig, stream  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run directory that train.py made")
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens that sum to p")
    parser.add_argument("--min_p", type=float, default=0.0, help="only tokens this times as likely as the likeliest")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="at most so many tokens per sample")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, one after the other")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to use; the newest, unless told")
    args = parser.parse_args()
    sampler = SamplerConfig(args.temperature, args.top_k, args.top_p, args.min_p)
    model, params, tokenizer = workdir.load(args.workdir, step=args.step)
    tokens = tokenizer.opening(args.prompt)
    print(f"{sampler} max_new_tokens={args.max_new_tokens} seed={args.seed}", file=sys.stderr)
    for sample in range(args.num_samples):
        key = jax.random.fold_in(jax.random.key(args.seed), sample)
        print(args.prompt, end="", flush=True)
        for piece in stream(model, params, tokenizer, tokens, key, max_new_tokens=args.max_new_tokens, sampler=sampler):
            print(piece, end="", flush=True)
        print("\n" if sample + 1 < args.num_samples else "")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
