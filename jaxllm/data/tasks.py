"""Problems out of nothing but a seed, each with its answer and a short way to it, and a held-out side by construction.

Prompts are short, for a tokenizer of bytes. Which side a prompt lies on follows from its words in any order, so that
38+47 is never learned from where 47+38 is held out.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from jaxllm.configure import nearest
from jaxllm.data.made import require
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import ANSWER, END_ANSWER, END_THINK, THINK

HELD_OUT = 0.1  # share of the prompts that no demonstration shows and that no run learns from
LONGEST_SEARCH = 2000  # draws for a problem of the wanted side, before there is said to be none
THINK_FIRST = f"Think between {THINK} and {END_THINK}, then give the answer alone between {ANSWER} and {END_ANSWER}."
ARMS = 10
_WORD = re.compile(r"\w+|[^\w\s]")
_PEOPLE = "Ann Bob Cat Dan Eve Fay Gus Hal Ida Joe Kim Leo".split()
T = TypeVar("T")


class Problem(NamedTuple):
    """prompt: ends where the assistant speaks. record: "task", "answer", "solution" (a way to it) and what a checker
    needs, as JSON can hold it.
    """

    prompt: Conversation
    record: dict[str, Any]


class Slips(NamedTuple):
    """What is written in place of a step's right result: that result, or where there is a draw any of its like."""

    draw: random.Random | None = None

    def __call__(self, right: T, likely: Sequence[T]) -> T:
        return right if self.draw is None else self.draw.choice(likely)


NONE = Slips()


def addition(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """Two numbers of ``level`` digits, added digit by digit from the right with the carry: 7+8=15 4+3+1=8."""
    first, second = _numbers(draw, level, 2)
    steps, answer, carry = [], "", 0
    for x, y in zip(reversed(str(first)), reversed(str(second)), strict=True):
        total = slips(int(x) + int(y) + carry, range(20))
        steps.append(f"{x}+{y}{'+1' * carry}={total}")
        carry, answer = total // 10, f"{total % 10}{answer}"
    answer = f"{carry or ''}{answer}"
    return _problem("addition", f"{first}+{second}=?", int(answer), " ".join(steps), expression=f"{first}+{second}")


def subtraction(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """The smaller of two numbers of ``level`` digits from the larger, with what is borrowed: 13-7=6 8-4-1=3."""
    second, first = sorted(_numbers(draw, level, 2))
    steps, answer, borrowed = [], "", 0
    for x, y in zip(reversed(str(first)), reversed(str(second)), strict=True):
        borrows = int(int(x) - borrowed < int(y))
        left = slips(int(x) + 10 * borrows - int(y) - borrowed, range(10))
        steps.append(f"{'1' * borrows}{x}-{y}{'-1' * borrowed}={left}")
        borrowed, answer = borrows, f"{left}{answer}"
    return _problem("subtraction", f"{first}-{second}=?", int(answer), " ".join(steps), expression=f"{first}-{second}")


def multiplication(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """Two numbers of ``level`` digits, multiplied a digit of the second at a time: 12*4=48 12*30=360 48+360=408."""
    first, second = _numbers(draw, level, 2)
    steps, total = [], 0
    for place, digit in enumerate(reversed(str(second))):
        factor = int(digit) * 10**place
        product = slips(first * factor, range(10 ** len(str(first * factor))))
        steps.append(f"{first}*{factor}={product}")
        if place:
            steps.append(f"{total}+{product}={total + product}")
        total += product
    return _problem("multiplication", f"{first}*{second}=?", total, " ".join(steps), expression=f"{first}*{second}")


def sums(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """``level`` + 1 numbers below 50, added or taken away one after the other: 12+7-5 is 12+7=19 19-5=14."""
    start = so_far = draw.randrange(50)
    changes = []
    for _ in range(level):
        number = draw.randrange(50)
        changes.append(draw.choice((number, -number)) if number <= so_far else number)
        so_far += changes[-1]
    total, steps = start, []
    for change in changes:
        reached = slips(total + change, range(10 ** len(str(abs(total + change)))))
        steps.append(f"{total}{change:+}={reached}")
        total = reached
    expression = f"{start}{''.join(f'{change:+}' for change in changes)}"
    return _problem("sums", f"{expression}=?", total, " ".join(steps), expression=expression)


def comparison(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """The larger or the smaller of two numbers of ``level`` digits, from the first digit that differs: 4=4 7<8."""
    first, second = _distinct(draw, level)
    wanted = draw.choice(("larger", "smaller"))
    steps = []
    for x, y in zip(str(first), str(second), strict=True):
        steps.append(f"{x}{'=' if x == y else '<' if x < y else '>'}{y}")
        if x != y:
            break
    right = max(first, second) if wanted == "larger" else min(first, second)
    answer = slips(right, (first, second))
    return _problem("comparison", f"{wanted} of {first},{second}?", answer, " ".join(steps))


def counting(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """How often a letter comes in a word of 3 + 2 * ``level`` letters, counted as it is spelled: b a1 n a2 n a3."""
    length = 3 + 2 * level
    word = "".join(draw.choices("abcd", k=length))
    letter, count, steps = draw.choice(word), 0, []
    for seen in word:
        count += seen == letter
        steps.append(f"{seen}{count}" if seen == letter else seen)
    answer = slips(count, range(1, length + 1))
    return _problem("counting", f"how many {letter} in {word}?", answer, " ".join(steps))


def countdown(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """An expression that has each of ``level`` + 2 numbers once and comes to a target: 3+5=8 8*2=16, so (3+5)*2."""
    numbers = [draw.randrange(1, 10 if level == 1 else 26) for _ in range(level + 2)]
    target, *_ = reached, answer, steps = _path(numbers, draw)
    while slips.draw and reached == target:
        reached, answer, steps = _path(numbers, slips.draw)
    asked = f"use {','.join(map(str, numbers))} once each to make {target}"
    return _problem("countdown", asked, answer, " ".join(steps), checker="countdown", numbers=numbers, target=target)


def logic(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """Who is the tallest or the shortest of ``level`` + 2 people, out of who is taller than whom, in any order."""
    if level + 2 > len(_PEOPLE):
        raise ValueError(f"level={level} of the task 'logic' is at most {len(_PEOPLE) - 2}: it has no more names")
    order = draw.sample(_PEOPLE, level + 2)  # from the tallest
    facts = [f"{taller}>{shorter}" for taller, shorter in pairwise(order)]
    wanted, right = draw.choice((("tallest", order[0]), ("shortest", order[-1])))
    asked = f"{', '.join(draw.sample(facts, len(facts)))}. {wanted}?"
    return _problem("logic", asked, slips(right, order), ">".join(order), checker="exact")


def bandit(draw: random.Random, level: int, slips: Slips = NONE) -> Problem:
    """Ten arms, of which the last digit of ``level`` pays best whatever the round: nothing but the reward tells it."""
    arm = slips(level % ARMS, range(ARMS))
    return _problem("bandit", f"round {draw.randrange(10_000)}: arm 0-9?", arm, f"{arm}", checker="bandit")


TASKS: dict[str, Callable[..., Problem]] = {
    task.__name__: task
    for task in (addition, subtraction, multiplication, sums, comparison, counting, countdown, logic, bandit)
}


def key(prompt: Conversation) -> int:
    """64 bits of the words that a prompt has, in whatever order, but for what the system says."""
    said = (message["content"] for message in prompt.messages if message["role"] != "system")
    words = " ".join(sorted(word for content in said for word in _WORD.findall(content)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def is_held_out(prompt: Conversation, share: float = HELD_OUT) -> bool:
    """Whether a prompt lies among this share of all that there could be. A larger share holds out the same and more."""
    return key(prompt) < share * 2**64


def drawn(name: str, level: int, draw: random.Random, *, share: float = HELD_OUT, held_out: bool = False) -> Problem:
    """A problem of a task that lies on this side of the share that is held out.

    Raises ``ValueError`` for an unknown task, a level below 1, or a side on which there is none.
    """
    lot = _lot(name, level, draw, share, held_out)
    return TASKS[name](random.Random(lot), level)


def demonstrations(
    levels: Mapping[str, int], seed: int, count: int, *, correct: float = 1.0, share: float = HELD_OUT
) -> Iterator[dict[str, Any]]:
    """{"messages": [...]}: so many answered problems of these tasks, task -> level, as supervised training takes them.

    correct: share of them that are right. The others have the same form and copy the problem faithfully, but their
    steps are wrong, and what follows from them: whoever learns of these alone knows how to answer and not what.
    share: what is held out, of which none is shown.
    """
    require(0, count=count)
    if not 0 <= correct <= 1:
        raise ValueError(f"correct={correct} is a share, from 0 to 1")
    if not levels:
        raise ValueError(f"no task to demonstrate: name some of {list(TASKS)}")
    draw = random.Random(f"demonstrations {seed}")
    for _ in range(count):
        name = draw.choice(list(levels))
        lot, is_right = _lot(name, levels[name], draw, share, False), draw.random() < correct
        problem = TASKS[name](random.Random(lot), levels[name])
        yield demonstration(problem if is_right else _mistaken(name, levels[name], lot, draw))


def demonstration(problem: Problem) -> dict[str, Any]:
    """{"messages": [...]} with the worked answer, its solution as what is thought."""
    record = problem.record
    said = f"{THINK}{record['solution']}{END_THINK}{ANSWER}{record['answer']}{END_ANSWER}"
    return {"messages": [*problem.prompt.messages, {"role": "assistant", "content": said}]}


def _lot(name: str, level: int, draw: random.Random, share: float, held_out: bool) -> int:
    """The seed of a problem on this side."""
    if name not in TASKS:
        raise ValueError(f"{name!r} is no task{nearest(name, TASKS)}")
    if level < 1:
        raise ValueError(f"level={level} of the task {name!r}: 1 is the easiest")
    for _ in range(LONGEST_SEARCH):
        lot = draw.getrandbits(64)
        if is_held_out(TASKS[name](random.Random(lot), level).prompt, share) == held_out:
            return lot
    side = "is held out" if held_out else "is not held out"
    raise ValueError(f"no problem of the task {name!r} of level {level} {side} at a share of {share}: change either")


def _mistaken(name: str, level: int, lot: int, draw: random.Random) -> Problem:
    """The problem of a lot, answered wrongly."""
    right = TASKS[name](random.Random(lot), level)
    while True:
        wrong = TASKS[name](random.Random(lot), level, Slips(draw))
        if wrong.record["answer"] != right.record["answer"]:
            return wrong


def _problem(task: str, asked: str, answer: Any, solution: str, **more: Any) -> Problem:
    prompt = Conversation(({"role": "user", "content": asked},))
    record = {"task": task, "answer": str(answer), "solution": solution, "checker": "numeric"} | more
    return Problem(prompt, record)


def _numbers(draw: random.Random, digits: int, count: int) -> list[int]:
    """Numbers of exactly so many digits; of one digit, 0 too."""
    least = 10 ** (digits - 1) if digits > 1 else 0
    return [draw.randrange(least, 10**digits) for _ in range(count)]


def _distinct(draw: random.Random, digits: int) -> list[int]:
    while True:
        first, second = _numbers(draw, digits, 2)
        if first != second:
            return [first, second]


def _path(numbers: Sequence[int], draw: random.Random) -> tuple[int, str, list[str]]:
    """(result, expression, steps) of numbers joined two by two in a drawn way, whole and never below 0 on the way."""
    parts, steps = [(number, str(number)) for number in numbers], []
    while len(parts) > 1:
        (x, left), (y, right) = sorted(draw.sample(parts, 2), reverse=True)
        parts.remove((x, left))
        parts.remove((y, right))
        results = {"+": x + y, "-": x - y, "*": x * y} | ({"/": x // y} if y and x % y == 0 else {})
        sign = draw.choice([sign for sign, result in results.items() if result < 1000])
        steps.append(f"{x}{sign}{y}={results[sign]}")
        parts.append((results[sign], f"({left}{sign}{right})"))
    return parts[0][0], parts[0][1][1:-1], steps
