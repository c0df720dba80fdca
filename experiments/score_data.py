"""Writes conversations again as jsonl, each with how surprised a run's model is by its answers, in nats per token.

    python experiments/score_data.py --workdir=runs/pretrain --data=instructions.json --out=scored.jsonl

Then a chat source takes the least surprising 200 with path=scored.jsonl, select=lowest, score_field=nats, keep=200.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.progress import track  # noqa: E402  the checkout must be importable first

from jaxllm import workdir  # noqa: E402
from jaxllm.data import conversations  # noqa: E402
from jaxllm.data.config import FORMATS, TEXT, SourceConfig  # noqa: E402
from jaxllm.data.examples import resolved  # noqa: E402
from jaxllm.data.sources import DocumentSource, json_line  # noqa: E402
from jaxllm.evaluate.scoring import answer_nlls  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="run directory that train.py made")
    parser.add_argument("--data", required=True, help="file, folder or glob of conversations")
    parser.add_argument("--out", required=True, help="jsonl file to write; must not exist")
    parser.add_argument("--format", default="auto", choices=[name for name in FORMATS if name != TEXT])
    parser.add_argument("--sequence_length", type=int, default=0, help="tokens read of each; 0: as in training")
    parser.add_argument("--step", type=int, default=None, help="checkpoint to ask; the newest, unless told")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists: give --out another name")
    format = resolved(SourceConfig(args.data, format=args.format)).format
    read = functools.partial(conversations.conversation, format=format)
    records = list(DocumentSource(args.data).records())
    asked = [record.parsed(read) for record in records]
    for record in records:
        record.parsed(json_line)  # what could not be written is named before the model is asked
    length = args.sequence_length or workdir.config(args.workdir)["data"]["sequence_length"]
    nats = answer_nlls(*workdir.load(args.workdir, step=args.step), asked, sequence_length=length)
    lines = []
    for record, nat in zip(track(records, "score", disable=not sys.stderr.isatty()), nats, strict=True):
        if not math.isnan(nat):
            lines.append(json_line({**record.value, "nats": nat}))
    Path(args.out).write_text("".join(lines), encoding="utf-8")
    unread = len(records) - len(lines)
    print(f"{len(lines)} of {len(records)} written to {args.out}; {unread} have no answer in {length} tokens")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
