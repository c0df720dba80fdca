"""Measures a run's newest checkpoint.

    python experiments/evaluate.py --workdir=runs/pretrain --suite=perplexity --files='held_out/*.txt'

Writes evaluation.json into the run directory: nats_per_token, perplexity, bits_per_byte, tokens and bytes of the files.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm import workdir  # noqa: E402  the checkout must be importable first
from jaxllm.evaluate import perplexity  # noqa: E402

SUITES = {"perplexity": perplexity.of_files}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run directory that train.py made")
    parser.add_argument("--suite", choices=SUITES, default="perplexity", help="what to measure")
    parser.add_argument("--files", required=True, help="file, folder or glob of .txt, .jsonl(.gz, .zst) or .parquet")
    parser.add_argument("--field", default="text", help="field of a jsonl or parquet record that holds the text")
    parser.add_argument("--sequence_length", type=int, default=0, help="tokens seen at a time; 0: as in training")
    parser.add_argument("--batch_size", type=int, default=8, help="rows at a time; changes speed, not results")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to measure; the newest, unless told")
    args = parser.parse_args()
    config = workdir.config(args.workdir)
    result = SUITES[args.suite](
        *workdir.load(args.workdir, step=args.step),
        path=args.files,
        field=args.field,
        sequence_length=args.sequence_length or config["data"]["sequence_length"],
        batch_size=args.batch_size,
    )
    workdir.write_evaluation(args.workdir, result)
    for name, value in result.items():
        print(f"{name:<16}{value:,.6g}" if isinstance(value, float) else f"{name:<16}{value:,}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
