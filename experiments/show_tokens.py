"""Prints a text cut into coloured tokens with their ids, and how many bytes a token stands for on average.

python experiments/show_tokens.py --tokenizer bytes --text "Hello, world"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console  # noqa: E402

from jaxllm.text.tokenizer import byte_tokenizer, load  # noqa: E402
from jaxllm.text.view import coloured_tokens  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="bytes", help="a directory that holds a tokenizer, or 'bytes'")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text itself")
    source.add_argument("--file", type=Path, help="a UTF-8 text file")
    arguments = parser.parse_args()
    try:
        tokenizer = byte_tokenizer() if arguments.tokenizer == "bytes" else load(arguments.tokenizer)
        text = arguments.text if arguments.file is None else arguments.file.read_bytes().decode()
        tokens = tokenizer.encode(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    console = Console(highlight=False)
    console.print(coloured_tokens(tokenizer, tokens), soft_wrap=True)
    num_bytes = int(tokenizer.byte_lengths_V[tokens].sum())
    console.print(f"{num_bytes} bytes in {len(tokens)} tokens: {num_bytes / max(len(tokens), 1):.2f} bytes per token")


if __name__ == "__main__":
    main()
