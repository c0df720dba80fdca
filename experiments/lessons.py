"""Writes what a model of a small, wholly known world is taught in each stage of its life, as jsonl files.

    python experiments/lessons.py --out=data/lessons [--seed=0]

documents.jsonl has lives, talks, worked sums, and dirt among them; instructions, preferences and questions ask about
most people, and the files named heldout_* about those of whom only the documents tell.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm.data import lessons, made  # noqa: E402  the checkout must be importable first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write; no other file in it is replaced")
    for name, usual in lessons.Plan._field_defaults.items():
        parser.add_argument(f"--{name}", type=type(usual), default=usual, help=lessons.HELP[name])
    args = vars(parser.parse_args())
    out = args.pop("out")
    for path, count in made.write(out, lessons.lessons(lessons.Plan(**args))):
        print(f"{path}: {count}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
