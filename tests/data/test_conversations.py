import json

import pytest

from jaxllm.data.conversations import FORMATS, conversation, detected
from jaxllm.text.chat import Conversation, Malformed

USER, ANSWER, SYSTEM = (
    {"role": "user", "content": "Add 1 and 2"},
    {"role": "assistant", "content": "3"},
    {"role": "system", "content": "Be brief"},
)
ARGUMENTS = {"city": "Zürich"}
CALL = {"name": "weather", "arguments": ARGUMENTS}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FOUND = {"role": "tool", "content": "sun"}


def openai_call(arguments):
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


CASES = {
    "messages": (
        "messages",
        {"prompt": "p", "messages": [{**SYSTEM, "weight": 1}, USER, ANSWER]},
        Conversation((SYSTEM, USER, ANSWER)),
    ),
    "parts, nulls and other names of roles": (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Be brief", "tool_calls": None},
                {"role": "user", "content": [{"type": "text", "text": "Add 1 "}, "and 2"], "name": None},
                ANSWER,
            ],
            "tools": None,
        },
        Conversation((SYSTEM, USER, ANSWER)),
    ),
    "calls with arguments as JSON in a text": (
        "messages",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [openai_call(json.dumps(ARGUMENTS))]},
                {**FOUND, "tool_call_id": "1"},
                ANSWER,
            ],
            "tools": TOOLS,
        },
        Conversation((USER, CALLED, FOUND, ANSWER), tuple(TOOLS)),
    ),
    "calls with arguments as an object, or bare, and tools as JSON in a text": (
        "messages",
        {
            "messages": [USER, {"role": "assistant", "tool_calls": [openai_call(ARGUMENTS), CALL]}, FOUND, ANSWER],
            "tools": json.dumps(TOOLS),
        },
        Conversation((USER, {**CALLED, "tool_calls": [CALL, CALL]}, FOUND, ANSWER), tuple(TOOLS)),
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "Add 1 and 2", "input": "", "output": "3", "text": "all"},
        Conversation((USER, ANSWER)),
    ),
    "alpaca with an input": (
        "alpaca",
        {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief"},
        Conversation((SYSTEM, {"role": "user", "content": "Add\n\n1 and 2"}, ANSWER)),
    ),
    "alpaca without the field": ("alpaca", {"instruction": "Add 1 and 2", "output": "3"}, Conversation((USER, ANSWER))),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "Be brief"},
                {"from": "human", "value": "Add 1 and 2"},
                {"from": "gpt", "value": "3"},
                {"from": "tool", "value": "sun"},
                {"from": "assistant", "value": "3"},
            ]
        },
        Conversation((SYSTEM, USER, ANSWER, FOUND, ANSWER)),
    ),
    "prompt and response": (
        "prompt_response",
        {"prompt": "Add 1 and 2", "response": "3"},
        Conversation((USER, ANSWER)),
    ),
    "prompt and completion": (
        "prompt_response",
        {"prompt": "Add 1 and 2", "completion": "3", "system": "Be brief"},
        Conversation((SYSTEM, USER, ANSWER)),
    ),
    "question and answer": (
        "prompt_response",
        {"question": "Add 1 and 2", "answer": "3"},
        Conversation((USER, ANSWER)),
    ),
    "prompt and completion as messages": (
        "prompt_response",
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        Conversation((SYSTEM, USER, ANSWER)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("format", "record", "expected"), CASES.values(), ids=CASES)
def test_a_record_of_each_format_is_recognised_and_becomes_its_messages(format, record, expected):
    assert detected(record) == format
    assert conversation(record, format) == expected


def test_every_format_is_tried():
    assert {format for format, _, _ in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize(
    ("format", "record", "reason", "message"),
    [
        ("alpaca", {"instruction": "a"}, "no_field", r"no field 'output' in \['instruction'\]; rename it"),
        ("alpaca", {"instruction": 5, "output": "b"}, "not_text", "field 'instruction' holds int 5, not text; mend it"),
        ("alpaca", {"instruction": "a", "output": ""}, "empty_answer", r"message 2 \(assistant\) says nothing"),
        ("alpaca", {"instruction": "a\ud800", "output": "b"}, "lone_surrogate", "lone surrogate"),
        ("messages", {"messages": "a"}, "not_a_list", "field 'messages' holds str 'a', not a list of turns"),
        ("messages", {"messages": ["a"]}, "not_a_turn", "'a' is no message with 'role' and 'content'; mend it"),
        ("messages", {"messages": [USER]}, "no_answer", "no message is the assistant's"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "content_not_text",
         "content has a part that is no text"),
        ("messages", {"messages": [{"role": "user", "content": None}, ANSWER]}, "content_not_text", "message 1"),
        ("messages", {"messages": [{"role": "robot", "content": ""}, ANSWER]}, "unknown_role", "role 'robot'"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": [openai_call("{")]}]}, "not_json",
         "the arguments of a call of 'weather' are not JSON"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "malformed_call", "a tool call is"),
        ("messages", {"messages": [ANSWER], "tools": 5}, "malformed_tools", "tools are a list of definitions, not 5"),
        ("sharegpt", {"conversations": [{"value": "a"}]}, "not_a_turn", "no turn with 'from' and 'value'; mend it"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "a"}]}, "unknown_role", "role 'alien'"),
        ("prompt_response", {"prompt": "a"}, "no_field", r"no field 'response' in \['prompt'\]"),
        ("prompt_response", {"prompt": "a", "response": None}, "not_text", "field 'response' holds NoneType"),
        ("alpaca", "a text", "not_an_object", "a text is no record of format 'alpaca'; give .json, .jsonl or .parquet"),
    ],
)  # fmt: skip
def test_a_record_not_of_its_format_is_named_with_the_mend(format, record, reason, message):
    with pytest.raises(Malformed, match=message) as error:
        conversation(record, format)
    assert error.value.reason == reason


def test_a_record_of_no_format_is_told_the_fields_of_each():
    with pytest.raises(
        Malformed, match=r"\['body', 'text'\] are the fields of no format: messages \(messages\), share"
    ):
        detected({"text": "a", "body": "b"})
    with pytest.raises(Malformed, match="a str are the fields of no format"):
        detected("text")
