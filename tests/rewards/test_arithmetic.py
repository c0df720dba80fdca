import ast
import operator
from fractions import Fraction

import pytest

from jaxllm.rewards.arithmetic import FOUR, LARGEST, numbers, parsed, power, value

WHOLE = {**FOUR, ast.Pow: power, ast.USub: operator.sub, ast.UAdd: operator.add}


@pytest.mark.parametrize(
    "text, right",
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("8-4-1", 3),
        ("1/3", Fraction(1, 3)),
        ("12/4/3", 1),
        (" 2 * 3.5 ", 7),
        ("0.1+0.2", Fraction(3, 10)),
        ("2\u00d73\u22121", 5),  # signs as a printer has them
        ("6\u00f72\u00b73", 9),
    ],
)
def test_a_sum_comes_to_its_exact_value(text, right):
    assert value(parsed(text)) == right
    assert numbers(parsed("(1+22)*1-3.5")) and sorted(numbers(parsed("(1+22)*1-3.5"))) == [1, 1, Fraction(7, 2), 22]


@pytest.mark.parametrize(
    "text",
    ["", "1+", "1 2", "(1", "1)", "()", "(1,2)", "1(2)", "...", "x", "1e5", "1j", "0x10", "1_000", "007", "1==1", "[1]",
     "__import__('os')", "1;2", "1\n2", "1if 1else 2", "(" * 150, "1+" * 101 + "1", "-1", "+1", "2**3",
     "7//2", "1/0", "1/(2-2)", "9" * 100],
)  # fmt: skip
def test_what_is_no_sum_of_the_four_kinds_is_a_value_error(text):
    with pytest.raises(ValueError):
        value(parsed(text))


def test_other_operations_can_be_asked_for():
    assert value(parsed("-2**2"), WHOLE) == -4 and value(parsed("(-2)**2"), WHOLE) == 4
    assert value(parsed("+2**-1"), WHOLE) == Fraction(1, 2)


@pytest.mark.parametrize("text", ["9**9**9", "2**257", "2**(1/2)", "9**200", "0**-1", "10**70*10**70", "(1/10)**300"])
def test_nothing_grows_without_bound(text):
    with pytest.raises(ValueError, match="too large|not whole|division by zero"):
        value(parsed(text), WHOLE)
    assert value(parsed(f"2**{LARGEST - 1}"), WHOLE) == 2 ** (LARGEST - 1)
