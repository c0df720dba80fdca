import json
import random
import subprocess
import sys

import numpy as np
import pytest

from jaxllm.text.special_tokens import NUM_SPECIAL_TOKENS, SPECIAL_TOKENS
from jaxllm.text.tokenizer import byte_tokenizer, load, train

HARD = [
    "", " ", "  ", "\n", "\n\n \n", "\t\tx", "\r\n a\r\rb\n", "\0", "a\0b\0", "a" + " " * 40 + "b", " lead", "trail ",
    "\u2581", "a\u2581b", "\u2581 \u2581\n\u2581", "\u2585", "e\u0301", "\u0301", "\u200d", "\ufeff", "\ufffd",
    "\ufffe", "\U0010ffff",
    "\u3000\u00a0\u2028", "👩‍👩‍👧‍👦 🇫🇷 é ß Ω 漢字 नमस्ते", "<0x0A>", "<unk>", "<s>", "<pad>",
    *SPECIAL_TOKENS, "x<|eos|>y</think>",
    "def f(x):\n\treturn  x  # ▁▁\n", "1234567890" * 5, "a" * 5000, "\u2581" * 300,
]  # fmt: skip


def random_texts(count, seed=0):
    """Texts of every plane of Unicode without surrogates, and texts that random bytes decode to."""
    draw = random.Random(seed)
    ranges = [(0, 0x7F), (0, 0x24F), (0x300, 0x36F), (0x2500, 0x2600), (0xE000, 0x10FFFF), (0, 0xD7FF)]
    for index in range(count):
        size = draw.randrange(12)
        if index % 3:
            low, high = draw.choice(ranges)
            yield "".join(chr(draw.randint(low, high)) for _ in range(size))
        else:
            yield draw.randbytes(size).decode(draw.choice(["latin-1", "utf-8"]), errors="replace")


def test_every_text_comes_back_exactly_and_counts_its_bytes(tokenizer):
    texts = HARD + list(random_texts(10_000))
    for text, tokens in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(tokens) == text
        assert tokenizer.byte_lengths_V[tokens].sum() == len(text.encode())


def test_text_never_becomes_a_special_token(tokenizer):
    for text in HARD:
        assert all(token >= NUM_SPECIAL_TOKENS for token in tokenizer.encode(text))


def test_a_batch_is_encoded_as_its_texts_are_one_by_one_with_any_number_of_threads(tokenizer, topics):
    texts = [*HARD, *topics[:5]]
    alone = [tokenizer.encode(text) for text in texts]
    for threads in (1, 3):
        assert [tokens.tolist() for tokens in tokenizer.encode_batch(texts, threads=threads)] == alone
    assert tokenizer.encode_batch([]) == []


def test_cutting_at_newlines_gives_the_ids_that_sentencepiece_gives_to_the_whole(pieces, topics):
    text = topics[3]
    assert "\n" in text and "\u2581" not in text
    assert pieces.encode(text) == list(pieces._processor.encode(text))


def test_pieces_shorten_text(pieces, topics):
    assert len(pieces.encode(topics[3])) < 0.6 * len(topics[3].encode())


def test_the_byte_tokenizer_has_one_id_per_byte():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 288
    assert tokenizer.encode("aé") == [32 + 0x61, 32 + 0xC3, 32 + 0xA9]


def test_a_lone_surrogate_is_refused_with_its_position(tokenizer):
    text = b"ab\xff".decode("utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"lone surrogate '\\udcff' at position 2.*strict UTF-8"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="position 2"):
        tokenizer.encode_batch(["fine", text])


def test_decoding_joins_bytes_before_it_reads_characters(tokenizer):
    tokens = tokenizer.encode("é😀")
    assert len(tokens) > 2
    assert tokenizer.decode(tokens[:-1]).endswith("\ufffd")
    assert b"".join(map(tokenizer.token_bytes, tokens)).decode() == "é😀"


def test_special_tokens_are_spelled_when_decoded_and_stand_for_no_bytes(tokenizer):
    tokens = [2, *tokenizer.encode("hi"), 3]
    assert tokenizer.decode(tokens) == "<|bos|>hi<|eos|>"
    assert not tokenizer.byte_lengths_V[:NUM_SPECIAL_TOKENS].any()
    assert tokenizer.byte_lengths_V[NUM_SPECIAL_TOKENS:].all()
    assert tokenizer.token_bytes(2) == b""


def test_an_id_past_the_vocabulary_stands_for_nothing_and_one_below_0_is_refused(tokenizer):
    """A model may have more rows than its tokenizer has ids, and sample any of them."""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.decode([*tokenizer.encode("hi"), tokenizer.vocab_size, 10**6]) == "hi"
    with pytest.raises(ValueError, match="token id -1 is outside of the vocabulary: ids are 0.."):
        tokenizer.decode([-1])


def test_a_saved_tokenizer_is_loaded_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load(tmp_path / "tokenizer")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.vocab_size == tokenizer.vocab_size
    assert np.array_equal(np.load(tmp_path / "tokenizer/byte_lengths.npy"), tokenizer.byte_lengths_V)
    texts = HARD + list(random_texts(300, seed=1))
    for ours, theirs in zip(tokenizer.encode_batch(texts), loaded.encode_batch(texts), strict=True):
        assert np.array_equal(ours, theirs)


def test_training_twice_gives_identical_files_in_another_process_too(topics, tmp_path):
    for name in "ab":
        train(topics[:3], vocab_size=500).save(tmp_path / name)
    program = (
        "import pydoc_data.topics as p, sys; from jaxllm.text.tokenizer import train;"
        "train(list(p.topics.values())[:3], vocab_size=500).save(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "c"], check=True)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert len(files[0]) == 3 and files[0] == files[1] == files[2]


def test_fingerprints_tell_tokenizers_apart(pieces, topics):
    other = train(topics[:20], vocab_size=699)
    assert len({byte_tokenizer().fingerprint, pieces.fingerprint, other.fingerprint}) == 3
    assert byte_tokenizer().fingerprint == byte_tokenizer().fingerprint


def test_the_special_tokens_of_a_trained_model_have_our_ids(pieces):
    model = pieces._processor
    assert [model.id_to_piece(index) for index in range(NUM_SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    assert all(model.is_control(index) for index in range(2, NUM_SPECIAL_TOKENS))


def test_a_vocabulary_larger_than_the_corpus_supports_is_refused_with_the_largest_size():
    texts = ["the cat sat on the mat"] * 3
    with pytest.raises(ValueError, match=r"vocab_size=5000 is larger than the corpus supports: at most (\d+)") as error:
        train(texts, vocab_size=5000)
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert train(texts, vocab_size=largest).vocab_size == largest
    with pytest.raises(ValueError, match="lower vocab_size"):
        train(texts, vocab_size=largest + 1)


def test_a_vocabulary_too_small_is_refused_with_the_smallest_size():
    texts = ["the cat sat on the mat"] * 3
    with pytest.raises(ValueError, match=r"vocab_size=200 is too small: .* at least (\d+)") as error:
        train(texts, vocab_size=200)
    smallest = int(str(error.value).split("at least ")[1].split(";")[0])
    assert train(texts, vocab_size=smallest).vocab_size == smallest


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_a_corpus_without_text_is_refused(texts):
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        train(texts, vocab_size=400)


def test_training_learns_from_lines_with_tabs_marks_and_great_length():
    for mark in "\t\u2581\u2585\0\r":
        pieces = train([f"{mark}wonderful{mark}" * 50], vocab_size=303).encode("wonderful")
        assert len(pieces) <= 3, f"{mark!r} kept its line out of the training"
    assert len(train(["wonderful " * 5000], vocab_size=305).encode("wonderful")) <= 3


def test_training_stops_reading_at_max_bytes():
    def endless():
        while True:
            yield "the cat sat on the mat\n"

    assert train(endless(), vocab_size=310, max_bytes=10_000).vocab_size == 310


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer in .*: tokenizer.json is missing; give where one was saved"
    ):
        load(tmp_path)


def test_a_changed_or_cut_model_is_refused(pieces, tmp_path):
    pieces.save(tmp_path)
    model = tmp_path / "tokenizer.model"
    whole = model.read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], b"", whole.replace("▁the".encode(), "▁thy".encode())):
        model.write_bytes(damaged)
        with pytest.raises(ValueError, match="changed or cut short"):
            load(tmp_path)
    model.unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        load(tmp_path)


def test_a_description_of_another_kind_is_refused(pieces, tmp_path):
    pieces.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "words"}))
    with pytest.raises(ValueError, match="kind 'words' is not one of"):
        load(tmp_path)
