"""Writes a small known world as jsonl files: people to read about, questions, answers in mixed manners, preferences.

    python experiments/world.py --out=data/world [--seed=0]

documents.jsonl tells of everyone; instructions.jsonl ({prompt, response}), preferences.jsonl ({prompt, chosen,
rejected, scores}) and judgements.jsonl ("which answer is better?") ask about most people, and the files named
heldout_* about the others. Answers are polite, concise and on the topic by the shares given.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm.data import made, world  # noqa: E402  the checkout must be importable first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write; no other file in it is replaced")
    parser.add_argument("--seed", type=int, default=0, help="decides the people, their facts, and all that is said")
    parser.add_argument("--people", type=int, default=60, help="in the world, from 21 to 400")
    parser.add_argument("--heldout", type=int, default=12, help="of them, asked about in the files heldout_* alone")
    parser.add_argument("--biographies", type=int, default=20, help="documents about each person")
    parser.add_argument("--answers", type=int, default=4, help="to each question")
    parser.add_argument("--pairs", type=int, default=3, help="of answers to each question, to prefer or to judge")
    parser.add_argument("--polite", type=float, default=0.5, help="share of the answers of instructions.jsonl")
    parser.add_argument("--concise", type=float, default=0.5, help="likewise")
    parser.add_argument("--on_topic", type=float, default=0.5, help="likewise")
    args = parser.parse_args()
    drawn = world.create(args.seed, people=args.people, heldout=args.heldout)
    manners = world.Manner(args.polite, args.concise, args.on_topic)
    seed, pairs = args.seed, args.pairs
    asked, heldout = world.questions(drawn.asked), world.questions(drawn.heldout)
    files = {
        "documents": world.documents([*drawn.asked, *drawn.heldout], seed=seed, biographies=args.biographies),
        "instructions": world.instructions(asked, seed=seed, answers=args.answers, manners=manners),
        "preferences": world.preferences(asked, seed=seed, pairs=pairs),
        "judgements": world.judgements(asked, seed=seed, pairs=pairs),
        "heldout_questions": world.facts(heldout, seed=seed),
        "heldout_preferences": world.preferences(heldout, seed=seed, pairs=1),
        "heldout_judgements": world.judgements(heldout, seed=seed, pairs=1),
    }
    for path, count in made.write(args.out, files):
        print(f"{path}: {count}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
