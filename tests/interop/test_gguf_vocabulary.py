import json
import pydoc_data.topics
from pathlib import Path

import pytest

from jaxllm.interop import gguf_vocabulary as vocabulary
from jaxllm.interop.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from jaxllm.text import chat, hub
from jaxllm.text.chat import Conversation
from jaxllm.text.huggingface import HuggingFaceTokenizer
from jaxllm.text.special_tokens import BOS_ID, END_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS
from jaxllm.text.tokenizer import byte_tokenizer, train

FAMILIES = ("qwen", "smollm2", "llama3", "llama2", "mistral", "gemma")
TOPICS = list(pydoc_data.topics.topics.values())
KEY = "tokenizer.ggml."


def golden(name):
    path = Path(__file__).parent / "golden" / f"tokenizer_{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def theirs(tmp_path):
    """A function: family -> the tokenizer that its Hugging Face folder has; Llama 3 cuts three digits together."""

    def read(name):
        for file, content in golden(name)["files"].items():
            text = content if isinstance(content, str) else json.dumps(content)
            if name == "llama3":
                text = text.replace(r"|\\p{N}| ?", r"|\\p{N}{1,3}| ?")
            (tmp_path / file).write_text(text, encoding="utf-8")
        return hub.read(tmp_path)

    return read


@pytest.fixture(scope="module")
def pieces():
    return train(TOPICS[:30], vocab_size=900)


# What a small byte-level vocabulary says in a GGUF file.
SMALL = {
    KEY + "model": "gpt2",
    KEY + "pre": "smollm",
    KEY + "tokens": ["<|end|>", "<|im_start|>", "a", "b", "\u0120", "1", "2", "ab", "\u0120a", "12", "<tool>", "[PAD]"],
    KEY + "token_type": [CONTROL] * 2 + [NORMAL] * 8 + [USER_DEFINED, UNUSED],
    KEY + "merges": ["a b", "\u0120 a", "1 2"],
    KEY + "eos_token_id": 0,
    KEY + "bos_token_id": 1,
}


# ---- in ----


def test_byte_level_pieces_are_joined_by_their_merges_within_the_cuts_of_their_name():
    tokenizer = vocabulary.read(SMALL)
    assert tokenizer.encode("ab a12") == [7, 8, 5, 6]  # digits apart
    assert tokenizer.decode([7, 8, 5, 6]) == "ab a12"
    assert vocabulary.read(SMALL | {KEY + "pre": "gpt-2"}).encode("ab a12") == [7, 8, 9]
    assert tokenizer.encode("<tool>") == [10] and tokenizer.special_ids == {0, 1}
    assert (tokenizer.eos_id, tokenizer.bos_ids) == (0, ())
    assert tokenizer.template == "" and tokenizer.vocab_size == 11  # what is unused at the end stands for nothing


def test_a_control_token_that_a_text_spells_stays_text():
    spelled = {KEY + "tokens": [*"ab12<|>", "<|a|>"], KEY + "token_type": [NORMAL] * 7 + [CONTROL], KEY + "merges": []}
    tokenizer = vocabulary.read(SMALL | spelled | {KEY + "eos_token_id": 7, KEY + "bos_token_id": 7})
    assert tokenizer.encode("<|a|>") == [4, 5, 0, 5, 6] and tokenizer.eos_id == 7


@pytest.mark.parametrize(
    "said, pre, opening",
    [(None, "smollm", ()), (True, "smollm", (1,)), (False, "llama-bpe", ()), (None, "llama-bpe", (1,))],
)
def test_what_opens_a_text_is_said_or_usual(said, pre, opening):
    metadata = SMALL | {KEY + "pre": pre} | ({} if said is None else {KEY + "add_bos_token": said})
    assert vocabulary.read(metadata).bos_ids == opening


def test_a_word_that_is_a_piece_is_one_where_merges_are_ignored():
    whole = {KEY + "tokens": ["<|end|>", *"abc", "abc"], KEY + "token_type": [CONTROL] + [NORMAL] * 4}
    whole = SMALL | whole | {KEY + "merges": [], KEY + "bos_token_id": 0}
    assert vocabulary.read(whole | {KEY + "pre": "llama-bpe"}).encode("abc") == [4]
    assert vocabulary.read(whole | {KEY + "pre": "smollm"}).encode("abc") == [1, 2, 3]


def scored(**changes):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581a"]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 5
    scores = [0.0] * 259 + [-5.0, -4.0, -3.0, -1.0, -2.0]
    said = dict(model="llama", tokens=tokens, token_type=types, scores=scores, eos_token_id=2, bos_token_id=1)
    return {KEY + key: x for key, x in (said | changes).items()}


def test_scored_pieces_are_joined_best_first_behind_a_space_unless_it_says_otherwise():
    space, a, b, ab, space_a = range(259, 264)
    tokenizer = vocabulary.read(scored())
    assert tokenizer.bos_ids == (1,) and tokenizer.eos_id == 2 and tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("a") == [space_a]
    assert tokenizer.encode("ab") == [space, ab]  # "ab" scores better than "\u2581a"
    assert tokenizer.encode("\u00e9") == [space, 3 + 0xC3, 3 + 0xA9]
    bare = vocabulary.read(scored(add_space_prefix=False, add_bos_token=False))
    assert bare.encode("a ab\n") == [a, space, ab, 3 + 10] and bare.bos_ids == ()
    assert bare.decode(bare.encode("a ab\n")) == "a ab\n"
    worse = vocabulary.read(scored(scores=[0.0] * 259 + [-5.0, -4.0, -3.0, -2.0, -1.0]))
    assert worse.encode("ab") == [space_a, b]


def test_ends_pads_and_the_template_are_taken():
    more = {
        KEY + "padding_token_id": 1,
        KEY + "eot_token_id": 1,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    }
    tokenizer = vocabulary.read(SMALL | more)
    assert tokenizer.pad_id == 1 and set(tokenizer.stop_ids) == {0, 1} and tokenizer.end_id == 1
    assert tokenizer.template == more["tokenizer.chat_template"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({KEY + "model": "t5"}, r"tokenizer\.ggml\.model='t5'; known are \['gpt2', 'llama'\]"),
        ({KEY + "tokens": None}, "known are"),
        (
            {KEY + "pre": "chatglm-bpe"},
            r"tokenizer\.ggml\.pre='chatglm-bpe': how its texts are cut is known for .*qwen2",
        ),
        ({KEY + "pre": None}, "pre=None"),
        ({KEY + "eos_token_id": None}, r"no tokenizer\.ggml\.eos_token_id"),
    ],
)
def test_what_is_not_known_is_refused_with_its_name(changes, message):
    metadata = {key: x for key, x in (SMALL | changes).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        vocabulary.read(metadata)


# ---- out, and in again ----


@pytest.mark.parametrize("name", FAMILIES)
def test_other_peoples_tokenizers_have_the_same_ids_after_it(theirs, name):
    tokenizer = theirs(name)
    metadata = vocabulary.metadata(tokenizer, tokenizer.vocab_size)
    again = vocabulary.read(metadata)
    # SentencePiece puts a space before every text, Hugging Face's Llama 2 not before one that begins with it.
    starts = (" ", "\u2581") if name in ("llama2", "mistral") else ()
    texts = [text for each in golden(name)["texts"] if not (text := each["text"]).startswith(starts)]
    assert len(texts) > 8
    for text in texts:
        assert again.encode(text) == tokenizer.encode(text), text
    for name in ("bos_ids", "eos_id", "end_id", "pad_id", "template", "special_tokens", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert set(again.stop_ids) <= set(tokenizer.stop_ids)  # those that only generation_config.json lists are not said
    assert vocabulary.metadata(again, tokenizer.vocab_size) == metadata


@pytest.mark.parametrize("name", ["qwen", "smollm2", "llama3"])
def test_the_name_of_the_cuts_is_found_by_what_they_do(theirs, name):
    said = vocabulary.metadata(theirs(name), 0)
    assert said[KEY + "pre"] == {"qwen": "qwen2", "smollm2": "smollm", "llama3": "llama-bpe"}[name]
    assert said[KEY + "model"] == "gpt2" and len(said[KEY + "tokens"]) == len(said[KEY + "token_type"])


def test_a_way_to_cut_that_has_no_name_is_refused(theirs):
    values = json.loads(theirs("qwen").definition)
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+"
    eos = theirs("qwen").template_names["eos_token"]
    with pytest.raises(ValueError, match="llama.cpp has no name for how this tokenizer cuts texts: .*a-z"):
        vocabulary.metadata(HuggingFaceTokenizer(json.dumps(values), eos=eos), 0)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_our_tokenizers_have_the_same_ids_after_it_but_for_the_sign_of_a_space(pieces, kind):
    tokenizer = pieces if kind == "sentencepiece" else byte_tokenizer()
    again = vocabulary.read(vocabulary.metadata(tokenizer, tokenizer.vocab_size))
    odd = ("", " ", "  x", "a\nb\r\n\n", "\t\0", "aaaa    ====", "é 你好 🙂", "12345", "<|end|> <|bos|>")
    for text in (*odd, *TOPICS[:40]):
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.decode(tokenizer.encode(text)) == text
    assert again.bos_ids == (BOS_ID,) and (again.eos_id, again.pad_id, again.end_id) == (EOS_ID, PAD_ID, END_ID)
    assert set(again.stop_ids) == set(tokenizer.stop_ids) and again.template == chat.JINJA
    talk = Conversation(({"role": "user", "content": "Hi <|end|>"},))
    assert chat.prompt(talk, again) == chat.prompt(talk, tokenizer)


def test_our_special_tokens_are_control_tokens_and_ids_without_a_piece_are_unused(pieces):
    said = vocabulary.metadata(pieces, pieces.vocab_size + 3)
    assert said[KEY + "tokens"][:32] == [*SPECIAL_TOKENS] and said[KEY + "token_type"][:3] == [
        CONTROL,
        UNKNOWN,
        CONTROL,
    ]
    assert {*said[KEY + "token_type"][2:32]} == {CONTROL} and said[KEY + "token_type"].count(BYTE) == 256
    assert said[KEY + "tokens"][-1] == f"[PAD{pieces.vocab_size + 2}]" and said[KEY + "token_type"][-3:] == [UNUSED] * 3
    assert len(said[KEY + "tokens"]) == len(said[KEY + "scores"]) == pieces.vocab_size + 3
    assert said[KEY + "eot_token_id"] == END_ID and said[KEY + "add_bos_token"] is True
    assert said[KEY + "add_space_prefix"] is False and said["tokenizer.chat_template"] == chat.JINJA
