"""Lets a run's newest checkpoint answer a prompt set, or continue texts, into a jsonl that SFT reads.

    python experiments/distill_data.py --workdir=runs/teacher --prompts=questions.json --out=data/answers.jsonl
    python experiments/distill_data.py --workdir=runs/teacher --texts=embedded --prefix_tokens=32 --out=data/texts.jsonl

Prompts are conversations of any format, up to their last answer. The same command again appends what is missing.
Answers that did not end, or are empty, are left out and counted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm import workdir  # noqa: E402  the checkout must be importable first
from jaxllm.checkpoint import whole_steps  # noqa: E402
from jaxllm.data.sources import DocumentSource  # noqa: E402
from jaxllm.generate import SamplerConfig  # noqa: E402
from jaxllm.serve import dataset  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run directory of the teacher")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompts", help="file, folder or glob of conversations: .json, .jsonl(.gz, .zst), .parquet")
    asked.add_argument("--texts", help="file, folder or glob of texts, or 'embedded'")
    parser.add_argument("--out", required=True, help="the jsonl; beside it lie what was left out, and what made it")
    parser.add_argument("--format", default="auto", help="of the conversations: messages, alpaca, sharegpt, ...")
    parser.add_argument("--field", default="text", help="field of a record that holds the text")
    parser.add_argument("--prefix_tokens", type=int, default=32, help="of each text, which the teacher continues")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many prompts; 0: all")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens that sum to p")
    parser.add_argument("--min_p", type=float, default=0.0, help="only tokens this times as likely as the likeliest")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="at most so many per answer")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts that are answered together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to use; the newest, unless told")
    args = parser.parse_args()
    sampler = SamplerConfig(args.temperature, args.top_k, args.top_p, args.min_p)
    args.step = args.step or next(whole_steps(Path(args.workdir) / "checkpoints"), None)
    model, params, tokenizer = workdir.load(args.workdir, step=args.step)
    if args.prompts:
        tasks = dataset.questions(args.prompts, tokenizer, format=args.format, limit=args.limit)
    else:
        tasks = dataset.prefixes(args.texts, tokenizer, field=args.field, length=args.prefix_tokens, limit=args.limit)
    made_by = vars(args) | {"source": DocumentSource(args.prompts or args.texts).fingerprint}
    how = dict(max_new_tokens=args.max_new_tokens, sampler=sampler, batch_size=args.batch_size, seed=args.seed)
    counts = dataset.write(args.out, tasks, model, params, made_by=made_by, stop_ids=tokenizer.stop_ids, **how)
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
