"""What a model may call between its turns: a definition that the prompt shows, and a function of the arguments.

A tool never raises: what it cannot do it says, for the model to read.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from jaxllm.data.tasks import Problem
from jaxllm.rewards import arithmetic
from jaxllm.text.special_tokens import ANSWER, END_ANSWER, END_THINK, THINK

DIGITS = 12  # that are given of a fraction without an end
_OPERATIONS = {
    **arithmetic.FOUR,
    ast.Pow: arithmetic.power,
    ast.UAdd: operator.add,
    ast.USub: operator.sub,
}


class Tool(NamedTuple):
    """definition: "name", "description" and, as a JSON schema, "parameters". call: arguments to what the tool says."""

    definition: dict[str, Any]
    call: Callable[[Mapping[str, Any]], str]


def calculator(arguments: Mapping[str, Any]) -> str:
    """What {"expression": ...} comes to: whole, as a decimal fraction, or with ``DIGITS`` digits. "error: ..." where it
    is no sum of numbers, divides by zero or grows too large.
    """
    if set(arguments) != {"expression"} or not isinstance(arguments["expression"], str):
        return "error: give {'expression': text}"
    try:
        return _written(arithmetic.value(arithmetic.parsed(arguments["expression"]), _OPERATIONS))
    except ValueError as error:
        return f"error: {error}"


TOOLS: dict[str, Tool] = {
    "calculator": Tool(
        {
            "name": "calculator",
            "description": "Works out + - * / ** ( ) of numbers.",
            "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
        },
        calculator,
    ),
}


def demonstration(problem: Problem, tool: str = "calculator") -> dict[str, Any]:
    """{"messages": [...], "tools": [...]}: the problem answered with a call of the tool.

    Raises ``ValueError`` for a problem whose record has no "expression" to call it with.
    """
    if "expression" not in problem.record:
        raise ValueError(f"a problem of {problem.record['task']!r} has no 'expression' to call {tool!r} with")
    arguments = {"expression": problem.record["expression"]}
    asks = {"role": "assistant", "content": "", "tool_calls": [{"name": tool, "arguments": arguments}]}
    said = TOOLS[tool].call(arguments)
    says = {"role": "assistant", "content": f"{THINK}{said}{END_THINK}{ANSWER}{said}{END_ANSWER}"}
    messages = [*problem.prompt.messages, asks, {"role": "tool", "content": said}, says]
    return {"messages": messages, "tools": [TOOLS[tool].definition]}


def _written(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.{DIGITS}g}"
