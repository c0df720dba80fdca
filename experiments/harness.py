"""Measures a run with tasks of EleutherAI's lm-eval (pip install lm-eval), which fetches their data itself.

    python experiments/harness.py --workdir=runs/pretrain --tasks=arc_easy,hellaswag [--limit=200] [--out=results.json]

With --include_path it finds tasks of one's own, a YAML file each.
"""

import argparse
import json
import sys
from pathlib import Path

# In place of this folder: its evaluate.py has the name of a package that lm-eval imports.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jaxllm.evaluate import harness, suites  # noqa: E402  the checkout must be importable first


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--workdir", required=True, help="run directory that train.py made")
    flag("--tasks", required=True, help="names of lm-eval's tasks, with commas between several")
    flag("--include_path", default=None, help="folder with tasks of one's own")
    flag("--limit", type=int, default=None, help="at most so many items of each task")
    flag("--num_fewshot", type=int, default=None, help="examples before each item; as the task says, unless told")
    flag("--chat", action="store_true", help="ask in a conversation, by the run's template")
    flag("--sequence_length", type=int, default=0, help="tokens seen at a time; 0: as in training")
    flag("--batch_size", type=int, default=8, help="rows at a time; changes speed, not results")
    flag("--step", type=int, default=None, help="checkpoint to measure; the newest, unless told")
    flag("--out", default="", help="JSON file for the results")
    args = parser.parse_args()
    run = suites.loaded(args.workdir, step=args.step, sequence_length=args.sequence_length)
    found = harness.evaluated(
        run,
        args.tasks.split(","),
        batch_size=args.batch_size,
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        apply_chat_template=args.chat,
    )
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    for task, measures in found.items():
        for name, value in measures.items():
            print(f"{task:<24}{name:<28}" + (f"{value:.6g}" if isinstance(value, float) else str(value)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
