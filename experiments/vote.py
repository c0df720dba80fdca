"""Blind votes on the answers of two or more checkpoints, their ranking, and preferences to train on.

    python experiments/vote.py --runs runs/sft runs/dpo@200 --questions=questions.txt --voter=ann
    python experiments/vote.py --ranking --figure=ranking.png
    python experiments/vote.py --export=votes.jsonl

Of each question a, b, t (a tie), s (skip) or q (stop) is typed. The same command goes on where it was stopped.
"""

import argparse
import os
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402  the checkout must be importable first

from jaxllm.evaluate import questions  # noqa: E402
from jaxllm.generate import SamplerConfig  # noqa: E402
from jaxllm.serve import ballots, chat, votes  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", default="votes.db", help="SQLite file of answers and votes; made where missing")
    parser.add_argument("--runs", nargs="+", default=[], metavar="DIR[@STEP]", help="who answers; at least two")
    parser.add_argument("--questions", help="a .txt, a question per line, or .jsonl of conversations or preferences")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions")
    parser.add_argument("--voter", default=os.environ.get("USER", "voter"), help="who votes; is asked everything once")
    parser.add_argument("--temperature", type=float, default=0.7, help="divides the logits; 0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens that sum to p")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="per answer; at most half of the context")
    parser.add_argument("--seed", type=int, default=0, help="of the answers, and of the order of the questions")
    parser.add_argument("--export", help="jsonl to write: what was voted, as preferences")
    parser.add_argument("--ranking", action="store_true", help="show who wins")
    parser.add_argument("--figure", default="", help="PNG of it")
    args = parser.parse_args()
    if not (args.questions or args.export or args.ranking or args.figure):
        parser.error("nothing to do: give --questions to vote on, --export, --ranking or --figure")
    sampler = SamplerConfig(args.temperature, args.top_k, args.top_p)
    manner, show = chat.Manner(sampler, args.max_new_tokens, args.seed), Console().print
    with closing(ballots.open(args.database)) as database:
        if args.questions:
            prompts = questions.of_file(args.questions)[: args.limit]
            print(dict(votes.session(database, args.runs, prompts, manner, chat.typed(), voter=args.voter, show=show)))
        if args.export:
            print(f"{args.export}: {dict(ballots.export(database, args.export))}")
        if args.ranking or args.figure:
            show(votes.standings(database, figure=args.figure))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
