"""Chat in the terminal: streaming, with history, or several runs side by side. Prompts are rendered as in training.

What is said comes from an iterator and what is answered goes to ``show``: a terminal is one kind of them.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import jax
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jaxllm import workdir
from jaxllm.evaluate.answers import answers
from jaxllm.generate import SamplerConfig, stream
from jaxllm.model import Model
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

COMMANDS = "/reset forgets the conversation, /system TEXT starts one with that system turn, /quit or Ctrl-D ends"
Show = Callable[[str], None]
SHOW = partial(print, end="", flush=True)


class Speaker(NamedTuple):
    """A run that answers. context: tokens that it was trained to see at a time."""

    model: Model
    params: Tree
    tokenizer: Tokenizer
    context: int


@dataclasses.dataclass(frozen=True)
class Manner:
    """How answers are sampled. ``context=0`` is the run's own; an answer takes at most half of it."""

    sampler: SamplerConfig
    max_new_tokens: int = 256
    seed: int = 0
    context: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.context < 0 or self.context == 1:
            raise ValueError(f"context={self.context} must be at least 2 tokens, or 0 for the run's own")

    def room(self, speaker: Speaker) -> tuple[int, int]:
        """(tokens for the prompt, tokens for the answer)."""
        context = self.context or speaker.context
        length = min(self.max_new_tokens, context // 2)
        return context - length, length


def load(directory: str | os.PathLike, *, step: int | None = None) -> Speaker:
    """The run's newest checkpoint, or that of ``step``. Raises as ``workdir.load`` does."""
    context = workdir.config(directory)["data"]["sequence_length"]
    return Speaker(*workdir.load(directory, step=step), context)


def opening(system: str = "") -> Conversation:
    """A conversation that nothing was said in, with a system turn where ``system`` is not empty."""
    return Conversation(({"role": "system", "content": system},) if system else ())


def asked(conversation: Conversation, question: str) -> Conversation:
    """The conversation with what the user says now."""
    return conversation._replace(messages=(*conversation.messages, {"role": "user", "content": question}))


def fitted(conversation: Conversation, tokenizer: Tokenizer, room: int) -> tuple[Conversation, int]:
    """The conversation without its oldest exchanges, as few as make its prompt fit, and how many messages that are.

    The system turn stays, and so does the last question with its system turn: where these alone are longer than
    ``room`` tokens, ``ValueError``.
    """
    messages = conversation.messages
    head = messages[:1] if messages[0]["role"] == "system" else ()
    # A user's turn starts an exchange, so that what is kept never starts with an answer.
    starts = [place for place, message in enumerate(messages) if message["role"] == "user"]
    for start in starts:
        kept = conversation._replace(messages=(*head, *messages[start:]))
        length = len(chat.prompt(kept, tokenizer))
        if length <= room:
            return kept, start - len(head)
    raise ValueError(
        f"the question makes a prompt of {length} tokens, and {room} have room beside the answer; "
        "ask a shorter one, or set --context or --max_new_tokens"
    )


def reply(speaker: Speaker, conversation: Conversation, manner: Manner, number: int) -> Iterator[str]:
    """The answer in pieces as they are sampled; ``number`` tells the answers of one seed apart."""
    _, length = manner.room(speaker)
    prompt = chat.prompt(conversation, speaker.tokenizer)
    key = jax.random.fold_in(jax.random.key(manner.seed), number)
    how = dict(max_new_tokens=length, sampler=manner.sampler, stop_ids=speaker.tokenizer.stop_ids)
    return stream(speaker.model, speaker.params, speaker.tokenizer, prompt, key, **how)


def talk(
    speaker: Speaker, lines: Iterable[str], manner: Manner, *, system: str = "", show: Show = SHOW
) -> Conversation:
    """Answers each line until the lines or the user end it, and returns the conversation. An interrupt ends an answer,
    not the conversation; a line that cannot be answered is told of and forgotten.
    """
    conversation, numbers = opening(system), count()
    for line in lines:
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            break
        if command in ("/reset", "/system"):
            system = argument.strip() if command == "/system" else system
            conversation = opening(system)
            show(f"(a new conversation{', system turn: ' + system if system else ''})\n")
        elif command.startswith("/"):
            show(f"({command} is no command: {COMMANDS})\n")
        elif command:
            conversation = _exchange(speaker, conversation, line, manner, next(numbers), show)
    return conversation


def ask(speaker: Speaker, question: str, manner: Manner, *, system: str = "", show: Show = SHOW) -> None:
    """Shows the answer to one question as it comes. Raises ``ValueError`` where the question has no room."""
    conversation, _ = fitted(asked(opening(system), question), speaker.tokenizer, manner.room(speaker)[0])
    for piece in reply(speaker, conversation, manner, 0):
        show(piece)
    show("\n")


def replies(speaker: Speaker, questions: Sequence[str], manner: Manner, *, system: str = "") -> list[str]:
    """The answer to each question alone, all of them sampled together."""
    room, length = manner.room(speaker)
    conversations = (asked(opening(system), question) for question in questions)
    prompts = [chat.prompt(fitted(x, speaker.tokenizer, room)[0], speaker.tokenizer) for x in conversations]
    how = dict(max_new_tokens=length, sampler=manner.sampler, batch_size=min(16, len(prompts)))
    how["stop_ids"] = stop_ids = speaker.tokenizer.stop_ids
    found = answers(speaker.model, speaker.params, prompts, jax.random.key(manner.seed), **how)
    texts = (speaker.tokenizer.decode(token for token in answer.tokens if token not in stop_ids) for answer in found)
    return list(texts)


def side_by_side(
    directories: Sequence[str], rounds: Iterable[Sequence[str]], load: Callable[[str], Speaker], manner: Manner, **how
) -> Iterator[Table]:
    """A table for each round of questions: beside each, what every run answers."""
    for questions in rounds:
        columns = [replies(load(directory), questions, manner, **how) for directory in directories]
        table = Table("question", *map(escape, directories), show_lines=True)
        for row in zip(questions, *columns, strict=True):
            table.add_row(*map(Text, row))
        yield table


def read_questions(path: str | os.PathLike) -> list[str]:
    """The lines of a text file that are not blank. Raises ``ValueError`` where there are none."""
    questions = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no question: write one on each line")
    return questions


def typed() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D or Ctrl-C; blank lines are not lines."""
    try:
        while True:
            if line := input("> ").strip():
                yield line
    except (EOFError, KeyboardInterrupt):
        print()


def _exchange(speaker, conversation, question, manner, number, show) -> Conversation:
    """The conversation with a question and its answer; as it was where there is none."""
    try:
        kept, dropped = fitted(asked(conversation, question), speaker.tokenizer, manner.room(speaker)[0])
    except ValueError as error:
        show(f"({error})\n")
        return conversation
    if dropped:
        show(f"(the context is full: the oldest {dropped} messages are forgotten)\n")
    pieces = []
    try:
        for piece in reply(speaker, kept, manner, number):
            pieces.append(piece)
            show(piece)
    except KeyboardInterrupt:
        show(" (interrupted)")
    show("\n")
    answer = "".join(pieces)
    if not answer.strip():
        show("(an empty answer: the question is forgotten)\n")
        return kept._replace(messages=kept.messages[:-1])
    return kept._replace(messages=(*kept.messages, chat.message(answer, speaker.tokenizer)))
