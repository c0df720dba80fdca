import json
import random
import re
import types
from collections import Counter

import pytest

from jaxllm.data import tasks
from jaxllm.data.tasks import TASKS, Problem, demonstration, demonstrations, drawn, is_held_out
from jaxllm.rewards import verifiers
from jaxllm.text.chat import Conversation

LEVELS = (1, 2, 3)
EACH = [(name, level) for name in TASKS for level in LEVELS]


def asked(text, *before):
    return Conversation((*before, {"role": "user", "content": text}))


def question(problem):
    (message,) = problem.prompt.messages
    assert message["role"] == "user"
    return message["content"]


def said(record):
    """(prompt, thought, answer) of a demonstration."""
    user, assistant = record["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    found = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", assistant["content"])
    return user["content"], *found.groups()


def steps(thought):
    """Of a thought such as 7+8=15 4+3+1=8, the sums and what each is said to come to."""
    return [(left, int(right)) for left, right in (step.split("=") for step in thought.split())]


def right_answer(text):
    """Oracle: what is asked, read anew from the prompt; None where there is more than one right answer."""
    if text.endswith("=?"):
        return str(eval(text[:-2]))
    if found := re.fullmatch(r"(larger|smaller) of (\d+),(\d+)\?", text):
        return str({"larger": max, "smaller": min}[found[1]](int(found[2]), int(found[3])))
    if found := re.fullmatch(r"how many (\w) in (\w+)\?", text):
        return str(found[2].count(found[1]))
    if found := re.fullmatch(r"(.*)\. (tallest|shortest)\?", text):
        pairs = [fact.split(">") for fact in found[1].split(", ")]
        place = {"tallest": 1, "shortest": 0}[found[2]]
        (name,) = {name for pair in pairs for name in pair} - {pair[place] for pair in pairs}
        return name
    return None


@pytest.mark.parametrize("name, level", EACH)
def test_the_answer_is_right_by_the_prompt_alone_and_pays_in_full(name, level):
    draw = random.Random(f"{name} {level}")
    for _ in range(25):
        problem = drawn(name, level, draw)
        record = problem.record
        assert record["task"] == name and json.loads(json.dumps(record)) == record
        assert right_answer(question(problem)) in (None, record["answer"])
        answer = demonstration(problem)["messages"][-1]["content"]
        assert verifiers.accuracy(problem.prompt, answer, record) == {"score": 1, "unparsed": 0}
        assert verifiers.format(problem.prompt, answer, record) == 1
        assert len(question(problem)) <= 80
        if "expression" in record:
            assert eval(record["expression"]) == int(record["answer"])


@pytest.mark.parametrize("level", LEVELS)
def test_the_way_of_addition_is_the_one_on_paper_with_the_carry(level):
    draw = random.Random(level)
    carried = 0
    for _ in range(50):
        text, thought, answer = said(demonstration(TASKS["addition"](draw, level)))
        first, second = re.findall(r"\d+", text)
        assert len(first) == len(second) == level
        digits, carry = "", 0
        for (left, total), x, y in zip(steps(thought), first[::-1], second[::-1], strict=True):
            assert left == f"{x}+{y}" + ("+1" if carry else "") and eval(left) == total
            carry, digits = int(total >= 10), str(total)[-1] + digits
            carried += carry
        assert answer == ("1" if carry else "") + digits or answer == digits.lstrip("0")
    assert carried > 10


@pytest.mark.parametrize(
    "name, first, second, way, answer",
    [
        ("addition", 47, 38, "7+8=15 4+3+1=8", "85"),
        ("addition", 57, 68, "7+8=15 5+6+1=12", "125"),
        ("addition", 995, 115, "5+5=10 9+1+1=11 9+1+1=11", "1110"),
        ("subtraction", 83, 47, "13-7=6 8-4-1=3", "36"),
        ("subtraction", 47, 83, "13-7=6 8-4-1=3", "36"),
        ("subtraction", 74, 42, "4-2=2 7-4=3", "32"),
        ("subtraction", 500, 123, "10-3=7 10-2-1=7 5-1-1=3", "377"),
        ("subtraction", 55, 49, "15-9=6 5-4-1=0", "6"),
        ("multiplication", 12, 34, "12*4=48 12*30=360 48+360=408", "408"),
        ("multiplication", 7, 8, "7*8=56", "56"),
        ("comparison", 473, 422, "4=4 7>2", "473"),
        ("comparison", 122, 473, "1<4", "473"),
    ],
)
def test_ways_are_those_on_paper(name, first, second, way, answer):
    numbers = iter((first, second))
    draw = types.SimpleNamespace(randrange=lambda least, end: next(numbers), choice=lambda words: words[0])
    assert said(demonstration(TASKS[name](draw, len(str(first)))))[1:] == (way, answer)


@pytest.mark.parametrize("name", ["multiplication", "sums", "countdown"])
def test_each_step_of_a_way_holds_and_the_last_one_is_the_answer(name):
    draw = random.Random(name)
    for level in LEVELS:
        for _ in range(15):
            problem = TASKS[name](draw, level)
            made = steps(problem.record["solution"])
            assert all(eval(left) == right >= 0 for left, right in made)
            assert made[-1][1] == problem.record.get("target", made[-1][1]) == eval(problem.record["answer"])


def test_levels_are_sizes():
    draw = random.Random(0)
    for level in LEVELS:
        assert {len(n) for n in re.findall(r"\d+", question(TASKS["comparison"](draw, level)))} == {level}
        assert len(re.findall(r"\d+", question(TASKS["sums"](draw, level)))) == level + 1
        assert len(TASKS["countdown"](draw, level).record["numbers"]) == level + 2
        assert len(question(TASKS["logic"](draw, level)).split(", ")) == level + 1
        assert len(question(TASKS["counting"](draw, level)).split()[-1]) == 3 + 2 * level + 1
    for level, largest in ((1, 9), (2, 25), (3, 25)):
        numbers = [number for _ in range(200) for number in TASKS["countdown"](draw, level).record["numbers"]]
        assert min(numbers) == 1 and max(numbers) == largest
    assert [TASKS["bandit"](draw, level).record["answer"] for level in (1, 9, 10, 13)] == ["1", "9", "0", "3"]


def test_tasks_are_as_varied_as_they_could_be():
    draw = random.Random(0)
    answers = Counter(TASKS["comparison"](draw, 2).record["answer"] == "99" for _ in range(200))
    assert answers[False] > 150
    assert {question(TASKS["addition"](draw, 1)) for _ in range(1200)} == {
        f"{x}+{y}=?" for x in range(10) for y in range(10)
    }
    assert len({question(TASKS["addition"](draw, 2)) for _ in range(600)}) > 500
    for name, words in (("comparison", ("larger", "smaller")), ("logic", ("tallest", "shortest"))):
        found = [question(TASKS[name](draw, 2)) for _ in range(200)]
        assert all(60 < sum(word in text for text in found) < 140 for word in words)
    told = [TASKS["logic"](draw, 2) for _ in range(60)]
    assert 2 < sum(question(each).startswith(">".join(each.record["solution"].split(">")[:2])) for each in told) < 40
    signs = "".join(question(TASKS["sums"](draw, 3)) for _ in range(100))
    assert 50 < signs.count("-") < signs.count("+")
    used = "".join(TASKS["countdown"](draw, 2).record["answer"] for _ in range(100))
    assert all(used.count(sign) > 5 for sign in "+-*/")


# ---- sides ----


def test_which_side_a_prompt_lies_on_follows_from_its_words_in_any_order():
    for share in (0.1, 0.5, 0.9):
        for x in range(20):
            same = {is_held_out(asked(text), share) for text in (f"47+{x}=?", f"{x}+47=?", f"{x} + 47 = ?")}
            assert len(same) == 1
    kind = {"role": "system", "content": "Be kind."}
    assert tasks.key(asked("1+2=?", kind)) == tasks.key(asked("1+2=?")) != tasks.key(asked("1+3=?"))
    assert tasks.key(asked("12")) != tasks.key(asked("1 2"))


def test_a_share_is_a_share_and_a_larger_one_holds_out_the_same_and_more():
    prompts = [asked(f"{n}?") for n in range(2000)]
    held = {share: {n for n, prompt in enumerate(prompts) if is_held_out(prompt, share)} for share in (0, 0.1, 0.3, 1)}
    assert held[0] == set() and len(held[1]) == len(prompts)
    assert held[0.1] < held[0.3] and 150 < len(held[0.1]) < 250 and 520 < len(held[0.3]) < 680


@pytest.mark.parametrize("name", TASKS)
def test_a_problem_is_drawn_from_the_side_that_is_asked_for(name):
    draw = random.Random(0)
    for held_out in (False, True):
        problems = [drawn(name, 2, draw, share=0.3, held_out=held_out) for _ in range(20)]
        assert {is_held_out(problem.prompt, 0.3) for problem in problems} == {held_out}


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda: drawn("adition", 1, random.Random(0)), "'adition' is no task; did you mean 'addition'"),
        (lambda: drawn("addition", 0, random.Random(0)), "level=0 of the task 'addition': 1 is the easiest"),
        (lambda: drawn("logic", 11, random.Random(0)), "level=11 of the task 'logic' is at most 10"),
        (lambda: drawn("addition", 1, random.Random(0), share=1.0), "no problem .* is not held out at a share of 1.0"),
        (lambda: drawn("addition", 1, random.Random(0), share=0, held_out=True), "is held out at a share of 0"),
        (lambda: list(demonstrations({"addition": 1}, 0, 1, correct=1.5)), "correct=1.5 is a share"),
        (lambda: list(demonstrations({}, 0, 1)), "no task to demonstrate"),
        (lambda: list(demonstrations({"addition": 1}, 0, -3)), "count=-3 must be at least 0"),
    ],
)
def test_what_cannot_be_drawn_is_said(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


# ---- demonstrations ----


def test_demonstrations_follow_from_their_seed_and_show_nothing_that_is_held_out():
    levels = dict.fromkeys(TASKS, 2)
    first, again, other = (list(demonstrations(levels, seed, 150, correct=0.5, share=0.4)) for seed in (3, 3, 4))
    assert first == again != other and len(first) == len(other) == 150
    for record in first:
        assert not is_held_out(asked(said(record)[0]), 0.4)
    kinds = Counter(re.sub(r"\d+|[abcd]{7}|\w+>\w+", "", said(record)[0]) for record in first)
    assert len(kinds) >= len(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_the_share_of_right_demonstrations_is_as_asked_and_the_others_keep_the_form(name):
    for correct, least, most in ((0.0, 0, 0), (0.5, 12, 38), (1.0, 50, 50)):
        right = 0
        for record in demonstrations({name: 2}, 0, 50, correct=correct):
            problem = _problem_of(name, record)
            content = record["messages"][-1]["content"]
            right += verifiers.accuracy(problem.prompt, content, problem.record)["score"] == 1
            assert verifiers.format(problem.prompt, content, {}) == 1
        assert least <= right <= most


def _problem_of(name, record):
    """The problem that a demonstration is of, as its prompt alone tells."""
    text = said(record)[0]
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    more = {"numbers": numbers[:-1], "target": numbers[-1], "checker": "countdown"} if name == "countdown" else {}
    more |= {"answer": "2", "checker": "bandit"} if name == "bandit" else {"answer": right_answer(text)}
    return Problem(asked(text), more)


def test_a_wrong_addition_copies_the_digits_and_adds_what_is_wrong():
    """Its parts are those of a right one: only a sum of digits is wrong, and what follows from it."""
    wrong, totals = 0, set()
    for record in demonstrations({"addition": 2}, 0, 100, correct=0):
        text, thought, answer = said(record)
        first, second = re.findall(r"\d+", text)
        (ones, low), (tens, high) = steps(thought)
        assert ones == f"{first[1]}+{second[1]}" and tens.startswith(f"{first[0]}+{second[0]}")
        assert tens.count("+") == 1 + (low >= 10) and int(answer) == high * 10 + low % 10
        wrong += eval(ones) != low or eval(tens) != high
        totals |= {low, high}
    assert wrong == 100 and totals == set(range(20))
