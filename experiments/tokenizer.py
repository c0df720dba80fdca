"""Learns a SentencePiece tokenizer from documents, and measures it on documents that it did not learn from.

    python experiments/tokenizer.py --files=data/clean/clean.jsonl --out=data/tokenizer --vocab_size=4096

A run takes it with --config.tokenizer.path=data/tokenizer; experiments/show_tokens.py shows how it cuts a text.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxllm.data.sources import DocumentSource  # noqa: E402  the checkout must be importable first
from jaxllm.text import prepare  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", required=True, help="file, folder or glob of documents")
    parser.add_argument("--out", required=True, help="folder to write; no other file in it is replaced")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids in all, special tokens and bytes included")
    parser.add_argument("--held_out", type=float, default=0.05, help="share of the documents to measure on")
    parser.add_argument("--field", default="text", help="that holds the text of a record")
    args = parser.parse_args()
    texts = (document.text for document in DocumentSource(args.files, args.field).documents())
    found = prepare.learn(texts, out=args.out, vocab_size=args.vocab_size, held_out=args.held_out)
    for name, value in found.items():
        print(f"{name:<20}{value:,.6g}" if isinstance(value, float) else f"{name:<20}{value:,}")
    print(f"use it with --config.tokenizer.path={args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
