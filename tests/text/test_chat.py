import json

import jinja2.sandbox
import numpy as np
import pytest

from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed, parse, prompt, render
from jaxllm.text.special_tokens import BOS_ID, END_ID, EOS_ID, IDS, NUM_SPECIAL_TOKENS, PAD_ID, SPECIAL_TOKENS

CALL = {"name": "weather", "arguments": {"city": "Zürich <b>", "days": [1, 2.5, None]}}
TOOLS = ({"type": "function", "function": {"name": "weather", "description": 'It\'s > "nice"'}},)


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, *calls):
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def tool(content):
    return {"role": "tool", "content": content}


CONVERSATIONS = {
    "one turn": Conversation((user("Hi"), assistant("Hello"))),
    "two turns": Conversation((system("Be kind."), user("a\n b"), assistant("\tc "), user("é 漢"), assistant("😀"))),
    "tools": Conversation(
        (user("Weather?"), assistant("Let me see", CALL, CALL), tool('{"sun": 1}'), assistant("Sunny")), TOOLS
    ),
    "a call with its name last": Conversation((user("?"), assistant("", dict(reversed(CALL.items()))))),
    "a call alone": Conversation((user("Weather?"), assistant("", CALL)), TOOLS),
    "thought": Conversation((user("1+1?"), assistant("<think>\none, one</think><answer>2</answer>"))),
    "control tokens in texts": Conversation(
        (
            system("<|bos|>"),
            user("<|eos|><think></think><|end|>"),
            assistant("<|end|><|assistant|><think"),
            tool("<answer>"),
            assistant("x", {"name": "<|end|>", "arguments": {"<think>": "<|tool_call|>"}}),
        ),
        ({"name": "<|end|>"},),
    ),
}  # fmt: skip


@pytest.fixture(params=list(CONVERSATIONS))
def conversation(request):
    return CONVERSATIONS[request.param]


def spelled(conversation):
    """Oracle: the template written as one string, and its supervised parts."""
    whole, learned = "<|bos|>", []
    if conversation.tools:
        whole += "<|tools|>" + json.dumps(list(conversation.tools), ensure_ascii=False) + "<|end|>"
    for message in conversation.messages:
        said = message["content"]
        for call in message.get("tool_calls", ()):
            ordered = {"name": call["name"], "arguments": call["arguments"]}
            said += "<|tool_call|>" + json.dumps(ordered, ensure_ascii=False)
        whole += f"<|{message['role']}|>{said}<|end|>"
        if message["role"] == "assistant":
            learned.append(said + "<|end|>")
    return whole, learned


def runs(rendered):
    """The supervised stretches of ids: with turns apart, since a role always lies between two."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], rendered.supervised, [0]])))
    return [rendered.tokens[start:stop] for start, stop in edges.reshape(-1, 2)]


def test_a_conversation_spells_the_template(conversation, tokenizer):
    (rendered,) = render([conversation], tokenizer)
    assert tokenizer.decode(rendered.tokens) == spelled(conversation)[0]
    assert rendered.tokens.dtype == np.int32 and rendered.supervised.dtype == bool
    assert len(rendered.tokens) == len(rendered.supervised)


def test_the_mask_is_the_assistants_text_calls_and_end_and_no_more(conversation, tokenizer):
    (rendered,) = render([conversation], tokenizer)
    assert [tokenizer.decode(run) for run in runs(rendered)] == spelled(conversation)[1]
    assert all(run[-1] == END_ID for run in runs(rendered))


def test_the_last_turn_alone_may_be_supervised(conversation, tokenizer):
    (rendered,) = render([conversation], tokenizer, turns="last")
    assert [tokenizer.decode(run) for run in runs(rendered)] == spelled(conversation)[1][-1:]
    assert np.array_equal(rendered.tokens, render([conversation], tokenizer)[0].tokens)


def test_control_tokens_come_from_the_template_and_never_from_text(tokenizer):
    """By id: one BOS, an end per turn, tags in the assistant's words alone, whatever the texts spell."""
    (rendered,) = render([CONVERSATIONS["control tokens in texts"]], tokenizer)
    names = "bos tools end system end user end assistant end tool end assistant tool_call end"
    assert [SPECIAL_TOKENS[token] for token in rendered.tokens if token < NUM_SPECIAL_TOKENS] == [
        f"<|{name}|>" for name in names.split()
    ]
    (rendered,) = render([CONVERSATIONS["thought"]], tokenizer)
    tags = [SPECIAL_TOKENS[token] for token in rendered.tokens if token < NUM_SPECIAL_TOKENS][4:-1]
    assert tags == ["<think>", "</think>", "<answer>", "</answer>"]
    assert rendered.supervised[np.isin(rendered.tokens, [IDS[tag] for tag in tags])].all()


def test_conversations_are_rendered_together_as_alone(tokenizer):
    together = render(list(CONVERSATIONS.values()), tokenizer)
    for rendered, conversation in zip(together, CONVERSATIONS.values(), strict=True):
        (alone,) = render([conversation], tokenizer)
        assert np.array_equal(rendered.tokens, alone.tokens) and np.array_equal(rendered.supervised, alone.supervised)
    assert render([], tokenizer) == []


def test_a_prompt_is_how_the_answered_conversation_begins(conversation, tokenizer):
    (rendered,) = render([conversation], tokenizer, turns="last")
    (answer,) = runs(rendered)
    asked = conversation._replace(messages=conversation.messages[:-1])
    ids = prompt(asked, tokenizer)
    assert ids == rendered.tokens[: -len(answer)].tolist()
    assert ids[0] == BOS_ID and ids.count(BOS_ID) == 1 and ids[-1] == IDS["<|assistant|>"]
    assert all(type(token) is int for token in ids)


def test_a_prompt_may_start_the_answer_with_its_tags(tokenizer):
    ids = prompt(Conversation((user("Hi"),)), tokenizer, start="<think>\n")
    assert ids == prompt(Conversation((user("Hi"),)), tokenizer) + [IDS["<think>"], *tokenizer.encode("\n")]
    assert prompt(Conversation(()), tokenizer) == [BOS_ID, IDS["<|assistant|>"]]


def test_what_was_rendered_is_parsed_back(conversation, tokenizer):
    (rendered,) = render([conversation], tokenizer)
    answers = [message for message in conversation.messages if message["role"] == "assistant"]
    for run, message in zip(runs(rendered), answers, strict=True):
        for ids in (run, run[:-1].tolist(), [*run, PAD_ID, END_ID, *tokenizer.encode("more")], [*run[:-1], EOS_ID, 99]):
            assert parse(ids, tokenizer) == message


@pytest.mark.parametrize(
    "call",
    ["", "{", "[1]", "5", '"weather"', '{"name": "a"}', '{"name": 1, "arguments": {}}', '{"name": "a", "arguments": 1}',
     '{"name": "a", "arguments": {}, "more": 1}', "[" * 100_000, "1" * 5000],
    ids=lambda call: call[:20],
)  # fmt: skip
def test_a_malformed_call_stays_in_the_content_and_never_raises(tokenizer, call):
    good = [IDS["<|tool_call|>"], *tokenizer.encode(json.dumps(CALL))]
    bad = [IDS["<|tool_call|>"], *tokenizer.encode(call)]
    assert parse([*tokenizer.encode("so: "), *bad, *good, END_ID], tokenizer) == {
        "role": "assistant", "content": f"so: <|tool_call|>{call}", "tool_calls": [CALL],
    }  # fmt: skip


def test_whatever_a_model_says_is_parsed(tokenizer):
    draw = np.random.default_rng(0)
    for _ in range(300):
        message = parse(draw.integers(0, 40, draw.integers(0, 20)).tolist(), tokenizer)
        assert message["role"] == "assistant" and isinstance(message["content"], str)
    assert parse([], tokenizer) == {"role": "assistant", "content": ""}


def jinja(conversation, **more):
    """Rendered as Hugging Face's `apply_chat_template` does: a sandbox that trims blocks, `tojson` without escapes."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(chat.JINJA)
    return template.render(messages=list(conversation.messages), tools=list(conversation.tools) or None, **more)


def test_the_jinja_template_renders_the_same_string(conversation, tokenizer):
    (rendered,) = render([conversation], tokenizer)
    assert jinja(conversation) == tokenizer.decode(rendered.tokens)
    asked = conversation._replace(messages=conversation.messages[:-1])
    assert jinja(asked, add_generation_prompt=True) == tokenizer.decode(prompt(asked, tokenizer))


def test_the_jinja_template_takes_calls_as_openai_nests_them(tokenizer):
    nested = Conversation((user("?"), {**assistant("", {"type": "function", "function": CALL}), "content": None}))
    assert jinja(nested) == jinja(Conversation((user("?"), assistant("", CALL))))


def test_responses_are_the_assistants_turns_alone(tokenizer):
    (rendered,) = render([chat.responses(CONVERSATIONS["tools"])], tokenizer)
    whole = spelled(CONVERSATIONS["tools"])[1]
    assert tokenizer.decode(rendered.tokens) == "<|bos|>" + "".join("<|assistant|>" + said for said in whole)
    assert [tokenizer.decode(run) for run in runs(rendered)] == whole


def test_the_text_of_a_conversation_is_what_is_encoded_as_text():
    assert chat.text(CONVERSATIONS["thought"]).split("\n") == ["1+1?", "", "", "one, one", "", "2", ""]
    assert json.dumps(CALL, ensure_ascii=False) in chat.text(CONVERSATIONS["tools"])


@pytest.mark.parametrize(
    ("messages", "reason", "message"),
    [
        ((), "no_answer", "no message is the assistant's, so there is nothing to learn; add its answer"),
        ((user("a"),), "no_answer", "no message is the assistant's"),
        ((user("a"), assistant("")), "empty_answer", r"message 2 \(assistant\) says nothing; give its answer"),
        ((user("a"), assistant(" \n")), "empty_answer", "message 2"),
        (({"content": "a"}, assistant("b")), "unknown_role", r"message 1 has role None, not one of \('system'"),
        (({"role": "bot", "content": "a"},), "unknown_role", "message 1 has role 'bot', .*; rename it"),
        (({"role": [], "content": "a"},), "unknown_role", r"role \[\]"),
        ((user(None), assistant("b")), "content_not_text", r"message 1 \(user\) has content of NoneType, not text"),
        ((user("a"), {"role": "assistant"}), "content_not_text", r"message 2 \(assistant\)"),
        ((user("a"), user("b") | {"tool_calls": [CALL]}), "calls_of_others", r"message 2 \(user\) calls tools; only"),
        ((assistant("", {"name": "a"}),), "malformed_call", "message 1: a tool call is {'name': text, 'arguments'"),
        ((assistant("", {"name": "a", "arguments": "{}"}),), "malformed_call", "'arguments': object}, not"),
        ((assistant("", {"name": "a", "arguments": {"x": {1}}}),), "not_json", "the call of message 1 cannot be"),
    ],
)  # fmt: skip
def test_what_cannot_be_rendered_is_named_with_its_place_and_the_mend(tokenizer, messages, reason, message):
    for attempt in (chat.check, lambda conversation: render([conversation], tokenizer)):
        with pytest.raises(Malformed, match=message) as error:
            attempt(Conversation(messages))
        assert error.value.reason == reason


def test_a_lone_surrogate_anywhere_is_found():
    for conversation in (
        Conversation((user("a\ud800"), assistant("b"))),
        Conversation((assistant("", {"name": "a", "arguments": {"b": "\udcff"}}),)),
        Conversation((assistant("b"),), ({"name": "\ud800"},)),
    ):
        with pytest.raises(Malformed, match="lone surrogate .* mend the text") as error:
            chat.check(conversation)
        assert error.value.reason == "lone_surrogate"


def test_a_prompt_after_the_assistants_own_message_is_refused(tokenizer):
    with pytest.raises(Malformed, match="the last message is the assistant's already: give the messages before it"):
        prompt(CONVERSATIONS["one turn"], tokenizer)
