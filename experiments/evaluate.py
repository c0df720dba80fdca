"""Measures a run's newest checkpoint.

    python experiments/evaluate.py --workdir=runs/pretrain --suite=perplexity --files='held_out/*.txt'
    python experiments/evaluate.py --workdir=runs/reward --suite=reward [--files=pairs.jsonl] [--ensemble runs/other]

Writes evaluation.json into the run directory. reward: how often a reward model prefers what people do, in the files or
in what it held out, beside two trivial judges; and figures/calibration.png: how sure it is, how often it is right.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm import figures, workdir  # noqa: E402  the checkout must be importable first
from jaxllm.evaluate import perplexity, rewarding  # noqa: E402


def measured_perplexity(args):
    length = args.sequence_length or workdir.config(args.workdir)["data"]["sequence_length"]
    how = dict(path=args.files, field=args.field, sequence_length=length, batch_size=args.batch_size)
    return perplexity.of_files(*workdir.load(args.workdir, step=args.step), **how)


def measured_reward(args):
    members = [args.workdir, *args.ensemble]
    report, bins = rewarding.accuracy(members, path=args.files, step=args.step)
    figures.calibration({" and ".join(members): bins}, Path(args.workdir) / "figures" / "calibration.png")
    return report


SUITES = {"perplexity": measured_perplexity, "reward": measured_reward}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run directory that train.py made")
    parser.add_argument("--suite", choices=SUITES, default="perplexity", help="what to measure")
    parser.add_argument("--files", default="", help="file, folder or glob of .txt, .jsonl(.gz, .zst) or .parquet")
    parser.add_argument("--ensemble", nargs="+", default=[], help="further reward models: the mean of all is measured")
    parser.add_argument("--field", default="text", help="field of a jsonl or parquet record that holds the text")
    parser.add_argument("--sequence_length", type=int, default=0, help="tokens seen at a time; 0: as in training")
    parser.add_argument("--batch_size", type=int, default=8, help="rows at a time; changes speed, not results")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to measure; the newest, unless told")
    args = parser.parse_args()
    result = SUITES[args.suite](args)
    workdir.write_evaluation(args.workdir, result)
    for name, value in result.items():
        print(f"{name:<20}" + (f"{value:,.6g}" if isinstance(value, float) else json.dumps(value)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
