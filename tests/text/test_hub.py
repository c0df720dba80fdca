import json

import pytest

from jaxllm.text import hub
from jaxllm.text.prepare import TokenizerConfig, prepare
from jaxllm.text.tokenizer import byte_tokenizer, load


@pytest.fixture
def folder(golden, tmp_path):
    """A function: family, files to write otherwise (None: not at all) -> the folder."""

    def folder(name, **others):
        changed = {file.replace("__", "."): content for file, content in others.items()}
        for file, content in (golden(name)["files"] | changed).items():
            if content is not None:
                (tmp_path / file).write_text(
                    content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
                )
        return tmp_path

    return folder


def config_of(golden, name, **changes):
    return golden(name)["files"]["tokenizer_config.json"] | changes


def spelled(tokenizer, ids):
    return [tokenizer.special_tokens[id] for id in ids]


def test_the_template_file_comes_before_the_config_which_comes_before_none(golden, folder):
    names = {"tokenizer_config__json": config_of(golden, "qwen", chat_template="{{ eos_token }}")}
    assert hub.read(folder("qwen", **names)).template == golden("qwen")["files"]["chat_template.jinja"]
    (folder("qwen") / "chat_template.jinja").unlink()
    without = {"chat_template__jinja": None}
    assert hub.read(folder("qwen", **names, **without)).template == "{{ eos_token }}"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ eos_token }}!"}]
    names = {"tokenizer_config__json": config_of(golden, "qwen", chat_template=several)}
    assert hub.read(folder("qwen", **names, **without)).template == "{{ eos_token }}!"
    assert hub.read(folder("qwen", **without)).template == ""


def test_ends_are_those_of_generation_or_else_of_the_model_or_else_of_the_tokenizer(folder):
    both = folder("qwen", config__json={"eos_token_id": 421})
    assert spelled(*_stops(both)) == ["<|im_end|>", "<|endoftext|>"]
    (folder("qwen") / "generation_config.json").unlink()
    without = dict(generation_config__json=None)
    assert spelled(*_stops(folder("qwen", **without, config__json={"eos_token_id": 420}))) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    assert spelled(*_stops(folder("qwen", **without, config__json={}))) == ["<|im_end|>"]


def _stops(folder):
    tokenizer = hub.read(folder)
    return tokenizer, tokenizer.stop_ids


def test_names_may_be_objects_and_may_stand_in_the_special_tokens_map(golden, folder):
    config = {"eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": None}
    tokenizer = hub.read(
        folder("qwen", tokenizer_config__json=config, special_tokens_map__json={"pad_token": "<|im_start|>"})
    )
    assert spelled(tokenizer, [tokenizer.eos_id, tokenizer.pad_id]) == ["<|endoftext|>", "<|im_start|>"]


def test_without_a_named_end_the_first_that_generation_stops_at_is_taken(folder):
    tokenizer = hub.read(
        folder("qwen", tokenizer_config__json={}, generation_config__json={"eos_token_id": [420, 422]})
    )
    assert spelled(tokenizer, [tokenizer.eos_id]) == ["<|endoftext|>"]
    with pytest.raises(ValueError, match="names no token that ends a text: give eos_token in tokenizer_config.json"):
        hub.read(folder("qwen", tokenizer_config__json={}, generation_config__json={}))


@pytest.mark.parametrize("name, add, opening", [("llama3", False, []), ("smollm2", True, ["<|im_start|>"])])
def test_the_config_says_whether_a_token_opens_a_text(golden, folder, name, add, opening):
    tokenizer = hub.read(folder(name, tokenizer_config__json=config_of(golden, name, add_bos_token=add)))
    assert spelled(tokenizer, tokenizer.bos_ids) == opening
    (each,) = (each for each in golden(name)["texts"] if each["text"] == "Hello, world!")
    assert tokenizer.encode("Hello, world!") == each["ids"]
    agreeing = hub.read(folder(name, tokenizer_config__json=config_of(golden, name, add_bos_token=not add)))
    assert agreeing.fingerprint == hub.read(folder(name)).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    "files, error, message",
    [
        ({"tokenizer__json": None}, FileNotFoundError, "no tokenizer in .*: tokenizer.json is missing"),
        ({"tokenizer__json": None, "tokenizer__model": "x"}, FileNotFoundError, "write one with transformers"),
        ({"tokenizer__json": "{"}, ValueError, "tokenizer.json is no definition"),
        ({"tokenizer__json": "[1]"}, ValueError, "tokenizer.json is no definition"),
        ({"tokenizer_config__json": "{"}, ValueError, "tokenizer_config.json is not JSON"),
        ({"generation_config__json": "[]"}, ValueError, "generation_config.json holds list, not an object"),
        (
            {
                "tokenizer_config__json": {
                    "eos_token": "<|im_end|>",
                    "added_tokens_decoder": {"999": {"content": "<new>"}},
                }
            },
            ValueError,
            "adds tokens that .*tokenizer.json lacks: {999: '<new>'}",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_name(folder, files, error, message):
    with pytest.raises(error, match=message):
        hub.read(folder("qwen", **files))


# ---- a run's tokenizer ----


def test_a_run_takes_the_tokenizer_of_a_folder(folder, theirs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "tokenizer"
    made = prepare(TokenizerConfig("huggingface", 0, str(folder("qwen"))), iter(()), directory=directory)
    assert made.fingerprint == theirs("qwen").fingerprint == load(directory).fingerprint
    again = prepare(TokenizerConfig("huggingface", 0, ""), iter(()), directory=directory)
    assert again.fingerprint == made.fingerprint
    copied = prepare(
        TokenizerConfig("huggingface", 0, str(directory)), iter(()), directory=tmp_path_factory.mktemp("b")
    )
    assert copied.fingerprint == made.fingerprint


def test_such_a_tokenizer_is_not_made_here(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.kind='huggingface' is not made here: name its folder"):
        prepare(TokenizerConfig("huggingface", 0, ""), iter(()), directory=tmp_path)


def test_the_two_files_of_one_name_are_told_apart(folder, tmp_path_factory):
    ours = tmp_path_factory.mktemp("ours")
    byte_tokenizer().save(ours)
    assert hub.is_folder(folder("qwen")) and not hub.is_folder(ours) and not hub.is_folder(ours / "nothing")
    with pytest.raises(ValueError, match="was not saved here: import the model"):
        load(folder("qwen"))
