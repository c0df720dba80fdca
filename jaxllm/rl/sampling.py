"""Prompts to samples, with the turns of tools between: the trainer receives exactly the ids that were sampled."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.generate import Request, SamplerConfig, completions
from jaxllm.model import Model
from jaxllm.rl.layout import Sample
from jaxllm.rl.tools import Tool
from jaxllm.text import chat
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree


@dataclasses.dataclass(frozen=True)
class Limits:
    """In tokens: the longest prompt, and the most that a model may say in all its turns, a tool's words among them."""

    prompt: int
    new: int
    turns: int = 1


class Sampled(NamedTuple):
    """A sample, the text of its last turn, and whether the model ended it."""

    sample: Sample
    text: str
    ended: bool


class _Turn(NamedTuple):
    """What a completion so far consists of."""

    tokens: list[np.ndarray]
    sampled: list[np.ndarray]
    logp: list[np.ndarray]


def sampled(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    limits: Limits,
    slots: int,
    sampler: SamplerConfig,
    tools: Mapping[str, Tool],
) -> Iterator[tuple[int, Sampled]]:
    """(number of the prompt, what followed it), as they end; equal prompts that follow each other are read once.

    A model that calls a tool is answered, in another turn of the same sample, while ``limits.turns`` and ``limits.new``
    leave room. What is sampled for a prompt depends on the key, its number and itself alone.
    """
    queue = deque(Request(number, prompt, limits.new) for number, prompt in enumerate(prompts))
    said: dict[int, _Turn] = {}
    how = dict(slots=slots, length=limits.prompt + limits.new)
    for done in completions(model, params, queue, key, **how, sampler=sampler, stop_ids=tokenizer.stop_ids):
        turn = said.setdefault(done.number, _Turn([], [], []))
        _extend(turn, done.tokens, True, done.logp)
        message = chat.parse(done.tokens, tokenizer)
        left = limits.new - sum(map(len, turn.tokens))
        reply = _reply(tokenizer, tools, message) if done.tokens[-1] == tokenizer.end_id else []
        if reply and len(turn.tokens) < 2 * limits.turns - 1 and len(reply) < left:
            _extend(turn, np.array(reply, np.int32), False, np.zeros(len(reply), np.float32))
            prompt = [*prompts[done.number], *np.concatenate(turn.tokens).tolist()]
            queue.append(Request(done.number, prompt, left - len(reply)))
        else:
            columns = (np.concatenate(parts) for parts in said.pop(done.number))
            yield done.number, Sampled(Sample(tuple(prompts[done.number]), *columns), message["content"], done.ended)


def _extend(turn: _Turn, tokens: np.ndarray, is_sampled: bool, logp: np.ndarray) -> None:
    turn.tokens.append(tokens)
    turn.sampled.append(np.full(len(tokens), is_sampled))
    turn.logp.append(logp)


def _reply(tokenizer: Tokenizer, tools: Mapping[str, Tool], message: Mapping) -> list[int]:
    """Ids of what the tools say to the message's calls, up to where the assistant speaks again; none without a call."""
    calls = message["tool_calls"] if "tool_calls" in message and tools else ()
    answers = [{"role": "tool", "content": _called(tools, call)} for call in calls]
    return chat.reply(message, answers, tokenizer) if answers else []


def _called(tools: Mapping[str, Tool], call: Mapping) -> str:
    if call["name"] not in tools:
        return f"error: there is no tool {call['name']!r}"
    return tools[call["name"]].call(call["arguments"])
