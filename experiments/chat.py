"""Talks with a run's newest checkpoint, or asks several runs the same.

    python experiments/chat.py --workdir=runs/sft [--ask="What is the boiling point of water?"]
    python experiments/chat.py --compare runs/pretrain runs/sft --questions=questions.txt

While talking, /reset forgets the conversation, /system TEXT starts one with that system turn, /quit or Ctrl-D ends.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402  the checkout must be importable first

from jaxllm.generate import SamplerConfig  # noqa: E402
from jaxllm.serve import chat  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speaker = parser.add_mutually_exclusive_group(required=True)
    speaker.add_argument("--workdir", help="run directory that train.py made")
    speaker.add_argument("--compare", nargs="+", help="several of them, which are asked the same, side by side")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--ask", help="one question: answers it and exits")
    said.add_argument("--questions", help="a text file, a question per line: answers them and exits")
    parser.add_argument("--system", default="", help="system turn of each conversation")
    parser.add_argument("--temperature", type=float, default=0.7, help="divides the logits; 0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens that sum to p")
    parser.add_argument("--min_p", type=float, default=0.0, help="only tokens this times as likely as the likeliest")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="per answer; at most half of the context")
    parser.add_argument("--context", type=int, default=0, help="tokens seen at a time; 0: as in training")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to use; the newest, unless told")
    args = parser.parse_args()
    sampler = SamplerConfig(args.temperature, args.top_k, args.top_p, args.min_p)
    how = dict(manner=chat.Manner(sampler, args.max_new_tokens, args.seed, args.context), system=args.system)
    print(how["manner"], file=sys.stderr)
    load = functools.cache(functools.partial(chat.load, step=args.step))
    if args.compare or args.questions:
        given = [args.ask] if args.ask else args.questions and chat.read_questions(args.questions)
        rounds = [given] if given else ([line] for line in chat.typed())
        runs = ",".join(args.compare or [args.workdir]).split(",")
        for table in chat.side_by_side(runs, rounds, load, **how):
            Console().print(table)
    elif args.ask:
        chat.ask(load(args.workdir), args.ask, **how)
    else:
        chat.talk(load(args.workdir), chat.typed(), **how)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
