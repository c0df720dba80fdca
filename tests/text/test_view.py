import subprocess
import sys
from pathlib import Path

from jaxllm.text.tokenizer import byte_tokenizer
from jaxllm.text.view import coloured_tokens, spelling

SCRIPT = Path(__file__).parents[2] / "experiments/show_tokens.py"


def test_every_token_is_shown_with_its_id_and_a_colour_of_its_own():
    view = coloured_tokens(byte_tokenizer(), [2, 32 + 97, 32 + 32, 32 + 10, 32 + 0xC3])
    assert view.plain == "<|bos|>2 a129 ·64 ⏎42 \n<C3>227 "
    styles = [str(span.style) for span in view.spans if str(span.style) != "dim"]
    assert len(styles) == 5 == len(set(styles))


def test_ids_can_be_left_out():
    assert coloured_tokens(byte_tokenizer(), byte_tokenizer().encode("a\tb"), ids=False).plain == "a→b"


def test_what_cannot_be_printed_is_shown_in_hex(tokenizer):
    shown = "".join(spelling(tokenizer, token) for token in tokenizer.encode("\x1b[31m\x07"))
    assert shown.isprintable() and "<1B>" in shown and "<07>" in shown


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, encoding="utf-8")


def test_the_script_shows_a_text_and_the_tokens_of_a_saved_tokenizer(pieces, tmp_path):
    pieces.save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_bytes("the é\r\n".encode())
    shown = run("--tokenizer", tmp_path / "tokenizer", "--file", tmp_path / "text.txt")
    assert shown.returncode == 0, shown.stderr
    assert "the" in shown.stdout and "8 bytes in" in shown.stdout
    assert run("--text", "ab").stdout.startswith("a129 b130")


def test_the_script_names_what_is_wrong():
    assert "--tokenizer" in run("--help").stdout
    shown = run("--tokenizer", "nowhere", "--text", "x")
    assert shown.returncode == 2 and "no tokenizer in nowhere" in shown.stderr
