"""Records to conversations, in the formats that people have: one pure function per format.

A function makes messages out of fields; whether they make sense is the template's to say (`chat.check`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed

Fields = Mapping[str, Any]
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
# What tells a format, in the order of asking: a record with messages often has a prompt beside them.
_SIGNS = (
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("alpaca", {"instruction", "output"}),
    *(("prompt_response", set(pair)) for pair in _PAIRS),
)
_ROLES = {  # names of the four roles elsewhere
    "developer": "system", "function": "tool", "observation": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
}  # fmt: skip


def detected(record: Fields) -> str:
    """The format whose fields a record has. Raises Malformed where it has those of none."""
    for name, fields in _SIGNS:
        if isinstance(record, Mapping) and fields <= record.keys():
            return name
    found = sorted(record) if isinstance(record, Mapping) else f"a {type(record).__name__}"
    known = ", ".join(f"{name} ({' and '.join(sorted(fields))})" for name, fields in _SIGNS)
    raise Malformed("unknown_format", f"{found} are the fields of no format: {known}; rename them")


def conversation(record: Fields, format: str) -> Conversation:
    """The conversation that a record of this format holds. Raises Malformed where it holds none that makes sense."""
    if not isinstance(record, Mapping):
        raise Malformed("not_an_object", f"a text is no record of format {format!r}; give .json, .jsonl or .parquet")
    made = FORMATS[format](record)
    chat.check(made)
    return made


def _messages(record: Fields) -> Conversation:
    """OpenAI: {"messages": [{"role", "content", "tool_calls"?}, ...], "tools"?: [...]}."""
    return Conversation(tuple(map(_message, _list(record, "messages"))), _tools(record))


def _sharegpt(record: Fields) -> Conversation:
    """{"conversations": [{"from", "value"}, ...], "system"?: text, "tools"?: [...]}."""
    turns = _list(record, "conversations")
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise Malformed("not_a_turn", f"{turn!r:.60} is no turn with 'from' and 'value'; mend it")
    messages = (_message({"role": turn["from"], "content": turn["value"]}) for turn in turns)
    return Conversation((*_system(record), *messages), _tools(record))


def _alpaca(record: Fields) -> Conversation:
    """{"instruction", "input"?, "output", "system"?}: the input, where there is one, follows after an empty line."""
    asked = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    user = {"role": "user", "content": "\n\n".join(filter(None, asked))}
    return Conversation((*_system(record), user, {"role": "assistant", "content": _text(record, "output")}))


def _prompt_response(record: Fields) -> Conversation:
    """{"prompt", "response"}, {"prompt", "completion"} or {"question", "answer"}: texts, or lists of messages."""
    asked, answered = next((pair for pair in _PAIRS if record.keys() >= set(pair)), _PAIRS[0])
    turns = (*_turns(record, asked, "user"), *_turns(record, answered, "assistant"))
    return Conversation((*_system(record), *turns), _tools(record))


FORMATS: dict[str, Callable[[Fields], Conversation]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "prompt_response": _prompt_response,
}


def _message(message: Any) -> dict[str, Any]:
    """One of OpenAI's messages as the template takes it: without what it does not show."""
    if not isinstance(message, Mapping):
        raise Malformed("not_a_turn", f"{message!r:.60} is no message with 'role' and 'content'; mend it")
    role, content, calls = (message.get(name) for name in ("role", "content", "tool_calls"))
    if content is None and calls:
        content = ""
    elif isinstance(content, Sequence) and not isinstance(content, str):
        content = _joined(content)
    made = {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
    return made | {"tool_calls": [_call(call) for call in calls]} if calls else made


def _joined(parts: Sequence[Any]) -> str:
    """The content of a message that comes in parts, [{"type": "text", "text": ...}, ...]."""
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Malformed("content_not_text", f"content has a part that is no text: {parts!r:.60}; leave the record out")
    return "".join(texts)


def _call(call: Any) -> dict[str, Any]:
    """{"name", "arguments"} out of {"function": {"name", "arguments"}}; arguments are often JSON inside a text."""
    inner = call.get("function") or call if isinstance(call, Mapping) else {}
    name, arguments = inner.get("name"), inner.get("arguments")
    return {"name": name, "arguments": _from_json(arguments, f"the arguments of a call of {name!r}")}


def _tools(record: Fields) -> tuple:
    tools = _from_json(record.get("tools") or [], "tools")
    if not isinstance(tools, Sequence):
        raise Malformed("malformed_tools", f"tools are a list of definitions, not {tools!r:.60}; mend them")
    return tuple(tools)


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Malformed("not_json", f"{what} are not JSON ({error}): {value!r:.60}; mend them") from error


def _turns(record: Fields, field: str, role: str) -> list[dict[str, Any]]:
    value = record.get(field)
    return list(map(_message, value)) if isinstance(value, list) else [{"role": role, "content": _text(record, field)}]


def _system(record: Fields) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def _list(record: Fields, field: str) -> Sequence[Any]:
    value = _value(record, field)
    if not isinstance(value, list | tuple):
        raise Malformed(
            "not_a_list", f"field {field!r} holds {type(value).__name__} {value!r:.40}, not a list of turns"
        )
    return value


def _text(record: Fields, field: str) -> str:
    value = _value(record, field)
    if not isinstance(value, str):
        raise Malformed("not_text", f"field {field!r} holds {type(value).__name__} {value!r:.40}, not text; mend it")
    return value


def _value(record: Fields, field: str) -> Any:
    if field not in record:
        raise Malformed("no_field", f"no field {field!r} in {sorted(record)}; rename it, or set another format")
    return record[field]
