"""Writes problems drawn from a seed as jsonl files: worked answers to learn the format from, and problems held out.

    python experiments/tasks.py --task=addition --level=2 --out=data/addition [--correct=0.2] [--tool=calculator]

demonstrations.jsonl ({messages}: <think>the way</think><answer>it</answer>) is for fine-tuning; heldout.jsonl ({prompt,
answer, ...}) has none of its prompts. With --correct below 1 the others have the right form and wrong arithmetic.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm.data import made, tasks  # noqa: E402  the checkout must be importable first
from jaxllm.data.problems import problems  # noqa: E402
from jaxllm.rl import tools  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="addition", help=f"with commas between several: {', '.join(tasks.TASKS)}")
    parser.add_argument("--level", type=int, default=2, help="how hard, from 1: the digits of a number, for example")
    parser.add_argument("--count", type=int, default=2000, help="of demonstrations")
    parser.add_argument("--heldout", type=int, default=200, help="problems of heldout.jsonl, at most")
    parser.add_argument("--share", type=float, default=tasks.HELD_OUT, help="of all prompts that is held out")
    parser.add_argument("--correct", type=float, default=1.0, help="share of the demonstrations that are right")
    parser.add_argument("--tool", default="", choices=["", *tools.TOOLS], help="demonstrations call this one")
    parser.add_argument("--seed", type=int, default=0, help="decides the demonstrations")
    parser.add_argument("--out", required=True, help="folder to write; no other file in it is replaced")
    args = parser.parse_args()
    levels = dict.fromkeys(args.task.split(","), args.level)
    made.require(0, count=args.count)
    if args.tool:
        draw = random.Random(args.seed)
        asked = (tasks.drawn(draw.choice(list(levels)), args.level, draw, share=args.share) for _ in range(args.count))
        shown = [tools.demonstration(problem, args.tool) for problem in asked]
    else:
        shown = list(tasks.demonstrations(levels, args.seed, args.count, correct=args.correct, share=args.share))
    sources = {name: {"kind": name, "level": level} for name, level in levels.items()}
    held_out = problems(sources, validation=args.share).validation(args.heldout)
    asked = [{"prompt": problem.prompt.messages[-1]["content"], **problem.record} for problem in held_out]
    for path, count in made.write(args.out, {"demonstrations": shown, "heldout": asked}):
        print(f"{path}: {count}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
