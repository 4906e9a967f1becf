"""Elements of tensors as sympy expressions: numbers, truth values, and choices between them.

A choice is a `Piecewise` at the top of an expression, never inside: `choose` applies a function to
each of its branches. `function_of` gives the elementwise operators of ATen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import sympy
from sympy.logic.boolalg import Boolean, BooleanFunction

from lychee_compile.passes.graph.operator_facts import AtenOperator

Element: TypeAlias = sympy.Expr | Boolean
LONGEST_CHOICE = 6
"""Largest number of branches of a choice; a tensor of more stays a tensor."""


class Flag(BooleanFunction):
    """An element of a bool tensor."""

    @classmethod
    def eval(cls, *_: Any) -> None:
        """Leave the flag as it is: only a run knows its value."""
        return

    def _sympystr(self, printer: Any) -> str:
        return printer.doprint(self.args[0])


class TooLarge(Exception):  # noqa: N818  the tensor stays a tensor
    """An expression that is too large to read."""


def is_truth(value: Element) -> bool:
    """True if an element is a truth value; a bare symbol counts as a number."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def choose(function: Callable[..., Element], *operands: Element) -> Element:
    """Return `function` of operands, as a choice of results if any operand is a choice."""
    branches = [each.args if isinstance(each, sympy.Piecewise) else None for each in operands]
    if not any(branches):
        return function(*operands)
    options = [
        [(pair[0], pair[1]) for pair in pairs] if pairs else [(operand, sympy.true)]
        for operand, pairs in zip(operands, branches, strict=True)
    ]
    if math.prod(len(each) for each in options) > LONGEST_CHOICE:
        raise TooLarge
    branches_of_result: list[tuple[Element, Boolean]] = []
    for combination in itertools.product(*options):
        condition = sympy.And(*(pair[1] for pair in combination))
        if condition != sympy.false and all(condition != each[1] for each in branches_of_result):
            branches_of_result.append((function(*(pair[0] for pair in combination)), condition))
    return piecewise(branches_of_result)


def piecewise(branches: list[tuple[Element, Boolean]]) -> Element:
    """Return a choice of the first value whose condition holds, a truth value if all values are."""
    if all(is_truth(value) for value, _ in branches):
        result: Any = sympy.false
        for value, condition in reversed(branches):
            result = sympy.Or(sympy.And(condition, value), sympy.And(sympy.Not(condition), result))
        return result
    return sympy.Piecewise(*branches, evaluate=False) if len(branches) > 1 else branches[0][0]


def number(value: Element) -> sympy.Expr:
    """Return a truth value as 1 or 0, and a number as it is."""
    if value in (sympy.true, sympy.false):
        return sympy.Integer(int(bool(value)))
    if is_truth(value):
        return sympy.Piecewise((1, value), (0, True), evaluate=False)
    return value


def truth(value: Element) -> Boolean:
    """Return the condition that a number is not zero, and a truth value as it is."""
    if is_truth(value):
        return value
    return sympy.Ne(value, 0)


def branch(condition: Boolean, yes: Element, no: Element) -> Element:
    """Return the choice between two values, either of which may be a choice itself."""
    branches = []
    for value, holds in ((yes, condition), (no, sympy.Not(condition))):
        pairs = value.args if isinstance(value, sympy.Piecewise) else [(value, sympy.true)]
        branches += [(pair[0], sympy.And(holds, pair[1])) for pair in pairs]
    if len(branches) > LONGEST_CHOICE:
        raise TooLarge
    last = branches[-1][0]
    return piecewise([*branches[:-1], (last, sympy.true)])


def arithmetic(function: Callable[..., Any]) -> Callable[..., Element]:
    """Return a function of numbers that takes truth values for 1 and 0."""

    def apply(*operands: Element) -> Element:
        numbers = [number(each) for each in operands]
        if any(isinstance(each, sympy.Piecewise) for each in numbers):
            return choose(function, *numbers)
        return function(*numbers)

    return apply


def _logical(function: Callable[..., Any]) -> Callable[..., Element]:
    return lambda *operands: function(*(truth(each) for each in operands))


def _bitwise(logical: Callable[..., Any]) -> Callable[..., Element]:
    """Return a function of truth values that raises `TooLarge` for other integers.

    The lowest bits of an integer are a remainder: x & 15 is x % 16.
    """

    def apply(*operands: Element) -> Element:
        if all(is_truth(each) for each in operands):
            return logical(*operands)
        if logical is sympy.And and len(operands) == 2:
            for value, mask in (operands, operands[::-1]):
                if value.is_integer and mask.is_Integer and _is_power_of_two(mask + 1):
                    return sympy.Mod(value, mask + 1)
        raise TooLarge

    return apply


def _is_power_of_two(value: sympy.Integer) -> bool:
    return int(value) > 0 and int(value) & (int(value) - 1) == 0


@cache
def function_of(described: AtenOperator) -> Callable[..., Element] | None:
    """Return an elementwise operator as a function of its elements; None if it is not known."""
    if described.numbers is not None:
        return arithmetic(described.numbers)
    if described.truths is not None:
        return _logical(described.truths)
    return None if described.bits is None else _bitwise(described.bits)
