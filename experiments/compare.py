"""Compares groups of runs that differ in their seed: a table of the last values of a metric, and a figure of its
course.

    python experiments/compare.py --metric=validation_loss --out=comparison.png \\
        'data alone=runs/hard_*' 'forward KL=runs/forward_*'

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="LABEL=GLOB", help="runs to compare")
    parser.add_argument("--metric", default="validation_loss", help="a name in metrics.jsonl")
    parser.add_argument("--out", default="comparison.png", help="file for the figure")
    args = parser.parse_args()
    groups = dict(map(rows_of, args.groups))
    table = Table("runs", "count", "mean", "least", "greatest", title=f"{args.metric} at the last step")
    for label, runs in groups.items():
        last = figures.aligned(runs, args.metric)[1][:, -1]
        table.add_row(label, str(len(last)), *(f"{value:.4f}" for value in (last.mean(), last.min(), last.max())))
    Console().print(table)
    figures.comparison(groups, args.out, name=args.metric)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
