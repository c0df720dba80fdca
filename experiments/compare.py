"""Compares groups of runs that differ in their seed: tables of their last metrics, and a figure of the courses.

    python experiments/compare.py --out=distillation.png 'data alone=runs/hard_*' 'forward KL=runs/forward_*'
    python experiments/compare.py --metric=reward/preference,reward/style --root_of=kl 'no KL=runs/free_*'

A group is a label and a glob of run directories. The table says mean, least and greatest over each group's runs.
"""

import argparse
import glob
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402  the checkout must be importable first
from rich.table import Table  # noqa: E402

from jaxllm import figures, metrics  # noqa: E402


def rows_of(group):
    """(label, the rows of each run of ``LABEL=GLOB``)."""
    label, _, pattern = group.partition("=")
    directories = sorted(glob.glob(pattern))
    if not directories:
        raise ValueError(f"{group!r} names no run directory: give LABEL=GLOB, such as 'data alone=runs/hard_*'")
    return label, [metrics.read(Path(directory) / "metrics.jsonl") for directory in directories]


def last_values(groups, name):
    """The table of a metric's last values."""
    table = Table("runs", "count", "mean", "least", "greatest", title=f"{name} at the last step")
    for label, runs in groups.items():
        last = figures.aligned(runs, name)[1][:, -1]
        table.add_row(label, str(len(last)), *(f"{value:.4f}" for value in (last.mean(), last.min(), last.max())))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="LABEL=GLOB", help="runs to compare")
    parser.add_argument("--metric", default="validation_loss", help="a name in metrics.jsonl; several with commas")
    parser.add_argument("--root_of", default="", metavar="METRIC", help="draw against the root of this, not by step")
    parser.add_argument("--out", default="comparison.png", help="file for the figure")
    args = parser.parse_args()
    groups, names = dict(map(rows_of, args.groups)), args.metric.split(",")
    for name in names:
        Console().print(last_values(groups, name))
    if args.root_of:
        figures.against(groups, args.out, names=names, root_of=args.root_of)
    else:
        figures.comparison(groups, args.out, names=names)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
