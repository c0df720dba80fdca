import pytest

from jaxllm.data.prompts import prompts
from jaxllm.text import chat
from jaxllm.text.special_tokens import END_ID
from jaxllm.text.tokenizer import byte_tokenizer


def test_a_prompt_is_what_comes_before_the_last_answer_and_the_reference_that_answer(chats, random_chats):
    records = random_chats(40)
    records[0]["messages"].append({"role": "user", "content": "and what nobody answers"})
    for turns in ("all", "last"):
        _, stores = chats({"a": records}, {"turns": turns}, validation=0.0)
        found = [(asked.tolist(), answer.tolist()) for asked, answer in prompts(stores["a"].train)]
        expected = []
        for record in records:
            last = max(i for i, message in enumerate(record["messages"]) if message["role"] == "assistant")
            asked = chat.prompt(chat.Conversation(tuple(record["messages"][:last])), byte_tokenizer())
            expected.append((asked, byte_tokenizer().encode(record["messages"][last]["content"]) + [END_ID]))
        assert sorted(found) == sorted(expected)
        first = [(asked.tolist(), answer.tolist()) for asked, answer in prompts(stores["a"].train, 3)]
        assert first == found[:3]


def test_texts_ask_nothing(prepared, texts):
    _, stores = prepared({"a": texts})
    with pytest.raises(ValueError, match="holds texts, which ask nothing: take a source of conversations"):
        prompts(stores["a"].validation)


def test_a_prompt_of_preferences_comes_once_with_the_first_answer_to_it_in_the_store(chats, random_preferences):
    records = random_preferences(40)
    _, stores = chats({"a": records}, {"format": "preference"}, validation=0.0)
    store, found = stores["a"].train, prompts(stores["a"].train)
    chosen = {}
    for record in records:
        asked = chat.prompt(chat.Conversation(({"role": "user", "content": record["prompt"]},)), byte_tokenizer())
        chosen.setdefault(tuple(asked), []).append(byte_tokenizer().encode(record["chosen"]) + [END_ID])
    assert len(found) == len(chosen) == 20
    for asked, answer in found:
        assert answer.tolist() in chosen[tuple(asked.tolist())]
    documents = [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    for asked, answer in found:  # the first of the store that begins so
        first = next(tokens for tokens in documents if tokens[: len(asked)] == asked.tolist())
        assert first[len(asked) :][: len(answer)] == answer.tolist()
    few = [(asked.tolist(), answer.tolist()) for asked, answer in prompts(store, 3)]
    assert few == [(asked.tolist(), answer.tolist()) for asked, answer in found[:3]]


def test_a_disliked_answer_alone_is_asked_for_too(chats):
    records = [{"prompt": "a", "completion": "b", "label": False}, {"prompt": "c", "completion": "d", "label": True}]
    for answers in ("paired", "alone"):
        _, stores = chats({"a": records}, {"format": "preference", "answers": answers}, validation=0.0)
        found = {byte_tokenizer().decode(answer.tolist()) for _, answer in prompts(stores["a"].train)}
        assert found == {"b<|end|>", "d<|end|>"}
