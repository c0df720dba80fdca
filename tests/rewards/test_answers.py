import random
import time
from fractions import Fraction

import pytest

from jaxllm.rewards.answers import Number, extracted, number, same_number

# completion -> the answer that it gives
GIVEN = {
    # 1. tags
    "<think>7+8=15</think><answer>85</answer>": "85",
    "<answer>85</answer>": "85",
    "<answer>\n 85 \n</answer> and more words": "85",
    "7+8=15</think><answer>85</answer>": "85",  # the prompt had begun to think
    "<think>the answer is 7 \\boxed{8} #### 9</think><answer>85</answer>": "85",
    "<answer>85</answer> #### 86 \\boxed{87} the answer is 88": "85",
    "<answer>\\boxed{85}</answer>": "85",
    "<answer>\\boxed{85} or \\boxed{86}</answer>": "\\boxed{85} or \\boxed{86}",
    "<answer>\\boxed{85}+{86}</answer>": "\\boxed{85}+{86}",
    "<answer>**85**</answer>": "85",
    "<answer>$85$</answer>": "85",
    "<answer>$85</answer>": "$85",
    "<answer>(1+2)*3</answer>": "(1+2)*3",
    "<answer>New York</answer>": "New York",
    "<answer>1, 2</answer>": "1, 2",
    "<answer></answer>": None,
    "<answer>  </answer>": None,
    "<answer>1</answer><answer>85</answer>": None,
    "<answer>85</answer><answer>85</answer>": None,
    "<answer><answer>85</answer>": None,
    "<answer>85": None,
    "85</answer>": None,
    "</answer>85<answer>": None,
    "<think>so <answer>85</answer></think>": None,
    "<think>so <answer>85</answer>": None,
    "<answer>85</answer><think>sure</think>": None,
    "<answer>85</answer></think>": None,
    "<answer>1</answer><answer>2</answer> #### 85": None,
    # 2. hashes
    "12 eggs\n#### 85": "85",
    "#### 1\n#### 85\nwell": "85",
    "####85": "85",
    "#### 85 apples": "85",
    "#### 85. That is because there are 3 of them": "85",
    "#### 85 86 87": "85 86 87",
    "#### 85. 86": "85. 86",
    "#### 85 or 86": "85 or 86",
    "#### 85 x": "85 x",
    "#### New York\nis a town": "New York",
    "#### St. Louis": "St. Louis",
    "#### 85 \\boxed{86}": "85 \\boxed{86}",
    "####": None,
    "<think>#### 85</think>": None,
    "<think>#### 85": None,
    # 3. boxes
    "so \\boxed{85}.": "85",
    "\\boxed{1} then \\boxed{\\frac{1}{\\sqrt{2}}} is it": "\\frac{1}{\\sqrt{2}}",
    "the answer is \\boxed{85}, not 86": "85",
    "\\boxed{85": None,
    "\\boxed{}": None,
    "\\boxed 85 is it": "\\boxed 85 is it",
    # 4. phrases
    "Hence the answer is 85.": "85",
    "The answer is 1. No, the answer is 85! " + "words " * 80: "85",
    "The final answer: 85": "85",
    "**Answer:** 85\nbecause": "85",
    "answer = 85": "85",
    "The answer is: $85.50.": "$85.50",
    "The answer is 85 apples": "85",
    "The answer is 85, of course": "85",
    "The answer is 85 or 86": "85 or 86",
    "The answer is 3 \\pi": "3 \\pi",
    "The answer is 2 x": "2 x",
    "The answer is not 85": "not 85",
    "The answer isn't 85.\nNo": None,
    "The answer is **85**": "85",
    "The answer is **85**.": "85",
    "The answer is **85** apples.": "85",
    "The answer is *85*.": "85",
    "The final answer is __85__.": "85",
    "**Answer:** **85**": "85",
    "**Answer:**85": "85",
    "**Answer: 85**": "85",
    "**Answer: 85** because": "85",
    "**The answer is 85.**": "85",
    "**The answer is 85**.": "85",
    "**Final Answer**: 85": "85",
    "__Answer:__ **New York**": "New York",
    "***Answer: New York***": "New York",
    "The answer is A*": "A*",
    "The answer is x_1 + y_1": "x_1 + y_1",
    "The answer is (1+2)*3*4": "(1+2)*3*4",
    "The answer is 2 * 3 * 4": "2 * 3 * 4",
    "**Answer:**\n85": "85",
    "The answer is:\n\n85": "85",
    "The answer is 86.\nAnswer:\n**85**\nbecause": "85",
    "The answer is 85.\nAnswer:\n": "85",
    "The answer is Dr. Who. He is a doctor": "Dr. Who",
    "The answer is A. I know": "A",
    # 5. all of it
    "85": "85",
    " 85\n": "85",
    "<think>hm</think> 85": "85",
    "47+38=85": "47+38=85",
    "85\n86": None,
    "": None,
    "</think>": None,
    "<think></think>": None,
}


@pytest.mark.parametrize("completion", GIVEN)
def test_what_a_completion_gives_as_its_answer(completion):
    assert extracted(completion) == GIVEN[completion]


# text -> its value, or (value, of a percentage)
NUMBERS = {
    "42": 42,
    " 42 ": 42,
    "+42": 42,
    "-3": -3,
    "\u22123": -3,  # a real minus sign
    "\u20133": -3,  # a dash
    "1,234": 1234,
    "1,234,567.5": Fraction("1234567.5"),
    "1{,}234": 1234,
    "12\\,345": 12345,
    "$12": 12,
    "\\$12": 12,
    "$ 12.50": Fraction("12.5"),
    "-$12": -12,
    "$-12": -12,
    "12€": 12,
    "$12$": 12,
    "\\(12\\)": 12,
    "**12**": 12,
    '"12"': 12,
    "`12`": 12,
    "\\boxed{12}": 12,
    '"**$12$**"': 12,
    "1/2.": Fraction(1, 2),
    "50%.": (50, True),
    "**$\\boxed{12}$**": 12,
    "0.50": Fraction(1, 2),
    ".5": Fraction(1, 2),
    "3.0": 3,
    "3.": 3,
    "42.": 42,
    "007": 7,
    "1e3": 1000,
    "2.5E-1": Fraction(1, 4),
    "1/2": Fraction(1, 2),
    "1 / 2": Fraction(1, 2),
    "-1/2": Fraction(-1, 2),
    "\\frac{1}{2}": Fraction(1, 2),
    "-\\dfrac{1}{2}": Fraction(-1, 2),
    "50%": (50, True),
    "50 \\%": (50, True),
    "-0.5%": (Fraction(-1, 2), True),
    **dict.fromkeys(
        "1,23 1,2345 12,34,567 ,5 1,234,56 1..2 1.2.3 - + . $ % %% 1/0 1/2/3 1e999 1e 0x10 1_000 --3 +-3 -$-3 42x x42"
        " four ４２ ² ½ NaN inf 1j 4;2 4:2 (42 {42} 42!".split()
    ),
    "1 2": None,
    "1 000": None,
    "1, 2": None,
    "[42]": None,
    "6*7": None,
    "x = 42": None,
    "42 or 43": None,
    "42 apples": None,
    "": None,
    "9" * 65: None,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_however_it_is_written_and_nothing_else_is_one(text):
    value = NUMBERS[text]
    expected = None if value is None else Number(*value) if isinstance(value, tuple) else Number(Fraction(value))
    assert number(text) == expected


@pytest.mark.parametrize(
    "first, second, same",
    [
        ("3.0", "3", True),
        ("1,000", "1e3", True),
        ("0.1", "1/10", True),
        ("0.3333", "1/3", False),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("50%", "0.50%", False),
        ("50%", "50.0%", True),
        ("50%", "5000", False),
        ("0.5", "50", False),
        ("-3", "3", False),
    ],
)
def test_two_numbers_are_the_same_by_value_and_a_percentage_also_by_its_percents(first, second, same):
    assert same_number(number(first), number(second)) is same
    assert same_number(number(second), number(first)) is same


def test_nothing_that_is_said_raises():
    draw = random.Random(0)
    pieces = (
        "<think> </think> <answer> </answer> #### \\boxed{ } { answer is : = 1 , . 42 - $ % / e ** \n \\frac".split(" ")
    )
    for _ in range(800):
        completion = "".join(draw.choices([*pieces, " ", "\ud800"], k=draw.randrange(12)))
        answer = extracted(completion)
        assert answer is None or answer == answer.strip() != ""
        number(answer or completion)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            " ",
            "(",
            "{",
            "$",
            "**",
            "\\boxed{",
            "<answer>",
            "</answer>",
            "<think>",
            "####",
            "answer is ",
            "\n",
            "1,",
            "1",
        ),
        *("*", "_ ", " *a", " **a *b", "answer:\n"),
    ],
)
def test_long_texts_take_no_longer_than_their_length(piece):
    began = time.perf_counter()
    for end in ("", "\n", "x", "}"):
        extracted("answer is" + piece * 20_000 + end)
        extracted("#### 1" + piece * 20_000 + end)
        number(piece * 20_000 + end)
    assert time.perf_counter() - began < 2
