"""The one chat template: messages to ids and the mask of what is supervised, and a completion's ids to a message.

Training, prompts, evaluation, chat and export all use it. Control tokens are added by id, so that no text becomes one;
an assistant's own <think> and <answer> tags are the exception. A conversation has no blank or newline of its own:

    <|bos|> [<|tools|> JSON <|end|>] (role content (<|tool_call|> JSON)* <|end|>)*
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxllm.text import special_tokens as special
from jaxllm.text.special_tokens import BOS_ID, END_ID, EOS_ID, IDS
from jaxllm.text.tokenizer import Tokenizer

ROLES = {"system": special.SYSTEM, "user": special.USER, "assistant": special.ASSISTANT, "tool": special.TOOL}
TURNS = {"all": slice(None), "last": slice(-1, None)}  # which of the assistant's turns are supervised
_TAGS = re.compile(f"({special.THINK}|{special.END_THINK}|{special.ANSWER}|{special.END_ANSWER})")
_ASSISTANT_ID, _TOOLS_ID, _TOOL_CALL_ID = IDS[special.ASSISTANT], IDS[special.TOOLS], IDS[special.TOOL_CALL]

# The same template for Hugging Face's `apply_chat_template`, where `tojson` keeps the order of keys and all characters.
# There, alas, the spelling of a control token in a text becomes the token: that tokenizer reads the rendered string.
JINJA = (
    "<|bos|>{% if tools %}<|tools|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{% set call = call.function or call %}"
    "<|tool_call|>{{ {'name': call.name, 'arguments': call.arguments} | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Conversation(NamedTuple):
    """messages: mappings of "role", "content" and, of an assistant, "tool_calls": [{"name", "arguments"}, ...].

    tools: definitions of what the assistant may call, as JSON can hold them.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


class Rendered(NamedTuple):
    """tokens: int32 ids. supervised: bool for each, True for what a model learns to say."""

    tokens: np.ndarray
    supervised: np.ndarray


class Malformed(ValueError):
    """What cannot be used, why, and the mend. reason: a short name for it, to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def render(conversations: Sequence[Conversation], tokenizer: Tokenizer, *, turns: str = "all") -> list[Rendered]:
    """Ids and mask of each conversation. Supervised are an assistant's content, its calls and the end of its turn.

    Args:
      turns: "all" of the assistant's turns, or the "last" one.

    Raises:
      Malformed: an unknown role, a content that is no text, no answer or an empty one.
    """
    pieces = [_conversation(conversation, turns) for conversation in conversations]
    encoded = _encoded([[piece for piece, _ in each] for each in pieces], tokenizer)
    return [
        Rendered(np.concatenate(ids), np.repeat([supervised for _, supervised in each], [len(piece) for piece in ids]))
        for each, ids in zip(pieces, encoded, strict=True)
    ]


def prompt(conversation: Conversation, tokenizer: Tokenizer, *, start: str = "") -> list[int]:
    """Ids after which the assistant speaks; start: how it begins. They are the first ids of the answered conversation.

    Raises Malformed as `render` does, and where the assistant has spoken last.
    """
    messages = conversation.messages
    if messages and messages[-1].get("role") == "assistant":
        raise Malformed("answered", "the last message is the assistant's already: give the messages before it")
    turns = chain.from_iterable(_turn(message, place) for place, message in enumerate(messages))
    pieces = [*_opening(conversation.tools), *turns, _ASSISTANT_ID, *_spoken(start)]
    return np.concatenate(_encoded([pieces], tokenizer)[0]).tolist()


def parse(tokens: Iterable[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The assistant's message that a completion's ids spell, up to the first end of a turn or of a document.

    A call that is not well-formed JSON stays in the content as it is spelled: a model may say anything.
    """
    ids = list(tokens)
    ids = ids[: next((place for place, token in enumerate(ids) if token in (END_ID, EOS_ID)), len(ids))]
    edges = [*(place for place, token in enumerate(ids) if token == _TOOL_CALL_ID), len(ids)]
    content, calls = tokenizer.decode(ids[: edges[0]]), []
    for start, stop in pairwise(edges):
        spelled = tokenizer.decode(ids[start + 1 : stop])
        try:
            call = json.loads(spelled)
        except (ValueError, RecursionError):
            call = None
        if _is_call(call):
            calls.append(call)
        else:
            content += special.TOOL_CALL + spelled
    message = {"role": "assistant", "content": content}
    return message | {"tool_calls": calls} if calls else message


def check(conversation: Conversation) -> None:
    """Raises Malformed where `render` would, or where a text is not valid Unicode."""
    text(conversation)


def text(conversation: Conversation) -> str:
    """What is encoded as text, a line for each piece. Raises as `check` does."""
    texts = "\n".join(piece for piece, _ in _conversation(conversation, "all") if isinstance(piece, str))
    try:
        texts.encode()
    except UnicodeEncodeError as error:
        lone = texts[error.start]
        raise Malformed("lone_surrogate", f"lone surrogate {lone!a} in {texts[:40]!a}; mend the text") from error
    return texts


def responses(conversation: Conversation) -> Conversation:
    """The assistant's turns alone: response tuning (An and Kim 2024, arXiv 2410.02465) learns answers unasked."""
    return Conversation(tuple(message for message in conversation.messages if message["role"] == "assistant"))


def _conversation(conversation: Conversation, turns: str) -> list[tuple[int | str, bool]]:
    """The pieces of a conversation, each a control token's id or a text, and whether each is supervised."""
    answers = [place for place, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
    pieces = [(piece, False) for piece in _opening(conversation.tools)]
    for place, message in enumerate(conversation.messages):
        role, *said = _turn(message, place)
        supervised = place in answers[TURNS[turns]]
        pieces += [(role, False), *((piece, supervised) for piece in said)]
    if not answers:
        raise Malformed("no_answer", "no message is the assistant's, so there is nothing to learn; add its answer")
    return pieces


def _opening(tools: Sequence[Mapping]) -> list[int | str]:
    return [BOS_ID, _TOOLS_ID, _json(list(tools), "the tools"), END_ID] if tools else [BOS_ID]


def _turn(message: Mapping[str, Any], place: int) -> list[int | str]:
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls") or ()
    where = f"message {place + 1}"
    if not isinstance(role, str) or role not in ROLES:
        raise Malformed("unknown_role", f"{where} has role {role!r}, not one of {tuple(ROLES)}; rename it")
    if not isinstance(content, str):
        kind = type(content).__name__
        raise Malformed("content_not_text", f"{where} ({role}) has content of {kind}, not text; make it text, or ''")
    if role != "assistant":
        if calls:
            raise Malformed("calls_of_others", f"{where} ({role}) calls tools; only the assistant may")
        return [IDS[ROLES[role]], content, END_ID]
    if not content.strip() and not calls:
        raise Malformed("empty_answer", f"{where} (assistant) says nothing; give its answer, or leave it out")
    if not all(map(_is_call, calls)):
        raise Malformed("malformed_call", f"{where}: a tool call is {{'name': text, 'arguments': object}}, not {calls}")
    spelled = ([_TOOL_CALL_ID, _json(call, f"the call of {where}")] for call in calls)
    return [_ASSISTANT_ID, *_spoken(content), *chain.from_iterable(spelled), END_ID]


def _spoken(content: str) -> list[int | str]:
    """What an assistant says: texts, and the ids of the tags between them."""
    return [IDS[part] if place % 2 else part for place, part in enumerate(_TAGS.split(content))]


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() == {"name", "arguments"}
        and isinstance(value["name"], str)
        and isinstance(value["arguments"], Mapping)
    )


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise Malformed("not_json", f"{what} cannot be written as JSON ({error}); use texts, numbers, lists") from error


def _encoded(sequences: Sequence[Sequence[int | str]], tokenizer: Tokenizer) -> list[list[np.ndarray]]:
    """The ids of each piece of each sequence; all texts are encoded at once."""
    texts = [piece for pieces in sequences for piece in pieces if isinstance(piece, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    return [
        [next(encoded) if isinstance(piece, str) else np.array([piece], np.int32) for piece in pieces]
        for pieces in sequences
    ]
