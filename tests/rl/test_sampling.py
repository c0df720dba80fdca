import json
from collections import deque

import jax
import numpy as np
import pytest

from jaxllm.generate import Completion, SamplerConfig
from jaxllm.rl import sampling
from jaxllm.rl.sampling import Limits, sampled
from jaxllm.rl.tools import TOOLS
from jaxllm.text import chat
from jaxllm.text.special_tokens import END_ID, IDS, TOOL_CALL
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CALL = '{"name": "calculator", "arguments": {"expression": "6*7"}}'


def ids(text, *, call=""):
    spelled = TOKENIZER.encode(text)
    return [*spelled, *([IDS[TOOL_CALL], *TOKENIZER.encode(call)] if call else []), END_ID]


@pytest.fixture
def said(monkeypatch):
    """A function: what a model says to each prompt in turn -> the requests that were made of it."""

    def speak(*turns):
        requests, left = [], list(turns)

        def completions(model, params, queue, key, *, slots, length, sampler, stop_ids):
            assert isinstance(queue, deque)
            while queue:
                request = queue.popleft()
                requests.append(request)
                assert len(request.prompt) + request.max_new_tokens <= length
                tokens = np.array(left.pop(0), np.int32)[: request.max_new_tokens]
                logp = -np.arange(1, len(tokens) + 1, dtype=np.float32)
                yield Completion(request.number, tokens, logp, tokens[-1] in stop_ids)

        monkeypatch.setattr(sampling, "completions", completions)
        return requests

    return speak


def ask(prompts, *, turns, new=200, tools=TOOLS):
    how = dict(slots=0, sampler=SamplerConfig(), tools=tools)
    limits = Limits(prompt=max(map(len, prompts)), new=new, turns=turns)
    return dict(sampled(None, None, TOKENIZER, prompts, jax.random.key(0), limits=limits, **how))


def test_the_trainer_gets_the_very_ids_that_were_sampled_even_ones_that_no_text_gives(said):
    # These bytes are no text: what decoding makes of them is encoded as other ids.
    strange = [*TOKENIZER.encode("a"), 255, 260, END_ID]
    assert TOKENIZER.encode(TOKENIZER.decode(strange)) != strange
    said(strange, [40, 41])
    found = ask([[2, 7], [2, 8]], turns=1)
    assert found[0].sample.tokens.tolist() == strange and found[0].sample.prompt == (2, 7)
    assert found[0].ended and not found[1].ended and found[0].sample.sampled.all()
    assert found[1].sample.tokens.tolist() == [40, 41] and found[1].sample.logp.tolist() == [-1, -2]


def test_a_tool_answers_in_the_same_sample_and_its_words_are_not_learned(said):
    prompt = chat.prompt(chat.Conversation(({"role": "user", "content": "6*7=?"},)), TOKENIZER)
    first, last = ids("Let me see.", call=CALL), ids("It is 42.")
    requests = said(first, last)
    found = ask([prompt], turns=2)[0]
    tokens, mask = found.sample.tokens.tolist(), found.sample.sampled
    assert tokens[: len(first)] == first and tokens[-len(last) :] == last
    between = tokens[len(first) : -len(last)]
    answer = chat.prompt(chat.Conversation(({"role": "tool", "content": "42"},)), TOKENIZER)[1:]
    assert between == answer
    assert mask.tolist() == [True] * len(first) + [False] * len(between) + [True] * len(last)
    assert np.all(found.sample.logp[~mask] == 0) and np.all(found.sample.logp[mask] < 0)
    assert found.text == "It is 42." and found.ended
    # What the model is asked to go on from is exactly what is learned from; and so training would render it.
    assert [*requests[1].prompt] == [*prompt, *first, *between]
    call = {"name": "calculator", "arguments": {"expression": "6*7"}}
    messages = (
        {"role": "user", "content": "6*7=?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    )
    rendered = chat.render([chat.Conversation(messages)], TOKENIZER)[0]
    assert rendered.tokens.tolist() == [*prompt, *tokens]
    roles = IDS["<|tool|>"], IDS["<|assistant|>"]
    own = [place for place, token in enumerate(tokens) if rendered.supervised[len(prompt) + place]]
    assert own == np.flatnonzero(mask).tolist() and not set(roles) & {tokens[place] for place in own}


@pytest.mark.parametrize(
    "limits", [dict(turns=1), dict(turns=2, tools={}), dict(turns=2, new=len(ids("", call=CALL)) + 3)]
)
def test_without_turns_tools_or_room_left_a_call_ends_the_sample(said, limits):
    requests = said(ids("", call=CALL))
    found = ask([[2, 7]], **limits)[0]
    assert len(requests) == 1 and found.sample.tokens.tolist() == ids("", call=CALL)


def test_a_tool_that_is_not_there_says_so(said):
    other = CALL.replace("calculator", "oracle")
    said(ids("", call=other), ids("Well."))
    found = ask([[2, 7]], turns=2)[0]
    assert "there is no tool 'oracle'" in TOKENIZER.decode(found.sample.tokens.tolist())


def test_a_tool_answers_as_the_template_of_another_model_has_it(said, theirs):
    tokenizer = theirs("qwen")
    question = {"role": "user", "content": "6*7=?"}
    prompt = chat.prompt(chat.Conversation((question,)), tokenizer)
    first = [*tokenizer.encode(f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>"), tokenizer.end_id]
    last = [*tokenizer.encode("It is 42."), tokenizer.end_id]
    requests = said(first, last)
    how = dict(slots=0, sampler=SamplerConfig(), tools=TOOLS, limits=Limits(prompt=len(prompt), new=300, turns=2))
    found = dict(sampled(None, None, tokenizer, [prompt], jax.random.key(0), **how))[0]
    messages = (
        question,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [json.loads(CALL)]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    )
    rendered = chat.render([chat.Conversation(messages)], tokenizer)[0].trimmed()
    assert [*prompt, *found.sample.tokens] == rendered.tokens.tolist()
    assert found.sample.sampled.tolist() == rendered.supervised[len(prompt) :].tolist()
    assert (found.text, found.ended) == ("It is 42.", True)
    assert [*requests[1].prompt] == [*prompt, *found.sample.tokens[: -len(last)]]


def test_another_end_of_a_turn_than_the_templates_calls_no_tool(said, theirs):
    tokenizer = theirs("qwen")
    other = tokenizer.stop_ids[1]
    said([*tokenizer.encode(f"<tool_call>\n{CALL}\n</tool_call>"), other])
    how = dict(slots=0, sampler=SamplerConfig(), tools=TOOLS, limits=Limits(prompt=2, new=300, turns=2))
    found = dict(sampled(None, None, tokenizer, [[2, 7]], jax.random.key(0), **how))[0]
    assert found.ended and found.sample.tokens[-1] == other and found.sample.sampled.all()
