"""Samples several answers of a run to each prompt, has them judged, and writes pairs to learn preferences from.

    python experiments/label_preferences.py --workdir=runs/sft --prompts=asked.txt --judge=rule:style --out=pairs.jsonl

A judge is rule:NAME, reward:DIR[,DIR...] (the mean of reward models) or model:DIR (a language model that is asked in
both orders). Each line has the best answer and the worst; with --best, the conversation with the best one alone, for
rejection-sampling fine-tuning. Ties and equal answers are left out and counted. The same command again goes on.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm import workdir  # noqa: E402  the checkout must be importable first
from jaxllm.checkpoint import whole_steps  # noqa: E402
from jaxllm.data.sources import DocumentSource  # noqa: E402
from jaxllm.evaluate import judges, questions  # noqa: E402
from jaxllm.generate import SamplerConfig  # noqa: E402
from jaxllm.serve import labelling  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run directory whose newest checkpoint answers")
    parser.add_argument("--prompts", required=True, help="file, folder or glob: lines of .txt, or conversations")
    parser.add_argument("--judge", required=True, help="rule:NAME, reward:DIR[,DIR...] or model:DIR")
    parser.add_argument("--out", required=True, help="the jsonl; beside it lie what was left out, and what made it")
    parser.add_argument("--best", action="store_true", help="write the best answers alone, as conversations")
    parser.add_argument("--samples", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many prompts; all, unless told")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens that sum to p")
    parser.add_argument("--min_p", type=float, default=0.0, help="only tokens this times as likely as the likeliest")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="at most so many per answer")
    parser.add_argument("--batch_size", type=int, default=16, help="answers that are sampled together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to use; the newest, unless told")
    args = parser.parse_args()
    sampler = SamplerConfig(args.temperature, args.top_k, args.top_p, args.min_p)
    args.step = args.step or next(whole_steps(Path(args.workdir) / "checkpoints"), None)
    prompts = questions.of_file(args.prompts)[: args.limit]
    made_by = vars(args) | {"source": DocumentSource(args.prompts).fingerprint, "judge": judges.identity(args.judge)}
    how = dict(max_new_tokens=args.max_new_tokens, sampler=sampler, batch_size=args.batch_size, seed=args.seed)
    how |= dict(samples=args.samples, choice=labelling.BEST if args.best else labelling.PAIR)
    judge, speaker = judges.load(args.judge), workdir.load(args.workdir, step=args.step)
    labels = labelling.write(args.out, prompts, *speaker, judge, made_by=made_by, **how)
    print(f"{args.out}: " + ", ".join(f"{count} {name}" for name, count in labels.counts.items()))
    print("judge: " + ", ".join(f"{name} {value:.3f}" for name, value in labels.report.items()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
