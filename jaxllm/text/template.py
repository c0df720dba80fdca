"""Chat templates of other people's models: Jinja sources that come with tokenizers, rendered as transformers does.

A rendered text is cut at its control tokens, which become ids; what was said stays text, whatever it spells. An answer
is encoded apart from what precedes it: what is trained on is the ids of a prompt and then those of an answer.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxllm.text.base import Tokenizer
from jaxllm.text.conversation import TURNS, Conversation, Malformed, Rendered, answer, is_call

# Code points that are no characters: one that nobody says keeps apart what would spell a control token.
_NO_CHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_CALL = re.compile(r"\n?<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)  # as Qwen and SmolLM write it
_PROBE = Conversation(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
Pieces = list[int | str]


def render(conversations: Sequence[Conversation], tokenizer: Tokenizer, *, turns: str) -> list[Rendered]:
    """Ids and mask of each conversation; of the assistant's turns, what follows the prompt is supervised, up to the end
    of the turn and with it.

    Raises ``Malformed`` where the template refuses the conversation, where it writes what precedes an answer otherwise
    than when it asked for it, and where it does not end a turn.
    """
    marked = [_marked(conversation, tokenizer, turns) for conversation in conversations]
    encoded = tokenizer.encode_pieces([pieces for pieces, _ in marked])
    return [
        Rendered(_joined(ids), np.repeat(np.array(supervised, bool), [len(each) for each in ids]))
        for (_, supervised), ids in zip(marked, encoded, strict=True)
    ]


def prompt(conversation: Conversation, tokenizer: Tokenizer, *, start: str) -> list[int]:
    """Ids after which the assistant speaks, whose answer begins with ``start``. Raises as ``render`` does."""
    said = _Said(conversation, tokenizer)
    whole = said.text(len(conversation.messages), asked=True)
    pieces = [piece for _, segment in _segments(whole, said.starts(whole)) for piece in said.pieces(segment)]
    return _joined(tokenizer.encode_pieces([[*pieces, start] if start else pieces])[0]).tolist()


def reply(message: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
    """Ids of what follows the end of the assistant's turn ``message``, until it speaks again: what others answer.

    Raises ``Malformed`` where the template cannot write it.
    """
    said = _Said(Conversation((*_PROBE.messages[:1], message, *answers)), tokenizer)
    whole = said.text(2 + len(answers), asked=True)
    start = said.starts(whole)[1]
    if start is None:
        raise Malformed("rewritten", "the chat template writes a question otherwise once tools have answered it")
    pieces = said.pieces(whole[start:])
    end = _end(pieces, tokenizer, 1)
    return _joined(tokenizer.encode_pieces([pieces[end - 1 :]])[0][1:]).tolist()


def parse(tokens: Iterable[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The assistant's message that ids spell, up to the first end, without further control tokens."""
    ids = list(tokens)
    ids = ids[: next((place for place, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))]
    return message(tokenizer.decode(token for token in ids if token not in tokenizer.special_ids))


def message(text: str) -> dict[str, Any]:
    """The assistant's message that a text spells, with the calls among it that are well-formed."""
    calls: list = []

    def taken(found: re.Match) -> str:
        try:
            call = json.loads(found[1])
        except (ValueError, RecursionError):
            return found[0]
        if not is_call(call):
            return found[0]
        calls.append(call)
        return ""

    content = _CALL.sub(taken, text)
    return answer(content, calls)


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The control token that the template writes behind an answer; None where there is none."""
    said = _Said(_PROBE, tokenizer)
    try:
        whole = said.text(2)
        start = said.starts(whole)[1]
    except Malformed:
        return None
    pieces = said.pieces(whole[start:]) if start is not None else []
    return next((piece for piece in pieces if isinstance(piece, int)), None)


def _marked(conversation: Conversation, tokenizer: Tokenizer, turns: str) -> tuple[Pieces, list[bool]]:
    """The pieces of a conversation, and whether each is supervised."""
    said = _Said(conversation, tokenizer)
    whole = said.text(len(conversation.messages))
    starts = said.starts(whole)
    learned = {start: place for place, start in list(starts.items())[TURNS[turns]]}
    if None in learned:
        raise Malformed(
            "rewritten",
            f"the chat template writes what stands before message {learned[None] + 1} otherwise than when it asks for "
            "it, so no prompt has the ids that training would see: use turns='last', or conversations of one turn",
        )
    pieces, supervised = [], []
    for start, segment in _segments(whole, starts):
        own = said.pieces(segment)
        end = _end(own, tokenizer, learned[start]) if start in learned else 0
        pieces += own
        supervised += [place < end for place in range(len(own))]
    return pieces, supervised


class _Said:
    """A conversation as the template is given it."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer):
        self.tokenizer, self.source = tokenizer, _compiled(tokenizer.template)
        given = [list(map(_openai, conversation.messages)), list(map(_openai_tool, conversation.tools))]
        try:
            spelled = json.dumps(given, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise Malformed(
                "not_json", f"what is said cannot be written as JSON ({error}); use texts, lists"
            ) from error
        self.mark = next(sign for sign in _NO_CHARACTERS if sign not in spelled)
        self.messages, self.tools = self._kept_apart(given)

    def text(self, count: int, *, asked: bool = False) -> str:
        """What the template makes of the first ``count`` messages; asked: and of the assistant's being next."""
        how = dict(messages=self.messages[:count], tools=self.tools or None, add_generation_prompt=asked)
        try:
            return self.source.render(**self.tokenizer.template_names, **how)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise Malformed("template", f"the chat template refuses the conversation: {error}") from error

    def starts(self, whole: str) -> dict[int, int | None]:
        """Where in the text each of the assistant's messages begins; None where what precedes it was rewritten."""
        places = [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]
        before = {place: self.text(place, asked=True) for place in places}
        return {place: len(text) if whole.startswith(text) else None for place, text in before.items()}

    def pieces(self, text: str) -> Pieces:
        """The control tokens' ids of a text and the texts between them."""
        names = {spelled: token for token, spelled in self.tokenizer.special_tokens.items()}
        cut = enumerate(self.tokenizer.special_pattern.split(text))
        return [names[part] if place % 2 else part.replace(self.mark, "") for place, part in cut if part]

    def _kept_apart(self, value: Any) -> Any:
        """The value with the mark behind the first character of each control token that one of its texts spells."""
        if isinstance(value, str):
            return self.tokenizer.special_pattern.sub(lambda found: found[0][:1] + self.mark + found[0][1:], value)
        if isinstance(value, Mapping):
            return {self._kept_apart(name): self._kept_apart(each) for name, each in value.items()}
        return [self._kept_apart(each) for each in value] if isinstance(value, list | tuple) else value


def _openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message in the form that templates are written for."""
    if not message.get("tool_calls"):
        return dict(message)
    return {**message, "tool_calls": [{"type": "function", "function": call} for call in message["tool_calls"]]}


def _openai_tool(tool: Any) -> Any:
    bare = isinstance(tool, Mapping) and "name" in tool and "function" not in tool
    return {"type": "function", "function": tool} if bare else tool


def _segments(whole: str, starts: Mapping[int, int | None]) -> list[tuple[int, str]]:
    """The text cut where answers begin, each part with its place."""
    cuts = [0, *(start for start in starts.values() if start is not None), len(whole)]
    return [(start, whole[start:stop]) for start, stop in zip(cuts, cuts[1:], strict=False)]


def _end(pieces: Pieces, tokenizer: Tokenizer, place: int) -> int:
    """How many pieces there are up to the end of the turn that they begin with."""
    end = next((end for end, piece in enumerate(pieces, 1) if piece in tokenizer.stop_ids), None)
    if end is None:
        names = [tokenizer.special_tokens[token] for token in tokenizer.stop_ids]
        raise Malformed("no_end", f"the chat template ends message {place + 1} with none of {names}: name its end")
    return end


def _joined(ids: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *ids])


@functools.lru_cache
def _compiled(source: str) -> jinja2.Template:
    """Raises ValueError for what is no template."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no Jinja that can be read, line {error.lineno}: {error}") from error


class _Generation(Extension):
    """{% generation %} marks answers in some templates; here prompts tell where they begin."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    how = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(value, **how)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """Always the same day, the one that Llama's templates fall back to: a prompt is the same when a run goes on."""
    return datetime(2024, 7, 26).strftime(form)
