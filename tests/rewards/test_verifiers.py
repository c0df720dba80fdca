import random
import sys
import types

import pytest

from jaxllm.rewards import verifiers
from jaxllm.rewards.verifiers import (
    CHECKERS,
    RULES,
    accuracy,
    bandit,
    countdown,
    ended,
    exact,
    length,
    math,
    numeric,
    overlong,
)
from jaxllm.rewards.verifiers import format as formatted
from jaxllm.text.chat import Conversation

PROMPT = Conversation(({"role": "user", "content": "6*7=?"},))
RIGHT, WRONG, UNPARSED = (1, 0), (0, 0), (0, 1)  # score, unparsed
FORTY_TWO = {"answer": "42"}


def scored(rule, completion, record):
    given = rule(PROMPT, completion, record)
    assert set(given) == {"score", "unparsed"}
    return given["score"], given["unparsed"]


# What pays where 42 is right, and what does not.
TABLE = {
    "<think>6*7</think><answer>42</answer>": RIGHT,
    "<answer>42</answer>": RIGHT,
    "<answer>42</answer>" + " and so on" * 40: RIGHT,
    "The answer is 42. " + "It took me long. " * 24: RIGHT,
    "#### 42\n" + "x" * 400: RIGHT,
    "#### 42. " + "And that is 7 times 6. " * 20: RIGHT,
    "\\boxed{42} " + "y" * 400: RIGHT,
    "so \\boxed{\\text{nothing}} but \\boxed{\\boxed{42}}": RIGHT,
    "so \\boxed{42}": RIGHT,
    "\\boxed{\\frac{84}{2}}": RIGHT,
    "<answer>\\boxed{42}</answer>": RIGHT,
    "<answer>$42</answer>": RIGHT,
    "<answer>$42$</answer>": RIGHT,
    "<answer>+42</answer>": RIGHT,
    "<answer>42.0</answer>": RIGHT,
    "<answer>42.</answer>": RIGHT,
    "<answer>84/2</answer>": RIGHT,
    "<answer>4.2e1</answer>": RIGHT,
    "<answer>**42**</answer>": RIGHT,
    "42": RIGHT,
    "<answer>1420</answer>": WRONG,
    "<answer>142</answer>": WRONG,
    "<answer>420</answer>": WRONG,
    "1420": WRONG,
    "the answer is 1420": WRONG,
    "<answer>-42</answer>": WRONG,
    "<answer>4,200</answer>": WRONG,
    "<answer>4.2</answer>": WRONG,
    "<answer>0.42</answer>": WRONG,
    "<answer>42.000001</answer>": WRONG,
    "<think>42</think><answer>41</answer>": WRONG,
    "#### 42\n#### 41": WRONG,
    "\\boxed{42} or rather \\boxed{41}": WRONG,
    "the answer is 42. No: the answer is 41": WRONG,
    "<answer>42</answer><answer>42</answer>": UNPARSED,
    "<answer>41</answer><answer>42</answer>": UNPARSED,
    "<answer>41, 42</answer>": UNPARSED,
    "<answer>41 42 43</answer>": UNPARSED,
    "<answer>41 or 42</answer>": UNPARSED,
    "<answer>[42]</answer>": UNPARSED,
    "<answer>{41, 42}</answer>": UNPARSED,
    "<answer>41;42</answer>": UNPARSED,
    "#### 41 42": UNPARSED,
    "\\boxed{41, 42}": UNPARSED,
    "the answer is 41 or 42": UNPARSED,
    "<answer>6*7</answer>": UNPARSED,
    "<answer>6*7=42</answer>": UNPARSED,
    "<answer>forty-two</answer>": UNPARSED,
    "<answer>x</answer>": UNPARSED,
    "<answer></answer>": UNPARSED,
    "<answer>42": UNPARSED,
    "42</answer>": UNPARSED,
    "</answer>42<answer>": UNPARSED,
    "<answer><answer>42</answer></answer>": UNPARSED,
    "<think></think>": UNPARSED,
    "<think>42</think>": UNPARSED,
    "<think>42": UNPARSED,
    "<think>so <answer>42</answer>": UNPARSED,
    "<think>so <answer>42</answer></think>": UNPARSED,
    "<think></think><think></think>": UNPARSED,
    "41\n42\n43": UNPARSED,
    " ".join(map(str, range(100))): UNPARSED,
    "": UNPARSED,
    "\\boxed{" * 100 + "42": UNPARSED,
    "9" * 5000: UNPARSED,
    "<answer>1e999999</answer>": UNPARSED,
    "\ud800": UNPARSED,
}


@pytest.mark.parametrize("completion", TABLE)
def test_what_pays_and_what_does_not(completion):
    assert scored(numeric, completion, FORTY_TWO) == TABLE[completion]
    assert scored(accuracy, completion, FORTY_TWO) == TABLE[completion]


@pytest.mark.parametrize(
    "reference", ["42", "$42.00", "so 6*7 = <<6*7=42>>42\n#### 42", "it is \\boxed{42}.", 42, 42.0]
)
def test_the_reference_is_read_as_an_answer_is(reference):
    assert scored(numeric, "<answer>42</answer>", {"answer": reference}) == RIGHT
    assert scored(accuracy, "<answer>42</answer>", {"answer": reference}) == RIGHT
    assert scored(numeric, "<answer>7</answer>", {"answer": reference}) == WRONG


@pytest.mark.parametrize(
    "completion, reference, right",
    [
        ("<answer>1,234</answer>", "1234", RIGHT),
        ("<answer>1234</answer>", "1,234", RIGHT),
        ("<answer>-3</answer>", "-3", RIGHT),
        ("<answer>0.50</answer>", "1/2", RIGHT),
        ("<answer>50%</answer>", "50", RIGHT),
        ("<answer>0.5</answer>", "50%", RIGHT),
        ("<answer>0.5</answer>", "50", WRONG),
    ],
)
def test_numbers_are_compared_by_value(completion, reference, right):
    assert scored(numeric, completion, {"answer": reference}) == right


@pytest.mark.parametrize(
    "completion, right",
    [
        ("<answer>New York</answer>", RIGHT),
        ("<answer> new  york.</answer>", RIGHT),
        ("The answer is New York.", RIGHT),
        ("New York", RIGHT),
        ("<answer>York</answer>", WRONG),
        ("<answer>New York, Boston</answer>", WRONG),
        ("I like New York and Boston", WRONG),
        ("<answer>New York</answer><answer>Boston</answer>", UNPARSED),
        ("New York\nBoston", UNPARSED),
        ("", UNPARSED),
    ],
)
def test_a_text_is_compared_but_for_case_blanks_and_a_full_stop(completion, right):
    assert scored(exact, completion, {"answer": "New York"}) == right
    assert scored(accuracy, completion, {"answer": "New York"}) == right


@pytest.mark.parametrize(
    "answer, reference, right",
    [
        ("x+1", "1+x", RIGHT),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", RIGHT),
        ("(x-1)(x+1)", "x^2-1", RIGHT),
        ("0.5", "\\frac{1}{2}", RIGHT),
        ("x=42", "42", RIGHT),
        ("50%", "50", RIGHT),
        ("1.2 \\times 10^3", "1200", RIGHT),
        ("1.2 \\times {10}^3", "1200", RIGHT),
        ("\\frac{-84}{-2}", "42", RIGHT),
        ("(-42)", "-42", RIGHT),
        ("\\text{yes}", "\\text{yes}", RIGHT),
        ("1420", "42", WRONG),
        ("x-1", "x+1", WRONG),
        ("1,2,42", "42", WRONG),
        ("42, 42", "42", WRONG),  # math-verify alone says right
        ("\\{x, 1+x\\}", "x+1", WRONG),
        ("6*7", "42", UNPARSED),  # likewise
        ("41+1", "42", UNPARSED),
        ("6 \\times 7", "42", UNPARSED),
        ("(23)+(45)", "68", UNPARSED),
        ("{23}+{45}", "68", UNPARSED),
        ("23 + (45)", "68", UNPARSED),
        ("23-(-45)", "68", UNPARSED),
        ("\\frac{23}{1}+45", "68", UNPARSED),
        ("45+\\frac{23}{1}", "68", UNPARSED),
        ("\\left(23\\right) + \\left(45\\right)", "68", UNPARSED),
        ("41 \\boxed{42}", "42", UNPARSED),
        ("}{", "x", UNPARSED),
        ("x+" * 300 + "x", "x+1", UNPARSED),
    ],
)
def test_expressions_are_compared_by_what_they_are_worth(answer, reference, right):
    assert scored(math, f"<answer>{answer}</answer>", {"answer": reference}) == right
    assert scored(accuracy, f"<answer>{answer}</answer>", {"answer": reference, "checker": "math"}) == right


def test_what_mathematics_raises_is_no_answer(monkeypatch):
    import math_verify

    def deep(*_, **__):
        raise RecursionError

    monkeypatch.setattr(math_verify, "verify", deep)
    assert scored(math, "<answer>x+1</answer>", {"answer": "1+x"}) == UNPARSED


def test_mathematics_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert scored(math, "42.0", FORTY_TWO) == RIGHT  # two numbers need no package
    with pytest.raises(ImportError, match="pip install math-verify"):
        math(PROMPT, "x+1", {"answer": "1+x"})


COUNTDOWN = {"numbers": [3, 5, 2, 3], "target": 27, "checker": "countdown"}


@pytest.mark.parametrize(
    "answer, right",
    [
        ("(3+5)*3+3", WRONG),
        ("(5*3-3)*2", WRONG),
        ("(3*5+3)*2", WRONG),
        ("3*(5+2)+3*2", WRONG),
        ("27", WRONG),
        ("(5+2*2)*3", WRONG),
        ("3*3*(5-2)", RIGHT),
        ("(5-2)*3*3", RIGHT),
        ("((5 \u2212 2) \u00d7 3) \u00d7 3", RIGHT),
        ("3*3*(5-2)*1", WRONG),
        ("3*3*3", WRONG),
        ("33-(5+2)+1", WRONG),
        ("3*3*(5-2)=27", UNPARSED),
        ("3*3*(5-2", UNPARSED),
        ("3**3*(5-2)", UNPARSED),
        ("3*3//(5-2)", UNPARSED),
        ("3/(3-3)", UNPARSED),
        ("-(2-5)*3*3", UNPARSED),
        ("", UNPARSED),
        ("__import__('os').exit()", UNPARSED),
        ("9**9**9**9", UNPARSED),
    ],
)
def test_countdown_takes_any_expression_with_each_number_once(answer, right):
    assert scored(countdown, f"<answer>{answer}</answer>", COUNTDOWN) == right
    assert scored(accuracy, f"<answer>{answer}</answer>", COUNTDOWN) == right


def test_countdown_leaves_no_number_out():
    record = {"numbers": [1, 2, 3], "target": 3}
    assert [scored(countdown, said, record) for said in ("3*(2-1)", "1+2", "3")] == [RIGHT, WRONG, WRONG]


def test_the_bandit_pays_one_for_the_best_arm_and_less_for_those_further_off():
    pays = [scored(bandit, str(arm), {"answer": "8"})[0] for arm in range(10)]
    assert pays == pytest.approx([0.3, 0.2, 0.1, 0, 0.1, 0.2, 0.3, 0.4, 1, 0.4])
    assert scored(accuracy, "<answer>8</answer>", {"answer": "8", "checker": "bandit"}) == RIGHT
    for said in ("88", "8 9", "-8", "x", "\u0668", "\u00b2", "", "0123456789", "8.0"):
        assert scored(bandit, said, {"answer": "8"}) == UNPARSED


def test_reasoning_gym_scores_by_its_own_data_set(monkeypatch):
    seen = []

    def score(dataset):
        return lambda answer, entry: seen.append((dataset, answer, entry)) or 0.25

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(get_score_answer_fn=score))
    record = {"checker": "reasoning_gym", "dataset": "chain_sum", "entry": {"answer": "4"}}
    assert scored(accuracy, "<answer>3</answer>", record) == (0.25, 0)
    assert scored(accuracy, "", record) == UNPARSED
    assert seen == [("chain_sum", "3", {"answer": "4"})]


@pytest.mark.parametrize(
    "completion, right",
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n\n<answer> b </answer>\n", 1),
        ("<think>a < b > c</think><answer>#### \\boxed{b}</answer>", 1),
        ("<think></think><answer>b</answer>", 0),
        ("<think> \n </think><answer>b</answer>", 0),
        ("<think>a</think><answer></answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think>", 0),
        ("<answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("a</think><answer>b</answer>", 0),
        ("<think>a<answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("<think>a</think><answer>b</answer>c", 0),
        ("c<think>a</think><answer>b</answer>", 0),
        ("<think>a</think>c<answer>b</answer>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><think>a</think><answer>b</answer>", 0),
        ("<think><think>a</think></think><answer>b</answer>", 0),
        ("<think>a</think><answer><answer>b</answer>", 0),
        ("<think>a</think><answer>b</think></answer>", 0),
        ("<think><answer></think>b</answer>", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("", 0),
        ("<think></think><answer></answer>" * 5000, 0),
        ("<think>" + "</think>" * 20_000, 0),
    ],
)
def test_the_format_is_thinking_and_then_an_answer_once_each_and_nothing_else(completion, right):
    assert formatted(PROMPT, completion, {}) == right


def test_length_is_a_share_of_what_is_allowed_and_an_end_is_an_end():
    record = {"completion_tokens": 30, "max_new_tokens": 120, "ended": True}
    assert length(PROMPT, "a", record) == 0.25 and length(PROMPT, "a", record, limit=60) == 0.5
    assert ended(PROMPT, "a", record) == 1 and ended(PROMPT, "a", record | {"ended": False}) == 0


def test_overlong_is_the_paper_s_punishment_in_tokens():
    """DAPO, equation 13, case by case: L_max = 100, L_cache = 20."""

    def paper(tokens):
        if tokens <= 100 - 20:
            return 0.0
        if tokens <= 100:
            return ((100 - 20) - tokens) / 20
        return -1.0

    for tokens in range(0, 130):
        for record, limit in (({"max_new_tokens": 100}, 0), ({"max_new_tokens": 999}, 100)):
            found = overlong(PROMPT, "words " * 500, record | {"completion_tokens": tokens}, limit=limit, buffer=20)
            assert found == pytest.approx(paper(tokens))
    with pytest.raises(ValueError, match="buffer=101 of an overlong answer is above 0 and at most limit=100"):
        overlong(PROMPT, "", {"max_new_tokens": 100, "completion_tokens": 1}, buffer=101)


@pytest.mark.parametrize(
    "rule, record, message",
    [
        (numeric, {"task": "x"}, r"a record with \['task'\] has no 'answer' to check by"),
        (exact, {"answer": ""}, "has no 'answer'"),
        (accuracy, {"answer": None}, "has no 'answer'"),
        (numeric, {"answer": "Paris"}, "answer 'Paris' is no number: use 'exact' or 'math'"),
        (accuracy, {"answer": "1", "checker": "nomeric"}, "checker 'nomeric' of a record is not one of .*numeric"),
    ],
)
def test_a_record_that_cannot_be_checked_by_is_said_to_be_so(rule, record, message):
    with pytest.raises(ValueError, match=message):
        rule(PROMPT, "1", record)


def test_no_completion_makes_a_rule_raise():
    draw = random.Random(0)
    pieces = "<think> </think> <answer> </answer> #### \\boxed{ \\frac{ } ( ) + * / - = , . 1 42 x % $ ^ _ \\".split()
    counts = {"completion_tokens": 3, "max_new_tokens": 9, "ended": False}
    record = {"answer": "7", "numbers": [1, 2], "target": 3} | counts
    for _ in range(120):
        said = "".join(draw.choices([*pieces, " ", "\ud800", "\0"], k=draw.randrange(9)))
        completion = draw.choice(("{}", "<answer>{}</answer>")).replace("{}", said)
        for name in RULES.keys() - {"overlong"}:
            found = RULES[name](PROMPT, completion, record)
            assert 0 <= (found["score"] if isinstance(found, dict) else found) <= 1


def test_the_tables_hold_every_rule_and_every_checker():
    assert set(RULES) == set("numeric exact math accuracy countdown bandit format ended length overlong".split())
    assert set(CHECKERS) == {"numeric", "exact", "math", "countdown", "bandit", "reasoning_gym"}
    assert set(verifiers.OPTIONS) <= set(RULES)
