import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from rich.control import strip_control_codes

from jaxllm.generate import SamplerConfig
from jaxllm.serve import chat as module
from jaxllm.serve.chat import (
    Manner,
    Speaker,
    ask,
    asked,
    fitted,
    opening,
    read_questions,
    replies,
    reply,
    side_by_side,
    talk,
    typed,
)
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import IDS
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
GREEDY = Manner(SamplerConfig(temperature=0.0), max_new_tokens=6)


@pytest.fixture(scope="module")
def speaker(tiny, built):
    """A byte model with scaled logits, so that greedy means the same however it is worked out."""
    model, params = built(tiny(vocab_size=288))
    return Speaker(model, jax.tree.map(lambda x: 3 * jnp.asarray(x), params), TOKENIZER, context=64)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


class Script:
    """Plays the model: says the given answers in turn, and remembers the prompts that it saw."""

    def __init__(self, *answers):
        self.answers, self.prompts, self.stop_ids = list(answers), [], TOKENIZER.stop_ids

    def __call__(self, model, params, tokenizer, prompt, key, *, max_new_tokens, sampler, stop_ids):
        assert (stop_ids, sampler, max_new_tokens) == (self.stop_ids, GREEDY.sampler, 6)
        self.prompts.append(tokenizer.decode(prompt))
        answer = self.answers.pop(0)
        for piece in answer if isinstance(answer, list) else [answer]:
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield piece


@pytest.fixture
def play(monkeypatch, speaker):
    """A function: answers, lines, options of talk -> (conversation, what was shown, prompts)."""

    def play(answers, lines, context=1000, **options):
        script, shown = Script(*answers), []
        monkeypatch.setattr(module, "stream", script)
        conversation = talk(speaker._replace(context=context), lines, GREEDY, show=shown.append, **options)
        return conversation, "".join(shown), script.prompts

    return play


def test_an_answer_is_what_the_model_says_to_the_prompt_of_training(speaker):
    conversation = asked(opening("Be brief."), "<|end|>?")
    text = "".join(reply(speaker, conversation, GREEDY, 0))
    tokens = chat.prompt(conversation, TOKENIZER)
    said, forward = [], jax.jit(speaker.model.forward)
    for _ in range(6):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens) + len(said)] = tokens + said
        said.append(int(np.argmax(forward(speaker.params, padded)[0, len(tokens) + len(said) - 1])))
        if said[-1] in TOKENIZER.stop_ids:
            said.pop()
            break
    assert text == TOKENIZER.decode(said)
    shown = []
    ask(speaker, "<|end|>?", GREEDY, system="Be brief.", show=shown.append)
    assert "".join(shown) == f"{text}\n"
    assert replies(speaker, ["<|end|>?", "another"], GREEDY, system="Be brief.")[0] == text


def test_seed_and_number_decide_a_sampled_answer(speaker):
    soft = speaker._replace(params=jax.tree.map(lambda x: x / 3, speaker.params))
    say = lambda seed, number: "".join(  # noqa: E731
        reply(soft, asked(opening(), "a"), Manner(SamplerConfig(), seed=seed), number)
    )
    assert say(0, 0) == say(0, 0) and len({say(0, 0), say(0, 1), say(1, 0)}) == 3


def test_a_conversation_remembers_what_was_said(play):
    conversation, shown, prompts = play([["Hel", "lo."], "Ann."], ["Hi", "Name?"])
    assert conversation.messages == (user("Hi"), assistant("Hello."), user("Name?"), assistant("Ann."))
    assert shown == "Hello.\nAnn.\n"
    assert prompts == [
        "<|bos|><|user|>Hi<|end|><|assistant|>",
        "<|bos|><|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>Name?<|end|><|assistant|>",
    ]
    (rendered,) = chat.render([conversation], TOKENIZER)
    assert TOKENIZER.decode(rendered.tokens).startswith(prompts[1])


def test_reset_forgets_and_system_starts_anew_and_stays(play):
    lines = ["a", "/reset", "b", "/system  Be kind. ", "c", "/reset", "d", "/system", "e", "/quit", "f"]
    conversation, shown, prompts = play(["1", "2", "3", "4", "5"], lines, system="Be brief.")
    spoken = [prompt.removeprefix("<|bos|>").removesuffix("<|end|><|assistant|>") for prompt in prompts]
    brief, kind = ("<|system|>Be " + how + ".<|end|><|user|>" for how in ("brief", "kind"))
    assert spoken == [brief + "a", brief + "b", kind + "c", kind + "d", "<|user|>e"]
    assert conversation.messages == (user("e"), assistant("5"))
    assert "(a new conversation, system turn: Be kind.)" in shown and shown.count("(a new conversation)") == 1


def test_blank_lines_say_nothing_and_an_unknown_command_is_told_of(play):
    conversation, shown, prompts = play(["1"], ["", "  ", "/rest", "a"])
    assert len(prompts) == 1 and "(/rest is no command: /reset forgets" in shown
    assert conversation.messages == (user("a"), assistant("1"))


def test_an_interrupt_ends_the_answer_and_not_the_conversation(play):
    conversation, shown, _ = play([["Once", KeyboardInterrupt], "2"], ["a", "b"])
    assert conversation.messages == (user("a"), assistant("Once"), user("b"), assistant("2"))
    assert shown == "Once (interrupted)\n2\n"


@pytest.mark.parametrize("silence", ["", " \n", [KeyboardInterrupt]])
def test_an_empty_answer_is_told_of_and_its_question_forgotten(play, silence):
    conversation, shown, prompts = play([silence, "2"], ["a", "b"])
    assert "(an empty answer: the question is forgotten)" in shown
    assert conversation.messages == (user("b"), assistant("2")) and ">a<" not in prompts[1]


def test_calls_and_thoughts_keep_their_tokens_in_the_history(play):
    said = '<think>hm</think>Let me see.<|tool_call|>{"name": "add", "arguments": {"a": 1}}'
    conversation, _, prompts = play([said, "ok"], ["a", "b"])
    assert conversation.messages[1]["tool_calls"] == [{"name": "add", "arguments": {"a": 1}}]
    assert conversation.messages[1]["content"] == "<think>hm</think>Let me see."
    (rendered,) = chat.render([conversation], TOKENIZER)
    assert {IDS["<think>"], IDS["</think>"], IDS["<|tool_call|>"]} <= set(rendered.tokens.tolist())
    assert said in prompts[1]


def test_a_conversation_goes_on_in_the_template_of_another_model(play, speaker, theirs, monkeypatch):
    tokenizer = theirs("qwen")
    call = '{"name": "add", "arguments": {"a": 1}}'
    script = Script(f"<think>hm</think>\n<tool_call>\n{call}\n</tool_call>", "ok")
    script.stop_ids = tokenizer.stop_ids
    monkeypatch.setattr(module, "stream", script)
    other = speaker._replace(tokenizer=tokenizer, context=1000)
    conversation = talk(other, ["a", "b"], GREEDY, show=lambda text: None)
    assert conversation.messages[1] == assistant("<think>hm</think>") | {"tool_calls": [json.loads(call)]}
    asked = Conversation(conversation.messages[:3])
    assert script.prompts[1] == tokenizer.decode(chat.prompt(asked, tokenizer))
    assert script.prompts[1].count("<|im_start|>assistant") == 2


# ---- what does not fit ----

LONG = Conversation((user("a" * 10), assistant("b" * 20), user("c" * 10), assistant("d"), user("e")))


@pytest.mark.parametrize("head", [(), ({"role": "system", "content": "s"},)])
def test_the_oldest_exchanges_are_dropped_as_few_as_needed_and_the_system_turn_stays(head):
    conversation = LONG._replace(messages=(*head, *LONG.messages))
    for first, dropped in ((0, 0), (2, 2), (4, 4)):
        expected = conversation._replace(messages=(*head, *LONG.messages[first:]))
        room = len(chat.prompt(expected, TOKENIZER))
        assert fitted(conversation, TOKENIZER, room) == (expected, dropped)
        more = fitted(conversation, TOKENIZER, room - 1)[0] if first < 4 else None
        assert more is None or len(more.messages) < len(expected.messages)
    with pytest.raises(
        ValueError, match=rf"a prompt of {room} tokens, and {room - 1} have room beside the answer; ask"
    ):
        fitted(conversation, TOKENIZER, room - 1)


def test_a_full_context_is_told_of_and_the_talk_goes_on(play):
    conversation, shown, prompts = play(["1" * 8, "2", "3"], ["a" * 10, "b" * 10, "c" * 60, "d"], context=40)
    assert "(the context is full: the oldest 2 messages are forgotten)" in shown
    assert "(the question makes a prompt of 64 tokens, and 34 have room" in shown
    assert [prompt.count("<|user|>") for prompt in prompts] == [1, 1, 2] and len(conversation.messages) == 4


def test_an_answer_takes_at_most_half_of_the_context(speaker):
    sizes = [
        Manner(SamplerConfig(), length, 0, context).room(speaker) for length, context in ((6, 0), (500, 0), (500, 9))
    ]
    assert sizes == [(58, 6), (32, 32), (5, 4)]


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (dict(context=1), "context=1 must be at least 2 tokens, or 0 for the run's own"),
        (dict(context=-4), "context=-4 must be at least 2"),
    ],
)
def test_a_manner_that_leaves_no_room_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Manner(SamplerConfig(), **values)


# ---- several runs ----


def test_every_round_is_a_table_of_each_question_beside_each_answer(speaker):
    louder = speaker._replace(params=jax.tree.map(lambda x: -x, speaker.params))
    speakers = {"runs/[a]": speaker, "runs/b": louder}
    rounds = [["One [bold]?", "Two?"], ["Three?"]]
    tables = list(side_by_side(["runs/[a]", "runs/b"], rounds, speakers.get, GREEDY, system="s"))
    assert [table.row_count for table in tables] == [2, 1]
    for table, questions in zip(tables, rounds, strict=True):
        assert [column.header for column in table.columns] == ["question", r"runs/\[a]", "runs/b"]
        cells = [[str(cell) for cell in column.cells] for column in table.columns]
        assert cells[0] == questions
        # What would move the cursor of a terminal is left out.
        answers = [replies(speakers[name], questions, GREEDY, system="s") for name in speakers]
        assert cells[1:] == [list(map(strip_control_codes, column)) for column in answers]
        assert cells[1] != cells[2]
    shown = io.StringIO()
    Console(file=shown, width=200).print(tables[0])
    assert "One [bold]?" in shown.getvalue() and "runs/[a]" in shown.getvalue()


def test_questions_are_the_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("Où?\n\n  \nWhat?", encoding="utf-8")
    assert read_questions(path) == ["Où?", "What?"]
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"questions.txt holds no question: write one on each line"):
        read_questions(path)


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_lines_are_typed_until_the_end_of_the_input_or_an_interrupt(monkeypatch, end):
    def typing(lines):
        yield from lines
        raise end

    keyboard = typing(["a", "", " b "])
    monkeypatch.setattr("builtins.input", lambda _: next(keyboard))
    assert list(typed()) == ["a", "b"]
