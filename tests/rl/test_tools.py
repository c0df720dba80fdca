import json
import random

import pytest

from jaxllm.data import conversations, tasks
from jaxllm.rewards import verifiers
from jaxllm.rl.tools import TOOLS, calculator, demonstration
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import byte_tokenizer


@pytest.mark.parametrize(
    "expression, said",
    [
        ("47+38", "85"),
        ("(1+2)*3-4", "5"),
        ("-3 + 1", "-2"),
        ("+3", "3"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("7/2", "3.5"),
        ("1/3", "0.333333333333"),
        ("-2/3", "-0.666666666667"),
        ("0.1+0.2", "0.3"),
        ("10/5", "2"),
        ("6\u00d77", "42"),
        ("10**20", "100000000000000000000"),
        ("10**60/7", "1.42857142857e+59"),
    ],
)
def test_the_calculator_works_out_sums(expression, said):
    assert calculator({"expression": expression}) == said


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"expression": "1/0"}, "error: division by zero"),
        ({"expression": "0**-1"}, "error: division by zero"),
        ({"expression": "9**9**9"}, "error: the result is too large"),
        ({"expression": "9" * 90}, "error: the result is too large"),
        ({"expression": "2**0.5"}, "error: exponent 1/2 is not whole"),
        ({"expression": "1+" * 200}, "error: 400 characters are more than 200"),
        ({"expression": "__import__('os').getcwd()"}, "error: only numbers"),
        ({"expression": "1e9"}, "error: only numbers"),
        ({"expression": "1+"}, "error: not a sum"),
        ({"expression": ""}, "error: not a sum"),
        ({"expression": "7//2"}, "error: FloorDiv is not among the operations"),
        ({"expression": "(" * 150}, "error: not a sum"),
        ({"expression": "-" * 198 + "1"}, "1"),
        ({"expression": 3}, "error: give {'expression': text}"),
        ({}, "error: give"),
        ({"expression": "1", "more": 2}, "error: give"),
        ({"expression": ["1"]}, "error: give"),
    ],
)
def test_what_the_calculator_cannot_do_it_says(arguments, said):
    assert calculator(arguments).startswith(said)


def test_no_text_makes_the_calculator_raise():
    draw = random.Random(0)
    for _ in range(500):
        expression = "".join(draw.choices("0123456789.+-*/() e_\ud800\0x", k=draw.randrange(30)))
        assert isinstance(calculator({"expression": expression}), str)


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_s_definition_fits_its_call_and_the_template(name):
    tool = TOOLS[name]
    assert tool.definition["name"] == name and json.loads(json.dumps(tool.definition)) == tool.definition
    assert tool.definition["parameters"]["properties"].keys() == {"expression"}
    assert tool.call({"expression": "1+1"}) == "2"


@pytest.mark.parametrize("task", ["addition", "subtraction", "multiplication", "sums"])
def test_a_demonstration_calls_the_tool_and_answers_with_what_it_says(task):
    tokenizer, draw = byte_tokenizer(), random.Random(0)
    for _ in range(10):
        problem = tasks.drawn(task, 2, draw)
        record = json.loads(json.dumps(demonstration(problem)))
        talk = conversations.conversation(record, conversations.detected(record))
        _, asks, tool, says = talk.messages
        assert talk.tools == (TOOLS["calculator"].definition,)
        assert tool == {"role": "tool", "content": problem.record["answer"]}
        assert verifiers.numeric(problem.prompt, says["content"], problem.record)["score"] == 1
        assert verifiers.format(problem.prompt, says["content"], {}) == 1
        # A model that says these ids has made this call.
        start = len(chat.prompt(Conversation(talk.messages[:1], talk.tools), tokenizer))
        (rendered,) = chat.render([talk], tokenizer)
        (call,) = chat.parse(rendered.tokens[start:], tokenizer)["tool_calls"]
        assert call == asks["tool_calls"][0] and TOOLS[call["name"]].call(call["arguments"]) == tool["content"]


def test_a_problem_without_an_expression_is_not_for_a_tool():
    with pytest.raises(ValueError, match="a problem of 'logic' has no 'expression' to call 'calculator' with"):
        demonstration(tasks.drawn("logic", 1, random.Random(0)))
