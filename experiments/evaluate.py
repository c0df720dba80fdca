"""Measures a run's newest checkpoint, and whether another one differs.

    python experiments/evaluate.py --workdir=runs/pretrain --suite=perplexity --files='held_out/*.txt'
    python experiments/evaluate.py --workdir=runs/sft --suite=answers --files=qa.jsonl --compare=runs/base
    python experiments/evaluate.py --workdir=runs/sft --suite=choice --files=choices.jsonl [--chat]
    python experiments/evaluate.py --workdir=runs/grpo --suite=tasks --tasks=addition:2 --samples=8 --temperature=1
    python experiments/evaluate.py --workdir=runs/reward --suite=reward [--files=pairs.jsonl] [--ensemble runs/other]

Writes evaluation.json, evaluation_items.jsonl and figures/evaluation.png (reward: calibration.png) into the run
directory. Without --files, answers asks what the run holds out, and reward compares the pairs that it holds out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm.evaluate import reporting  # noqa: E402  the checkout must be importable first
from jaxllm.evaluate.suites import SUITES, Asking, Settings, named_files, named_levels  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--workdir", required=True, help="run directory that train.py made")
    flag("--suite", choices=[*SUITES, "reward"], default="perplexity", help="what to measure")
    flag("--files", action="append", default=[], help="[NAME=]GLOB of .txt, .jsonl(.gz, .zst) or .parquet; repeatable")
    flag("--compare", default="", metavar="DIR[@STEP]", help="a second checkpoint, asked the same; a paired test")
    flag("--tasks", default="", metavar="NAME:LEVEL,...", help="of the suite tasks: which, and how hard")
    flag("--count", type=int, default=0, help="at most so many of each file or task; 0: all, of a task 200")
    flag("--chat", action="store_true", help="of the suite choice: ask in a conversation, not as a document")
    flag("--samples", type=int, default=1, help="answers to each question, for pass@k")
    flag("--temperature", type=float, default=0.0, help="divides the logits; 0 is greedy")
    flag("--max_new_tokens", type=int, default=128, help="at most so many per answer")
    flag("--seed", type=int, default=0, help="the same seed gives the same answers")
    flag("--workers", type=int, default=1, help="processes that verify answers, each with a time limit; 0: this one")
    flag("--ensemble", nargs="+", default=[], help="further reward models: the mean of all is measured")
    flag("--field", default="text", help="of the suite perplexity: field of a record that holds the text")
    flag("--sequence_length", type=int, default=0, help="tokens seen at a time; 0: as in training")
    flag("--batch_size", type=int, default=8, help="rows at a time; changes speed, not results")
    flag("--step", type=int, default=None, help="checkpoint to measure; the newest, unless told")
    args = parser.parse_args()
    if args.suite == "reward":
        if args.compare or args.count or len(args.files) > 1 or named_files(args.files).keys() - {""}:
            raise ValueError("--suite=reward takes one --files=GLOB without a NAME=, and no --compare and no --count")
        return reporting.reward([args.workdir, *args.ensemble], path="".join(args.files), step=args.step)
    sampling = dict(samples=args.samples, temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    asking = Asking(**sampling, batch_size=args.batch_size, seed=args.seed, workers=args.workers)
    given = dict(field=args.field, form="chat" if args.chat else "text", count=args.count, asking=asking)
    files, tasks = named_files(args.files), named_levels(args.tasks)
    settings = Settings(files=files, tasks=tasks, sequence_length=args.sequence_length, **given)
    reporting.suite(args.suite, args.workdir, settings, step=args.step, compare=args.compare)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
