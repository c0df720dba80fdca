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
    return Conversation(tuple(map(message, entries(record, "messages"))), tools(record))


def _sharegpt(record: Fields) -> Conversation:
    """{"conversations": [{"from", "value"}, ...], "system"?: text, "tools"?: [...]}."""
    said = entries(record, "conversations")
    for turn in said:
        if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
            raise Malformed("not_a_turn", f"{turn!r:.60} is no turn with 'from' and 'value'; mend it")
    messages = (message({"role": turn["from"], "content": turn["value"]}) for turn in said)
    return Conversation((*system(record), *messages), tools(record))


def _alpaca(record: Fields) -> Conversation:
    """{"instruction", "input"?, "output", "system"?}: the input, where there is one, follows after an empty line."""
    return Conversation((*system(record), *asked(record), {"role": "assistant", "content": _text(record, "output")}))


def asked(record: Fields) -> list[dict[str, Any]]:
    """What the user says in Alpaca's format."""
    said = [_text(record, "instruction"), _text(record, "input") if record.get("input") else ""]
    return [{"role": "user", "content": "\n\n".join(filter(None, said))}]


def _prompt_response(record: Fields) -> Conversation:
    """{"prompt", "response"}, {"prompt", "completion"} or {"question", "answer"}: texts, or lists of messages."""
    question, answer = next((pair for pair in _PAIRS if record.keys() >= set(pair)), _PAIRS[0])
    said = (*turns(record, question, "user"), *turns(record, answer, "assistant"))
    return Conversation((*system(record), *said), tools(record))


FORMATS: dict[str, Callable[[Fields], Conversation]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "prompt_response": _prompt_response,
}


def message(given: Any) -> dict[str, Any]:
    """One of OpenAI's messages as the template takes it: without what it does not show."""
    if not isinstance(given, Mapping):
        raise Malformed("not_a_turn", f"{given!r:.60} is no message with 'role' and 'content'; mend it")
    role, content, calls = (given.get(name) for name in ("role", "content", "tool_calls"))
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


def tools(record: Fields) -> tuple:
    """Definitions of what the assistant may call."""
    found = _from_json(record.get("tools") or [], "tools")
    if not isinstance(found, Sequence):
        raise Malformed("malformed_tools", f"tools are a list of definitions, not {found!r:.60}; mend them")
    return tuple(found)


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Malformed("not_json", f"{what} are not JSON ({error}): {value!r:.60}; mend them") from error


def turns(record: Fields, field: str, role: str) -> list[dict[str, Any]]:
    """The messages of a field, or the one of this role that its text is."""
    value = record.get(field)
    return list(map(message, value)) if isinstance(value, list) else [{"role": role, "content": _text(record, field)}]


def system(record: Fields) -> list[dict[str, Any]]:
    """The system message that stands in a field of its own, if one does."""
    return [{"role": "system", "content": _text(record, "system")}] if record.get("system") else []


def entries(record: Fields, field: str) -> Sequence[Any]:
    """The list that a field holds."""
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
