"""How a language model is asked which of two answers is better, and how it says so: the one wording, to teach it and to
ask it by.
"""

from jaxllm.text.chat import Conversation

FIRST, SECOND = "A", "B"


def comparison(prompt: Conversation, first: str, second: str) -> Conversation:
    """A prompt whose answer is ``FIRST`` or ``SECOND``. What is asked comes last, after all that it is about."""
    said = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in prompt.messages)
    question = f"{said}{FIRST}: {first}\n\n{SECOND}: {second}\n\nWhich answer is better, {FIRST} or {SECOND}?"
    return Conversation(({"role": "user", "content": question},))
