import json
import pickle
import unicodedata

import numpy as np
import pytest

from jaxllm.text.huggingface import HuggingFaceTokenizer
from jaxllm.text.tokenizer import load
from jaxllm.text.view import spelling

FAMILIES = ("qwen", "smollm2", "llama3", "llama2", "mistral", "gemma")
ODD = ("a\u0301e\u0301 \ufb01", "\x00\x01 \x7f", "\u2581\u2581", " \n \t\r\n ", "\U0001f468\u200d\U0001f469 \uffff")


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def definition_of(golden, name, **parts):
    return json.dumps(golden(name)["files"]["tokenizer.json"] | parts)


def test_ids_are_those_of_transformers_without_special_tokens(name, golden, theirs):
    tokenizer, texts = theirs(name), golden(name)["texts"]
    assert [tokenizer.encode(each["text"]) for each in texts] == [each["ids"] for each in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch([each["text"] for each in texts])] == [
        each["ids"] for each in texts
    ]
    assert all(ids.dtype == np.int32 for ids in tokenizer.encode_batch(["", "a"]))


def test_what_opens_a_text_is_what_transformers_puts_before_it(name, golden, theirs):
    tokenizer = theirs(name)
    for each in golden(name)["texts"]:
        assert [*tokenizer.bos_ids, *each["ids"]] == each["opened"]
    (document,) = tokenizer.documents(["Hi you"])
    assert document.tolist() == [*tokenizer.bos_ids, *tokenizer.encode("Hi you"), tokenizer.eos_id]
    assert tokenizer.opening("Hi") == [*tokenizer.bos_ids, *tokenizer.encode("Hi")]
    assert tokenizer.opening("") == ([*tokenizer.bos_ids] or [tokenizer.eos_id])


def kept(name, text):
    """Oracle: what the definition of this family makes of a text, as its docstring says."""
    if name == "qwen":
        return unicodedata.normalize("NFC", text)
    text = text if name in ("smollm2", "llama3") else text.replace("\u2581", " ")
    put = name == "llama2" or (name == "mistral" and not text.startswith(" "))
    return " " + text if put and text else text


def test_decoding_gives_the_text_that_the_definition_keeps(name, golden, theirs):
    tokenizer = theirs(name)
    for text in (*ODD, *(each["text"] for each in golden(name)["texts"])):
        assert tokenizer.decode(tokenizer.encode(text)) == kept(name, text)


def test_texts_are_those_of_transformers_but_for_a_space_put_before_them(name, golden, theirs):
    tokenizer = theirs(name)
    for each in golden(name)["texts"]:
        ours = tokenizer.decode(each["ids"])
        assert (ours[1:] if name in ("llama2", "mistral") else ours) == each["decoded"]


def test_the_table_holds_the_bytes_of_each_id(name, theirs):
    tokenizer = theirs(name)
    assert len(tokenizer.byte_lengths_V) == tokenizer.vocab_size
    for text in ("caf\u00e9 \u4f60\u597d \U0001f600\n", "Hello, world!"):
        ids = tokenizer.encode(text)
        joined = b"".join(tokenizer.token_bytes(id) for id in ids)
        assert joined == kept(name, text).encode() and tokenizer.byte_lengths_V[ids].sum() == len(joined)
    for id in tokenizer.special_ids:
        assert tokenizer.token_bytes(id) == b"" and tokenizer.byte_lengths_V[id] == 0
        assert tokenizer.decode([id]) == tokenizer.special_tokens[id] == spelling(tokenizer, id)
    others = set(range(tokenizer.vocab_size)) - tokenizer.special_ids
    assert all(tokenizer.token_bytes(id) for id in others)


def test_no_text_becomes_a_control_token(name, theirs):
    tokenizer = theirs(name)
    for spelled in tokenizer.special_tokens.values():
        for text in (spelled, f"a{spelled} b", f" {spelled}{spelled}"):
            ids = tokenizer.encode(text)
            assert not set(ids) & tokenizer.special_ids
            assert tokenizer.decode(ids) == kept(name, text)


def test_added_tokens_that_control_nothing_are_text(theirs):
    tokenizer = theirs("qwen")
    ids = tokenizer.encode("<tool_call>x")
    assert len(ids) == 2 and ids[0] not in tokenizer.special_ids and tokenizer.token_bytes(ids[0]) == b"<tool_call>"


def test_the_tokens_of_each_purpose_are_those_of_the_folder(theirs):
    names = {}
    for family in FAMILIES:
        tokenizer = theirs(family)
        ids = (tokenizer.eos_id, tokenizer.end_id, tokenizer.pad_id)
        names[family] = [tokenizer.special_tokens[id] for id in (*ids, *tokenizer.stop_ids)]
    assert names == {
        "qwen": ["<|im_end|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>", "<|endoftext|>"],
        "smollm2": ["<|im_end|>"] * 4,
        "llama3": ["<|eot_id|>"] * 4 + ["<|end_of_text|>"],
        "llama2": ["</s>"] * 4,
        "mistral": ["</s>"] * 4,
        "gemma": ["<eos>", "<end_of_turn>", "<pad>", "<end_of_turn>", "<eos>"],
    }


def test_without_a_template_the_first_stop_or_the_end_of_a_document_ends_a_turn(golden):
    make = lambda **facts: HuggingFaceTokenizer(definition_of(golden, "gemma"), eos="<eos>", **facts)  # noqa: E731
    plain, stopped = make(), make(stop=("<end_of_turn>", "<eos>"))
    assert (plain.end_id, plain.stop_ids, plain.pad_id) == (1, (1,), 1)
    assert (stopped.end_id, stopped.stop_ids) == (5, (5, 1))


def test_a_named_token_controls_whatever_the_definition_says_of_it(golden):
    """<tool_call> is an added token of this definition, and 'e' a piece of its model."""
    tokenizer = HuggingFaceTokenizer(definition_of(golden, "qwen"), eos="<tool_call>", stop=("e",))
    assert [tokenizer.special_tokens[id] for id in tokenizer.stop_ids] == ["e", "<tool_call>"]
    ids = tokenizer.encode("<tool_call>!")
    assert not set(ids) & tokenizer.special_ids and tokenizer.decode(ids) == "<tool_call>!"


@pytest.fixture
def unigram(golden):
    """A function: normaliser, facts -> a unigram tokenizer, which has its control tokens among its pieces and takes the
    likeliest ones, whatever they are.
    """

    def unigram(normalizer=None, **facts):
        pieces = [["<unk>", 0.0], ["</s>", 0.0], *([sign, -9.0] for sign in "</s>ab\u2581\U0001f600")]
        model = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
        added = golden("llama2")["files"]["tokenizer.json"]["added_tokens"]
        added = [entry | {"id": id} for id, entry in enumerate(each for each in added if each["content"] != "<s>")]
        space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
        parts = dict(model=model, added_tokens=added, normalizer=normalizer, pre_tokenizer=space, decoder=space)
        definition = definition_of(golden, "llama2", post_processor=None, **parts)
        return HuggingFaceTokenizer(definition, eos="</s>", **facts)

    return unigram


def test_a_control_token_that_the_model_itself_would_find_is_cut(unigram):
    tokenizer = unigram()
    assert tokenizer.decode(tokenizer.encode("a</s>b</s>")) == " a</s>b</s>"
    assert tokenizer.eos_id == 1 and 1 not in tokenizer.encode("a</s>b</s>")


@pytest.mark.parametrize("kind, spelled", [("NFKC", "\uff1c/s\uff1e"), ("Lowercase", "</S>")])
def test_a_control_token_that_only_the_normalised_text_spells_is_cut(unigram, kind, spelled):
    tokenizer, text = unigram({"type": kind}), f"\U0001f600{spelled}b</s>"
    assert tokenizer.encode(text) == tokenizer.encode("\U0001f600</s>b</s>")
    assert not set(tokenizer.encode(text)) & tokenizer.special_ids
    assert tokenizer.decode(tokenizer.encode(text)) == " \U0001f600</s>b</s>"


def test_signs_that_a_unigram_model_has_not_are_its_unknown_token(unigram):
    tokenizer = unigram()
    assert tokenizer.encode("a\u4f60\u597db") == [*tokenizer.encode("a"), 0, *tokenizer.encode("ab")[2:]]
    assert tokenizer.template_names["unk_token"] == "<unk>"


def test_a_sign_that_has_no_ids_but_those_of_a_control_token_is_refused(unigram):
    with pytest.raises(ValueError, match="'b' at position 1 of a text is a control token .* or do not name it as eos"):
        unigram(stop=("b",)).encode("ab")


def test_a_definition_that_cuts_or_fills_texts_does_neither_here(golden):
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    fill |= {"pad_type_id": 0, "pad_token": "<pad>"}
    changed = definition_of(golden, "gemma", truncation=truncation, padding=fill)
    plain = HuggingFaceTokenizer(definition_of(golden, "gemma"), eos="<eos>")
    for text in ("a", "Hello, world, once more"):
        assert HuggingFaceTokenizer(changed, eos="<eos>").encode(text) == plain.encode(text)


def test_ids_past_the_vocabulary_stand_for_nothing(theirs):
    tokenizer = theirs("qwen")
    assert tokenizer.decode([*tokenizer.encode("a"), 100_000]) == "a" and tokenizer.token_bytes(100_000) == b""
    with pytest.raises(ValueError, match="token id -1 is outside of the vocabulary"):
        tokenizer.decode([-1])


def test_lone_surrogates_are_refused(theirs):
    with pytest.raises(ValueError, match=r"lone surrogate '\\udc80' at position 1"):
        theirs("qwen").encode("a\udc80")


# ---- pieces of a longer text ----


def test_pieces_get_a_space_where_the_whole_text_would(theirs):
    """Legacy definitions put one behind every control token, newer ones before the whole text alone."""
    said = lambda name, pieces: [theirs(name).decode(ids) for ids in theirs(name).encode_pieces([pieces])[0]]  # noqa: E731
    pieces = ["a", 1, "b", "c"]
    assert said("llama2", pieces) == [" a", "<s>", " b", "c"]
    assert said("mistral", pieces) == [" a", "<s>", "b", "c"]
    assert said("gemma", ["a", 2, "b", "c"]) == ["a", "<bos>", "b", "c"]
    assert said("llama2", []) == []


def test_blanks_beside_a_control_token_that_takes_them_are_gone(golden):
    values = golden("gemma")["files"]["tokenizer.json"]
    added = [entry | {"lstrip": entry["id"] == 4, "rstrip": entry["id"] == 5} for entry in values["added_tokens"]]
    tokenizer = HuggingFaceTokenizer(json.dumps(values | {"added_tokens": added}), eos="<eos>")
    pieces = tokenizer.encode_pieces([[" a ", 4, " b ", 5, " c "]])[0]
    assert [tokenizer.decode(ids) for ids in pieces] == [" a", "<start_of_turn>", " b ", "<end_of_turn>", "c "]


# ---- saving ----


def test_a_saved_tokenizer_is_loaded_as_it_was(name, golden, theirs, tmp_path):
    tokenizer = theirs(name)
    tokenizer.save(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is HuggingFaceTokenizer and loaded.fingerprint == tokenizer.fingerprint
    for fact in ("bos_ids", "eos_id", "end_id", "pad_id", "stop_ids", "special_tokens", "template", "template_names"):
        assert getattr(loaded, fact) == getattr(tokenizer, fact)
    assert [loaded.encode(each["text"]) for each in golden(name)["texts"]] == [
        each["ids"] for each in golden(name)["texts"]
    ]
    np.testing.assert_array_equal(np.load(tmp_path / "byte_lengths.npy"), tokenizer.byte_lengths_V)


def test_a_changed_definition_is_refused(theirs, tmp_path):
    theirs("gemma").save(tmp_path)
    path = tmp_path / "definition.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<end_of_turn>", "<end_of_tern>"), encoding="utf-8")
    with pytest.raises(ValueError, match="not in the tokenizer's definition|was changed or cut short"):
        load(tmp_path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="no definition of a Hugging Face tokenizer|was changed or cut short"):
        load(tmp_path)


def test_the_fingerprint_tells_what_decides_ids_and_templates(golden):
    definition = definition_of(golden, "gemma")
    make = lambda text=definition, **facts: HuggingFaceTokenizer(text, **{"eos": "<eos>", **facts})  # noqa: E731
    other = definition.replace('"<0x41>"', '"<0x4A>"')
    changed = [make(template="x"), make(eos="<bos>"), make(pad="<pad>"), make(stop=("<pad>",)), make(bos="<pad>")]
    prints = [each.fingerprint for each in (make(), *changed)]
    assert len(set(prints)) == len(prints) and other != definition
    spaced = json.dumps(json.loads(definition), indent=3, sort_keys=True)
    assert make(spaced).fingerprint == prints[0]


def test_it_goes_to_another_process(theirs):
    tokenizer = pickle.loads(pickle.dumps(theirs("llama2")))
    assert tokenizer.encode("Hello") == theirs("llama2").encode("Hello")


# ---- what is refused ----


@pytest.mark.parametrize(
    "definition, message",
    [
        ("{", "no definition of a Hugging Face tokenizer"),
        ("[]", "no definition of a Hugging Face tokenizer"),
        ('{"kind": "bytes"}', "no definition of a Hugging Face tokenizer.*'added_tokens'"),
    ],
)
def test_what_is_no_definition_is_refused(definition, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceTokenizer(definition, eos="</s>")


def test_a_definition_whose_ids_are_no_bytes_is_refused(golden):
    words = definition_of(
        golden, "qwen", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}, pre_tokenizer=None
    )
    with pytest.raises(ValueError, match=r"decodes by \['WordPiece'\]: ids stand for bytes in vocabularies of bytes"):
        HuggingFaceTokenizer(words, eos="<|im_end|>")


def test_a_definition_that_the_package_cannot_read_is_refused(golden):
    with pytest.raises(ValueError, match="the package tokenizers cannot read the definition"):
        HuggingFaceTokenizer(definition_of(golden, "qwen", normalizer={"type": "Unheard"}), eos="<|im_end|>")


def test_added_tokens_that_would_be_numbered_anew_are_refused(golden):
    """The package gives a token that its model lacks the next free id, whatever the definition says."""
    values = golden("qwen")["files"]["tokenizer.json"]
    added = [entry | {"id": entry["id"] + 7} for entry in values["added_tokens"]]
    with pytest.raises(ValueError, match=r"gives ids that its vocabulary has not.*'<\|im_end\|>': 429"):
        HuggingFaceTokenizer(json.dumps(values | {"added_tokens": added}), eos="<|im_end|>")


def test_a_token_that_is_not_there_is_refused_by_name(golden):
    with pytest.raises(ValueError, match="token '<nowhere>' is not in the tokenizer's definition"):
        HuggingFaceTokenizer(definition_of(golden, "qwen"), eos="<nowhere>")


def test_a_template_that_is_no_jinja_is_refused(golden):
    with pytest.raises(ValueError, match="chat template is no Jinja that can be read, line 2"):
        HuggingFaceTokenizer(definition_of(golden, "qwen"), eos="<|im_end|>", template="a\n{% if %}")


def test_the_missing_package_is_named(golden, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="need a package: pip install tokenizers=="):
        HuggingFaceTokenizer(definition_of(golden, "qwen"), eos="<|im_end|>")
