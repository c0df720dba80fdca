import re

from jaxllm.text import tokenizer

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def test_a_text_is_cut_into_its_tokens_with_their_ids(script):
    status, printed, _ = script("show_tokens.py", "--text", "Hé")
    assert status == 0 and "3 bytes in 3 tokens: 1.00 bytes per token" in printed
    shown = ESCAPES.sub("", printed)
    assert all(str(token) in shown for token in tokenizer.byte_tokenizer().encode("Hé"))


def test_a_saved_tokenizer_and_a_file_are_read(script, tmp_path):
    tokenizer.train(["one two three " * 50], vocab_size=305).save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_bytes("one two\r\n☃".encode())
    status, printed, _ = script(
        "show_tokens.py", "--tokenizer", tmp_path / "tokenizer", "--file", tmp_path / "text.txt"
    )
    count = len(tokenizer.load(tmp_path / "tokenizer").encode("one two\r\n☃"))
    assert status == 0 and f"12 bytes in {count} tokens" in printed and count < 12


def test_an_empty_text_has_no_tokens_and_divides_by_nothing(script):
    status, printed, _ = script("show_tokens.py", "--text", "")
    assert status == 0 and "0 bytes in 0 tokens: 0.00 bytes per token" in printed


def test_what_cannot_be_read_is_named(script, tmp_path):
    status, _, said = script("show_tokens.py", "--tokenizer", tmp_path, "--text", "x")
    assert status == 2 and "no tokenizer in" in said
    status, _, said = script("show_tokens.py", "--file", tmp_path / "missing.txt")
    assert status == 2 and "missing.txt" in said
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    status, _, said = script("show_tokens.py", "--file", tmp_path / "bad.txt")
    assert status == 2 and "error" in said


def test_a_text_or_a_file_must_be_given(script):
    status, _, said = script("show_tokens.py")
    assert status == 2 and "one of the arguments --text --file is required" in said


def test_the_help_names_every_flag(script):
    status, printed, _ = script("show_tokens.py", "--help")
    assert status == 0 and all(flag in printed for flag in ("--tokenizer", "--text", "--file"))
