"""Messages to ids and the mask of what is supervised, and a completion's ids to a message, by the one chat template.

Training, prompts, evaluation, chat and export all use it; for a tokenizer with another template, `template` answers.
Control tokens are added by id, so that no text becomes one; an assistant's own <think> and <answer> tags are the
exception. A conversation has no blank or newline of its own:

    <|bos|> [<|tools|> JSON <|end|>] (role content (<|tool_call|> JSON)* <|end|>)*
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

from jaxllm.text import special_tokens as special
from jaxllm.text import template
from jaxllm.text.base import Tokenizer
from jaxllm.text.conversation import TURNS, Conversation, Malformed, Rendered, answer, is_call
from jaxllm.text.special_tokens import BOS_ID, END_ID, IDS

ROLES = {"system": special.SYSTEM, "user": special.USER, "assistant": special.ASSISTANT, "tool": special.TOOL}
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


def render(conversations: Sequence[Conversation], tokenizer: Tokenizer, *, turns: str = "all") -> list[Rendered]:
    """Ids and mask of each conversation. Supervised are an assistant's content, its calls and the end of its turn.

    Args:
      turns: "all" of the assistant's turns, or the "last" one.

    Raises:
      Malformed: an unknown role, a content that is no text, no answer or an empty one; or what a template refuses.
      ValueError: a tokenizer of others without a template.
    """
    pieces = [_conversation(conversation, turns) for conversation in conversations]
    if tokenizer.template:
        return template.render(conversations, tokenizer, turns=turns)
    _require_own_tokens(tokenizer)
    encoded = tokenizer.encode_pieces([[piece for piece, _ in each] for each in pieces])
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
    if tokenizer.template:
        return template.prompt(conversation, tokenizer, start=start)
    _require_own_tokens(tokenizer)
    return np.concatenate(tokenizer.encode_pieces([pieces])[0]).tolist()


def reply(message: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Ids of what others say (``answers``) after the assistant has ended its turn, ``message``, until it speaks again.

    Raises Malformed as ``prompt`` does.
    """
    if tokenizer.template:
        return template.reply(message, answers, tokenizer)
    return prompt(Conversation(tuple(answers)), tokenizer)[len(_opening(())) :]


def parse(tokens: Iterable[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The assistant's message that a completion's ids spell, up to the first end of a turn or of a document.

    A call that is not well-formed JSON stays in the content as it is spelled: a model may say anything.
    """
    if tokenizer.template:
        return template.parse(tokens, tokenizer)
    _require_own_tokens(tokenizer)
    ids = list(tokens)
    ids = ids[: next((place for place, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))]
    edges = [*(place for place, token in enumerate(ids) if token == _TOOL_CALL_ID), len(ids)]
    content, calls = tokenizer.decode(ids[: edges[0]]), []
    for start, stop in pairwise(edges):
        spelled = tokenizer.decode(ids[start + 1 : stop])
        try:
            call = json.loads(spelled)
        except (ValueError, RecursionError):
            call = None
        if is_call(call):
            calls.append(call)
        else:
            content += special.TOOL_CALL + spelled
    return answer(content, calls)


def message(text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """The assistant's message that a text spells, as it was streamed, its calls among it."""
    if tokenizer.template:
        return template.message(text)
    first, *calls = map(tokenizer.encode, text.split(special.TOOL_CALL))
    return parse(sum(([_TOOL_CALL_ID, *call] for call in calls), first), tokenizer)


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


def _require_own_tokens(tokenizer: Tokenizer) -> None:
    if tokenizer.special_tokens.get(END_ID) != special.END:
        raise ValueError(
            "the tokenizer has neither a chat template nor the control tokens of ours: a base model is continued, not "
            "asked; to teach it a chat, put a chat_template.jinja beside its tokenizer.json and import it again"
        )


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
    if not all(map(is_call, calls)):
        raise Malformed("malformed_call", f"{where}: a tool call is {{'name': text, 'arguments': object}}, not {calls}")
    ordered = ({"name": call["name"], "arguments": call["arguments"]} for call in calls)  # as JINJA has them
    spelled = ([_TOOL_CALL_ID, _json(call, f"the call of {where}")] for call in ordered)
    return [_ASSISTANT_ID, *_spoken(content), *chain.from_iterable(spelled), END_ID]


def _spoken(content: str) -> list[int | str]:
    """What an assistant says: texts, and the ids of the tags between them."""
    return [IDS[part] if place % 2 else part for place, part in enumerate(_TAGS.split(content))]


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise Malformed("not_json", f"{what} cannot be written as JSON ({error}); use texts, numbers, lists") from error
