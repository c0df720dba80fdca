"""Cleans raw documents: drops what is no text, what repeats itself, and what is there already, and says what and why.

    python experiments/curate.py --files='raw/*.jsonl.gz' --out=data/clean [--preset=web] [--min_words=20 ...]

clean.jsonl has the documents that are kept, whole; dropped.jsonl the others, each with its reason; report.json the
counts, with examples. Where documents have a field "noise", it is also counted how much of the planted noise was caught
(`python experiments/lessons.py --noise=0.15` writes such).
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402  the checkout must be importable first

from jaxllm import curate  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", required=True, help="file, folder or glob of documents")
    parser.add_argument("--out", required=True, help="folder to write; no other file in it is replaced")
    parser.add_argument("--field", default="text", help="that holds the text of a record")
    parser.add_argument("--preset", default="any", choices=curate.PRESETS, help="thresholds to begin with")
    thresholds = parser.add_argument_group("thresholds, changed from those of the preset")
    presets = [vars(preset) for preset in curate.PRESETS.values()]
    for field in dataclasses.fields(curate.Limits):
        usual = ", ".join(f"{name} {values[field.name]}" for name, values in zip(curate.PRESETS, presets, strict=True))
        thresholds.add_argument(f"--{field.name}", type=field.type, help=f"{curate.HELP[field.name]} ({usual})")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    report = curate.clean(**given)
    Console().print(curate.table(report))
    print(*curate.said(report), sep="\n")
    print(f"{report['kept']['documents']} of {report['documents']} documents are in {given['out']}/clean.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
