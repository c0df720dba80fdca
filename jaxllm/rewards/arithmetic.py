"""Sums that a model wrote, worked out exactly and safely: no names, no calls, no number that grows without bound."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

LONGEST = 200  # characters of an expression
LARGEST = 256  # bits of a numerator or a denominator
_CHARACTERS = re.compile(r"[0-9.+\-*/() ]*")
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/"})

Operation = Callable[[Fraction, Fraction], Fraction]
FOUR: Mapping[type, Operation] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def parsed(text: str) -> ast.expr:
    """The tree of a sum of numbers, signs and parentheses. Raises ``ValueError`` for any other text."""
    text = text.translate(_SIGNS).strip()
    if len(text) > LONGEST:
        raise ValueError(f"{len(text)} characters are more than {LONGEST}")
    if not _CHARACTERS.fullmatch(text):
        raise ValueError("only numbers, + - * / ** and parentheses can be worked out")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("not a sum that can be read") from error


def numbers(tree: ast.expr) -> list[Fraction]:
    """The numbers that stand in it, in any order."""
    return [_constant(node) for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def value(tree: ast.expr, operations: Mapping[type, Operation] = FOUR) -> Fraction:
    """What it comes to. Raises ``ValueError`` for an operation not among these, a division by zero, a number beyond
    ``LARGEST`` bits.
    """
    if isinstance(tree, ast.Constant):
        return _bounded(_constant(tree))
    if isinstance(tree, ast.UnaryOp) and type(tree.op) in operations:
        return operations[type(tree.op)](Fraction(0), value(tree.operand, operations))
    if not isinstance(tree, ast.BinOp) or type(tree.op) not in operations:
        raise ValueError(f"{type(getattr(tree, 'op', tree)).__name__} is not among the operations")
    left, right = value(tree.left, operations), value(tree.right, operations)
    try:
        return _bounded(operations[type(tree.op)](left, right))
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent for a whole exponent. Raises ``ValueError`` for another, or where the result would be large."""
    if exponent.denominator != 1:
        raise ValueError(f"exponent {exponent} is not whole")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > LARGEST or bits * abs(exponent) > 2 * LARGEST:
        raise ValueError("the result is too large")
    return base ** int(exponent)


def _constant(node: ast.Constant) -> Fraction:
    return Fraction(str(node.value))


def _bounded(number: Fraction) -> Fraction:
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > LARGEST:
        raise ValueError("the result is too large")
    return number
