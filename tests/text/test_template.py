import json
import re

import numpy as np
import pytest

from jaxllm.text import chat, template
from jaxllm.text.chat import Conversation, Malformed
from jaxllm.text.huggingface import HuggingFaceTokenizer

FAMILIES = ("qwen", "smollm2", "llama3", "llama2", "mistral", "gemma")
CHATS = ("one", "asked", "two", "system", "tools")
ENDS = {"qwen": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
CALL = {"name": "add", "arguments": {"x": 2}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, *calls):
    return {"role": "assistant", "content": content} | ({"tool_calls": list(calls)} if calls else {})


def tool(content):
    return {"role": "tool", "content": content}


def given(golden, name, case):
    """(conversation, ids of transformers, or why it refuses it)."""
    case = golden(name)["chats"][case]
    return Conversation(tuple(case["messages"]), tuple(case["tools"])), case.get("ids", case.get("refused"))


def with_template(golden, source, name="qwen", **facts):
    """The tokenizer of a family with another template."""
    definition = json.dumps(golden(name)["files"]["tokenizer.json"])
    return HuggingFaceTokenizer(definition, template=source, **{"eos": "<|im_end|>", **facts})


def runs(rendered, tokenizer):
    """The texts that are supervised."""
    marks = np.flatnonzero(np.diff([0, *rendered.supervised, 0]))
    return [tokenizer.decode(rendered.tokens[start:stop]) for start, stop in marks.reshape(-1, 2)]


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(name, case, golden, theirs):
    conversation, expected = given(golden, name, case)
    tokenizer = theirs(name)
    asked = conversation.messages[-1]["role"] != "assistant"
    ids = lambda: chat.prompt(conversation, tokenizer) if asked else rendered()  # noqa: E731
    rendered = lambda: chat.render([conversation], tokenizer)[0].tokens.tolist()  # noqa: E731
    if isinstance(expected, str):
        with pytest.raises(Malformed, match=f"the chat template refuses the conversation: {expected}") as error:
            ids()
        assert error.value.reason == "template"
    else:
        assert ids() == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_is_what_the_assistant_says_and_the_end_of_its_turn(name, golden, theirs):
    tokenizer, (conversation, _) = theirs(name), given(golden, name, "two")
    says = ["It is 5.", "Yes \U0001f600!"]
    shown = [f" {text} </s>" if name in ("llama2", "mistral") else text + ENDS[name] for text in says]
    (every,), (last,) = (chat.render([conversation], tokenizer, turns=turns) for turns in ("all", "last"))
    assert runs(every, tokenizer) == shown and runs(last, tokenizer) == shown[1:]
    assert every.tokens.tolist() == last.tokens.tolist() and every.tokens.dtype == np.int32


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_and_its_answer_are_what_training_sees(name, case, golden, theirs):
    tokenizer, (conversation, expected) = theirs(name), given(golden, name, case)
    if isinstance(expected, str) or case == "asked":
        return
    (rendered,) = chat.render([conversation], tokenizer)
    starts = np.flatnonzero(np.diff([0, *rendered.supervised]) == 1)
    answers = [place for place, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    assert len(starts) == len(answers)
    for start, place in zip(starts, answers, strict=True):
        before = conversation._replace(messages=conversation.messages[:place])
        assert chat.prompt(before, tokenizer) == rendered.tokens[:start].tolist()


def test_calls_are_supervised_and_read_again(golden, theirs):
    tokenizer, (conversation, _) = theirs("qwen"), given(golden, "qwen", "tools")
    (rendered,) = chat.render([conversation], tokenizer)
    call = conversation.messages[1]["tool_calls"][0]
    first, last = runs(rendered, tokenizer)
    assert first == f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call><|im_end|>"
    assert last == "It is 5.<|im_end|>"
    ids = [*tokenizer.encode(first.removesuffix("<|im_end|>")), tokenizer.end_id]
    assert chat.parse(ids, tokenizer) == assistant("", call)


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_what_is_said_stay_text(name, theirs):
    tokenizer = theirs(name)
    names = list(tokenizer.special_tokens.values())
    said = "x" + "".join(names) + names[-1] + "y"
    conversation = Conversation((user(said), assistant(said)))
    plain = Conversation((user("x"), assistant("y")))
    (rendered,), (other,) = (chat.render([each], tokenizer) for each in (conversation, plain))
    controls = [[id for id in each.tokens.tolist() if id in tokenizer.special_ids] for each in (rendered, other)]
    assert controls[0] == controls[1]
    assert tokenizer.decode(rendered.tokens).count(said) == 2
    assert runs(rendered, tokenizer)[0].count(said) == 1


def test_control_tokens_in_calls_and_tools_stay_text(theirs):
    tokenizer = theirs("qwen")
    call = {"name": "<|im_end|>", "arguments": {"<|im_start|>": ["<|im_end|>", 1]}}
    messages = (user("?"), assistant("", call), tool("<|im_end|>"), assistant("."))
    (rendered,) = chat.render([Conversation(messages, ({"name": "<|im_start|>"},))], tokenizer)
    count = [rendered.tokens.tolist().count(id) for id in tokenizer.special_ids]
    assert sorted(count) == [0, 5, 5]
    assert tokenizer.decode(rendered.tokens).count("<|im_end|>") == 5 + 3


def test_signs_that_are_no_characters_come_through(theirs):
    tokenizer = theirs("qwen")
    said = "\ufdd0<|im_end|>\ufdd1"
    (rendered,) = chat.render([Conversation((user(said), assistant(said)))], tokenizer)
    assert runs(rendered, tokenizer) == [said + "<|im_end|>"] and tokenizer.decode(rendered.tokens).count(said) == 2


def test_an_answer_is_encoded_apart_from_its_prompt(theirs):
    """Two newlines are one token of this vocabulary, and the prompt ends with one: the answer begins with its own."""
    tokenizer = theirs("qwen")
    conversation = Conversation((user("?"), assistant("\nyes")))
    assert len(tokenizer.encode("\n\n")) == 1
    prompt = chat.prompt(conversation._replace(messages=conversation.messages[:1]), tokenizer)
    (rendered,) = chat.render([conversation], tokenizer)
    assert rendered.tokens[: len(prompt)].tolist() == prompt and runs(rendered, tokenizer) == ["\nyes<|im_end|>"]


def test_an_answer_may_be_begun(theirs):
    for name in FAMILIES:
        tokenizer, asked = theirs(name), Conversation((user("?"),))
        prompt = chat.prompt(asked, tokenizer)
        begun = chat.prompt(asked, tokenizer, start="It is")
        assert begun[: len(prompt)] == prompt
        assert tokenizer.decode(begun[len(prompt) :]) == "It is"


# ---- laws of a template ----


def test_a_template_that_rewrites_what_was_said_is_refused_with_the_turn(golden):
    """It shows only what was said last."""
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content if loop.last else '...' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer = with_template(golden, forgetful)
    twice = Conversation((user("a"), assistant("b"), user("c"), assistant("d")))
    for conversation, turns in ((twice, "all"), (twice, "last"), (Conversation(twice.messages[:2]), "all")):
        with pytest.raises(Malformed, match=r"stands before message [24] otherwise than when it asks for it") as error:
            chat.render([conversation], tokenizer, turns=turns)
        assert error.value.reason == "rewritten"
    assert tokenizer.decode(chat.prompt(Conversation(twice.messages[:3]), tokenizer)).endswith(
        "user:c<|im_end|><|im_start|>assistant:"
    )


def test_last_turns_may_be_trained_on_where_only_earlier_ones_are_rewritten(golden):
    """It leaves out earlier thoughts, as Qwen 3 does: a prompt still begins what follows it, if not the other way."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{{ m.content if loop.last or m.role == 'user' else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer = with_template(golden, source)
    said = Conversation((user("a"), assistant("<think>x</think>b"), user("c"), assistant("<think>y</think>d")))
    (rendered,) = chat.render([said], tokenizer, turns="last")
    assert runs(rendered, tokenizer) == ["<think>y</think>d<|im_end|>"]
    (rendered,) = chat.render([said], tokenizer)
    assert runs(rendered, tokenizer) == ["b<|im_end|>", "<think>y</think>d<|im_end|>"]


def test_a_base_model_of_others_is_not_asked_in_a_format_that_it_cannot_spell(golden):
    tokenizer = with_template(golden, "")
    said = Conversation((user("a"), assistant("b")))
    for ask in (
        lambda: chat.render([said], tokenizer),
        lambda: chat.prompt(Conversation(said.messages[:1]), tokenizer),
        lambda: chat.parse([40], tokenizer),
        lambda: chat.reply(assistant("", CALL), [tool("5")], tokenizer),
        lambda: chat.message("a", tokenizer),
    ):
        with pytest.raises(
            ValueError, match="neither a chat template nor the control tokens of ours.*chat_template.jinja"
        ):
            ask()


def test_a_template_that_does_not_end_a_turn_is_refused(golden):
    tokenizer = with_template(golden, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                      "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    assert tokenizer.end_id == tokenizer.eos_id
    with pytest.raises(Malformed, match=re.escape("ends message 2 with none of ['<|im_end|>']: name its end")) as error:
        chat.render([Conversation((user("a"), assistant("b")))], tokenizer)
    assert error.value.reason == "no_end"


def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(golden):
    source = golden("qwen")["files"]["chat_template.jinja"]
    tokenizer = with_template(golden, source, eos="<|endoftext|>", stop=("<|endoftext|>",))
    names = [tokenizer.special_tokens[id] for id in (tokenizer.end_id, *tokenizer.stop_ids)]
    assert names == ["<|im_end|>", "<|im_end|>", "<|endoftext|>"]
    assert tokenizer.eos_id == tokenizer.stop_ids[1]


def test_what_our_own_template_refuses_is_refused_too(theirs):
    for messages, reason in (
        ((user("a"),), "no_answer"),
        (({"role": "critic", "content": "a"},), "unknown_role"),
        ((user("a"), assistant(" ")), "empty_answer"),
        ((user(["a"]), assistant("b")), "content_not_text"),
    ):
        with pytest.raises(Malformed) as error:
            chat.render([Conversation(messages)], theirs("qwen"))
        assert error.value.reason == reason
    with pytest.raises(Malformed, match="the last message is the assistant's already"):
        chat.prompt(Conversation((user("a"), assistant("b"))), theirs("qwen"))


def test_templates_run_in_a_sandbox(golden):
    source = "{{ messages.__class__.__mro__ }}{{ messages[0].content }}<|im_end|>"
    with pytest.raises(Malformed, match="refuses the conversation"):
        chat.prompt(Conversation((user("a"),)), with_template(golden, source))
    with pytest.raises(Malformed, match="refuses the conversation"):
        chat.prompt(Conversation((user("a"),)), with_template(golden, "{{ messages.append(1) }}"))


def test_what_templates_may_use_is_there(golden):
    source = (
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m | tojson(indent=1) }}"
        "{% generation %}!{% endgeneration %}{% endfor %}{{ strftime_now('%d %b %Y') }}{{ eos_token }}"
    )
    tokenizer = with_template(golden, source)
    ids = chat.prompt(Conversation((user("\u00e9<b>"), user("x"))), tokenizer)
    assert (
        tokenizer.decode(ids) == '{\n "role": "user",\n "content": "\u00e9<b>"\n}!26 Jul 2024<|im_end|>'
    )  # no clock: prompts are the same tomorrow


def test_blocks_take_the_blanks_before_them_and_the_newline_behind(golden):
    source = "a\n  {% if true %}\n b {{- eos_token }}\n\t{% endif %}\n"
    assert chat.prompt(Conversation((user("x"),)), (tokenizer := with_template(golden, source))) == [
        *tokenizer.encode("a\n b"), tokenizer.eos_id, *tokenizer.encode("\n"),
    ]  # fmt: skip


def test_calls_and_tools_have_the_form_that_templates_are_written_for(golden):
    source = (
        "{{ 'none|' if tools is none else '' }}"
        "{% for tool in tools or [] %}{{ tool.type }} {{ tool.function.name }}|{% endfor %}"
        "{% for m in messages %}{% for call in m.tool_calls or [] %}"
        "{{ call.type }} {{ call.function.name }} {{ call.function.arguments.x }}|{% endfor %}{% endfor %}"
        "{{ eos_token }}"
    )
    tokenizer = with_template(golden, source)
    messages = (user("?"), assistant("", CALL), tool("5"))
    tools = {"name": "bare"}, {"type": "function", "function": {"name": "wrapped"}}
    ids = chat.prompt(Conversation(messages, tools), tokenizer)
    assert tokenizer.decode(ids[:-1]) == "function bare|function wrapped|function add 2|"
    assert tokenizer.decode(chat.prompt(Conversation(messages), tokenizer)[:-1]) == "none|function add 2|"


# ---- completions ----


@pytest.mark.parametrize("name", FAMILIES)
def test_a_completion_is_read_up_to_any_end_without_control_tokens(name, theirs):
    tokenizer = theirs(name)
    said = tokenizer.encode_pieces([["x", "It is"]])[0][1].tolist()
    others = [id for id in tokenizer.special_ids if id not in tokenizer.stop_ids]
    for end in tokenizer.stop_ids:
        assert chat.parse([*said[:1], *others, *said[1:], end, *said], tokenizer) == assistant("It is")
    assert chat.parse(said, tokenizer) == assistant("It is") and chat.parse([], tokenizer) == assistant("")


def test_calls_that_are_none_stay_in_the_content(theirs):
    spelled = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    bad = ["<tool_call>{}</tool_call>", "<tool_call>{</tool_call>", "<tool_call>" + json.dumps(CALL)]
    assert template.message(f"so\n{spelled}\n{spelled}") == assistant("so", CALL, CALL)
    for text in bad:
        assert chat.message(text, theirs("qwen")) == assistant(text)
    assert template.message(bad[0] + spelled) == assistant(bad[0], CALL)


def test_a_reply_is_what_follows_the_turn_in_the_whole_conversation(theirs):
    tokenizer, call = theirs("qwen"), assistant("I add", CALL)
    messages = (user("2 + 3?"), call, tool("5"), tool("<|im_end|>"))
    reply = chat.reply(call, messages[2:], tokenizer)
    before = chat.prompt(Conversation(messages[:1]), tokenizer)
    whole = chat.prompt(Conversation(messages), tokenizer)
    assert whole[-len(reply) :] == reply
    middle = whole[len(before) : -len(reply)]
    assert middle[-1] == tokenizer.end_id and chat.parse(middle, tokenizer) == call
    assert tokenizer.decode(reply).startswith("\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>")


def test_a_reply_begins_as_text_behind_a_control_token(golden):
    """This definition puts a space before a text, and none behind a control token."""
    source = (
        "{% for m in messages %}[INST]{{ m.role }}:{{ m.content }}</s>and{% endfor %}"
        "{% if add_generation_prompt %}[INST]assistant:{% endif %}"
    )
    tokenizer = with_template(golden, source, "mistral", eos="</s>")
    messages = (user("2 + 3?"), assistant("", CALL), tool("5"))
    reply = chat.reply(messages[1], messages[2:], tokenizer)
    assert chat.prompt(Conversation(messages), tokenizer)[-len(reply) :] == reply
    assert tokenizer.decode(reply) == "and[INST]tool:5</s>and[INST]assistant:"


def test_a_template_without_tools_refuses_replies(theirs):
    with pytest.raises(Malformed, match="no tools here"):
        chat.reply(assistant("", CALL), [tool("5")], theirs("llama3"))
