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
