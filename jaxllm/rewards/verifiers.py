"""Rewards that need no model: is the answer right, is it given as asked for, how long is it.

A rule gives a number, or a mapping whose "score" counts and whose other entries are there to be watched: "unparsed" is
1 where a completion gives no answer that could be right. No completion makes a rule raise; a record that lacks what the
rule needs does. What takes long is stopped from outside, by `rewards.scoring`.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from jaxllm.rewards import answers, arithmetic
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import ANSWER, END_ANSWER, END_THINK, THINK

Record = Mapping[str, Any]
Score = dict[str, float]
Checker = Callable[[str, Record], float | None]  # of an answer; None: it is not of the kind that could be right

ARMS = 10
LONGEST_EXPRESSION = 400  # characters of an answer that is read as mathematics
_FORMATTED = re.compile(rf"\s*{THINK}(.*?){END_THINK}\s*{ANSWER}(.*?){END_ANSWER}\s*", re.DOTALL)
# Two numbers, in brackets or not, with a sign between them, but for the power of ten of a scientific notation.
_UNDONE = re.compile(
    r"[\d)}\]]\s*(?:[-+*/×÷·]|\\(?:cdot|times|div)\b)(?:\\left|[-+\s({\[])*+(?!10\}?\s*\^)(?:\d|\\[dt]?frac)"
)


def numeric(prompt: Conversation, completion: str, record: Record) -> Score:
    """1 where the completion's answer is the number that record["answer"] ends with, however both are written."""
    return _checked("numeric", completion, record)


def exact(prompt: Conversation, completion: str, record: Record) -> Score:
    """1 where the completion's answer is record["answer"], but for case, blanks and a full stop."""
    return _checked("exact", completion, record)


def math(prompt: Conversation, completion: str, record: Record) -> Score:
    """1 where the completion's answer equals the expression record["answer"] (package math-verify).

    What a number is asked for, a sum left undone is no answer: the question itself would be right.
    """
    return _checked("math", completion, record)


def accuracy(prompt: Conversation, completion: str, record: Record) -> Score:
    """1 where the completion's answer is right by the rule that the record itself names, one of ``CHECKERS``.

    record["checker"]; without one a reference that is a number is compared as one, any other exactly.
    """
    kind = record.get("checker") or ("numeric" if answers.number(_reference(record)) else "exact")
    if kind not in CHECKERS:
        raise ValueError(f"checker {kind!r} of a record is not one of {sorted(CHECKERS)}")
    return _checked(kind, completion, record)


def countdown(prompt: Conversation, completion: str, record: Record) -> Score:
    """1 where the completion's answer has each of record["numbers"] once and + - * / and comes to record["target"]."""
    return _checked("countdown", completion, record)


def bandit(prompt: Conversation, completion: str, record: Record) -> Score:
    """What the arm that the completion names pays: 1 the best, record["answer"], less than 1/2 any other."""
    return _checked("bandit", completion, record)


def format(prompt: Conversation, completion: str, record: Record) -> float:
    """1 for <think>...</think><answer>...</answer>: each once, in this order, only blanks outside, neither empty."""
    if any(completion.count(tag) != 1 for tag in answers.TAGS):
        return 0.0
    found = _FORMATTED.fullmatch(completion)
    return float(found is not None and all(part.strip() for part in found.groups()))


def ended(prompt: Conversation, completion: str, record: Record) -> float:
    """1 where the model itself came to an end, before its last allowed token."""
    return float(record["ended"])


def length(prompt: Conversation, completion: str, record: Record, *, limit: int = 0) -> float:
    """Tokens of the completion as a share of ``limit`` (0: the most that it may have): a cost, by a weight below 0."""
    return record["completion_tokens"] / (limit or record["max_new_tokens"])


def overlong(prompt: Conversation, completion: str, record: Record, *, limit: int = 0, buffer: int) -> float:
    """0 up to limit - buffer tokens, then down in a line to -1 at ``limit`` (0: the most that it may have), and -1.

    DAPO's soft overlong punishment (Yu et al. 2025, arXiv:2503.14476, equation 13). ``ValueError`` where the buffer is
    not between 0 and the limit.
    """
    limit = limit or record["max_new_tokens"]
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer={buffer} of an overlong answer is above 0 and at most limit={limit} tokens")
    return min(0.0, max(-1.0, (limit - buffer - record["completion_tokens"]) / buffer))


RULES: dict[str, Callable[..., float | Score]] = {
    rule.__name__: rule for rule in (numeric, exact, math, accuracy, countdown, bandit, format, ended, length, overlong)
}
OPTIONS = {"length": ("limit",), "overlong": ("limit", "buffer")}


def _checked(kind: str, completion: str, record: Record) -> Score:
    answer = answers.extracted(completion)
    right = None if answer is None else CHECKERS[kind](answer, record)
    return {"score": float(right or 0.0), "unparsed": float(right is None)}


def _reference(record: Record) -> str:
    """The right answer: what record["answer"] gives as a completion would, or all of it. Raises ``ValueError``."""
    if record.get("answer") in (None, ""):
        raise ValueError(f"a record with {sorted(record)} has no 'answer' to check by: leave it out of this reward")
    text = str(record["answer"])
    return answers.extracted(text) or text


def _is_number(answer: str, record: Record) -> float | None:
    reference, found = answers.number(_reference(record)), answers.number(answer)
    if reference is None:
        raise ValueError(f"answer {_reference(record)!r:.60} is no number: use 'exact' or 'math' for it")
    return None if found is None else float(answers.same_number(found, reference))


def _is_text(answer: str, record: Record) -> float:
    return float(_folded(answer) == _folded(_reference(record)))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _is_expression(answer: str, record: Record) -> float | None:
    reference = _reference(record)
    wanted, found = answers.number(reference), answers.number(answer)
    if wanted and found:
        return float(answers.same_number(found, wanted))
    if _folded(answer) == _folded(reference):
        return 1.0
    if len(answer) > LONGEST_EXPRESSION or "\\boxed" in answer or (wanted and _UNDONE.search(answer)):
        return None
    return _are_equal(reference, answer)


def _are_equal(reference: str, answer: str) -> float | None:
    """By math-verify, whose own time limits are signals that only a main thread can take: they are off."""
    try:
        import math_verify
        import sympy
    except ImportError as error:
        raise ImportError("the reward 'math' needs the package math-verify: pip install math-verify") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of what is meant
    try:
        wanted, found = (math_verify.parse(f"\\boxed{{{x}}}", parsing_timeout=None) for x in (reference, answer))
        if not found:
            return None
        if isinstance(found[0], sympy.FiniteSet) and not isinstance(wanted[0], sympy.Set):
            return 0.0  # a list of answers, one of them right
        return float(math_verify.verify(wanted, found, timeout_seconds=None))
    except Exception:  # of the many that a text can make sympy raise
        return None


def _reaches(answer: str, record: Record) -> float | None:
    try:
        tree = arithmetic.parsed(answer)
        reached = arithmetic.value(tree)
    except ValueError:
        return None
    uses = Counter(arithmetic.numbers(tree)) == Counter(map(Fraction, record["numbers"]))
    return float(uses and reached == record["target"])


def _is_arm(answer: str, record: Record) -> float | None:
    """Pays by how far an arm is from the best one around the circle of ten."""
    if len(answer) != 1 or answer not in "0123456789":
        return None
    apart = abs(int(answer) - int(record["answer"]))
    distance = min(apart, ARMS - apart)
    return 0.5 - distance / ARMS if distance else 1.0


def _reasoning_gym(answer: str, record: Record) -> float:
    """The score that the package's own data set gives, record["dataset"] for record["entry"]."""
    import reasoning_gym

    return float(reasoning_gym.get_score_answer_fn(record["dataset"])(answer, record["entry"]))


CHECKERS: dict[str, Checker] = {
    "numeric": _is_number,
    "exact": _is_text,
    "math": _is_expression,
    "countdown": _reaches,
    "bandit": _is_arm,
    "reasoning_gym": _reasoning_gym,
}
