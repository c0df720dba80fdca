import json
import pydoc_data.topics
import random
from pathlib import Path

import pytest
import tokenizers

from jaxllm.interop.tokenizers import definition, read, write
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import IDS, SPECIAL_TOKENS
from jaxllm.text.tokenizer import byte_tokenizer, train

FAMILIES = ("qwen", "smollm2", "llama3", "llama2", "mistral", "gemma")
TOPICS = list(pydoc_data.topics.topics.values())
ODD = (
    "\n",
    "\u2581",
    " ",
    "   ",
    "\t",
    "\0",
    "\r\n",
    " \u2581 ",
    "123",
    "aaaa",
    "    ====",
    "\u00e9",
    "\u4f60\u597d",
    "\U0001f600",
)


@pytest.fixture(scope="module")
def pieces():
    return train(TOPICS[:30], vocab_size=900)


@pytest.fixture(params=["sentencepiece", "bytes"])
def ours(request, pieces):
    return pieces if request.param == "sentencepiece" else byte_tokenizer()


def golden(name):
    path = Path(__file__).parent / "golden" / f"tokenizer_{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def folder_of(files, folder):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def texts(count):
    """Mixtures of prose, runs of single signs and what is hard."""
    draw = random.Random(0)

    def part():
        kind = draw.random()
        if kind < 0.4:
            return draw.choice(ODD)
        if kind < 0.6:
            return "".join(draw.choice("ab =-\n.*_1") for _ in range(draw.randint(1, 15)))
        topic = draw.choice(TOPICS)
        start = draw.randrange(max(1, len(topic) - 40))
        return topic[start : start + draw.randint(1, 40)]

    return ["".join(part() for _ in range(draw.randint(1, 12))) for _ in range(count)]


# ---- out ----


def test_a_tokenizer_of_ours_has_the_same_ids_there(ours):
    there = tokenizers.Tokenizer.from_str(definition(ours))
    for text in ("", *ODD, *texts(1500)):
        ids = ours.encode(text)
        assert there.encode(text, add_special_tokens=False).ids == ids, text
        assert there.decode(ids) == text
    assert there.get_vocab_size() == ours.vocab_size


def test_control_tokens_there_are_ours_and_tags_are_shown(ours):
    there = tokenizers.Tokenizer.from_str(definition(ours))
    assert [there.id_to_token(id) for id in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert there.encode("a").ids == [*ours.bos_ids, *ours.encode("a")]
    ids = [IDS["<|assistant|>"], IDS["<think>"], *ours.encode("a"), IDS["</think>"], IDS["<answer>"], IDS["<|end|>"]]
    assert there.decode(ids) == "<think>a</think><answer>"
    assert there.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    assert there.encode("<|end|><think>", add_special_tokens=False).ids == [IDS["<|end|>"], IDS["<think>"]]


def test_the_files_name_what_transformers_asks_for(ours, tmp_path):
    write(tmp_path / "new" / "folder", ours)
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new" / "folder").iterdir()}
    assert sorted(files) == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "unk_token": "<|unk|>"}
    assert json.loads(files["special_tokens_map.json"]) == names
    config = json.loads(files["tokenizer_config.json"])
    assert names.items() <= config.items()
    assert (config["tokenizer_class"], config["clean_up_tokenization_spaces"]) == ("PreTrainedTokenizerFast", False)
    assert files["chat_template.jinja"] == chat.JINJA


def test_an_exported_tokenizer_comes_back_with_the_same_ids_and_chats(ours, tmp_path):
    write(tmp_path, ours)
    found = read(tmp_path)
    for fact in ("bos_ids", "eos_id", "end_id", "pad_id", "vocab_size"):
        assert getattr(found, fact) == getattr(ours, fact)
    assert set(found.stop_ids) == set(ours.stop_ids)
    said = Conversation(
        (
            {"role": "system", "content": "Be"},
            {"role": "user", "content": "a\n"},
            {"role": "assistant", "content": " b"},
        )
    )
    (there,), (here,) = (chat.render([said], each) for each in (found, ours))
    assert there.tokens.tolist() == here.tokens.tolist() and there.supervised.tolist() == here.supervised.tolist()
    for text in texts(100):
        assert found.encode(text) == ours.encode(text) and found.decode(found.encode(text)) == text
    shown = {IDS[tag] for tag in ("<think>", "</think>", "<answer>", "</answer>")}
    lengths = found.byte_lengths_V.copy()
    lengths[sorted(shown)] = 0
    assert lengths.tolist() == ours.byte_lengths_V.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_other_peoples_files_come_back_unchanged_in_meaning(name, tmp_path):
    first = read(folder_of(golden(name)["files"], tmp_path))
    write(tmp_path / "again", first)
    files = golden(name)["files"]
    again = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "again").iterdir()}
    assert json.loads(again["tokenizer.json"]) == files["tokenizer.json"]
    assert again["chat_template.jinja"] == files["chat_template.jinja"]
    config, before = json.loads(again["tokenizer_config.json"]), files["tokenizer_config.json"]
    # What is unknown has no token where bytes are read.
    kept = {key: value for key, value in before.items() if value is not None and key != "unk_token"}
    assert kept.items() <= config.items()
    second = read(folder_of({"generation_config.json": files["generation_config.json"]}, tmp_path / "again"))
    assert second.fingerprint == first.fingerprint


def test_a_base_model_of_others_gets_no_template(tmp_path):
    files = golden("llama3")["files"]
    del files["chat_template.jinja"]
    write(tmp_path / "again", read(folder_of(files, tmp_path)))
    assert not (tmp_path / "again" / "chat_template.jinja").exists()


# ---- transformers itself, where it is installed ----


def test_transformers_reads_what_is_written(ours, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    write(tmp_path, ours)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(200):
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids and theirs.decode(ids) == text
    said = [{"role": "user", "content": "a\n"}, {"role": "assistant", "content": " b"}]
    (rendered,) = chat.render([Conversation(tuple(said))], ours)
    assert theirs.apply_chat_template(said, tokenize=True, return_dict=False) == rendered.tokens.tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 3, 0)
