"""Elements of tensors as sympy expressions: numbers, truth values, and choices between them.

A choice is a `Piecewise` at the top of an expression, never inside: `choose` applies a function to
each of its branches. `FUNCTIONS` has the elementwise operators of ATen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import sympy
from sympy.logic.boolalg import Boolean, BooleanFunction

Element: TypeAlias = sympy.Expr | Boolean
LONGEST_CHOICE = 6
"""Branches up to which choices are followed; a tensor of more stays a tensor."""


class Flag(BooleanFunction):
    """An element of a bool tensor."""

    @classmethod
    def eval(cls, *_: Any) -> None:
        """Never evaluated: only a run knows it."""
        return

    def _sympystr(self, printer: Any) -> str:
        return printer.doprint(self.args[0])


class TooLarge(Exception):  # noqa: N818  the tensor stays a tensor
    """An expression became larger than anybody wants to read."""


def is_truth(value: Element) -> bool:
    """Whether an element is a truth value; symbols, which could be, are numbers here."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def choose(function: Callable[..., Element], *operands: Element) -> Element:
    """`function` of operands, any of which may be a choice: a choice of results."""
    branches = [each.args if isinstance(each, sympy.Piecewise) else None for each in operands]
    if not any(branches):
        return function(*operands)
    options = [
        [(pair[0], pair[1]) for pair in pairs] if pairs else [(operand, sympy.true)]
        for operand, pairs in zip(operands, branches, strict=True)
    ]
    if math.prod(len(each) for each in options) > LONGEST_CHOICE:
        raise TooLarge
    made = []
    for combination in itertools.product(*options):
        condition = sympy.And(*(pair[1] for pair in combination))
        if condition != sympy.false:
            made.append((function(*(pair[0] for pair in combination)), condition))
    return piecewise(made)


def piecewise(branches: list[tuple[Element, Boolean]]) -> Element:
    """The first value whose condition holds. Of truth values it is a truth value itself."""
    if all(is_truth(value) for value, _ in branches):
        result: Any = sympy.false
        for value, condition in reversed(branches):
            result = sympy.Or(sympy.And(condition, value), sympy.And(sympy.Not(condition), result))
        return result
    return sympy.Piecewise(*branches, evaluate=False) if len(branches) > 1 else branches[0][0]


def number(value: Element) -> sympy.Expr:
    """A truth value as 1 or 0, as arithmetic takes it."""
    if value in (sympy.true, sympy.false):
        return sympy.Integer(int(bool(value)))
    if is_truth(value):
        return sympy.Piecewise((1, value), (0, True), evaluate=False)
    return value


def truth(value: Element) -> Boolean:
    """A number as whether it is not zero."""
    if is_truth(value):
        return value
    return sympy.Ne(value, 0)


def branch(condition: Boolean, yes: Element, no: Element) -> Element:
    """A choice between two, either of which may be one already."""
    branches = []
    for value, holds in ((yes, condition), (no, sympy.Not(condition))):
        pairs = value.args if isinstance(value, sympy.Piecewise) else [(value, sympy.true)]
        branches += [(pair[0], sympy.And(holds, pair[1])) for pair in pairs]
    if len(branches) > LONGEST_CHOICE:
        raise TooLarge
    last = branches[-1][0]
    return piecewise([*branches[:-1], (last, sympy.true)])


def arithmetic(function: Callable[..., Any]) -> Callable[..., Element]:
    """A function of numbers; truth values among its operands count as 1 and 0."""

    def apply(*operands: Element) -> Element:
        numbers = [number(each) for each in operands]
        if any(isinstance(each, sympy.Piecewise) for each in numbers):
            return choose(function, *numbers)
        return function(*numbers)

    return apply


def _logical(function: Callable[..., Any]) -> Callable[..., Element]:
    return lambda *operands: function(*(truth(each) for each in operands))


def _bitwise(logical: Callable[..., Any]) -> Callable[..., Element]:
    """`&`, `|` and `~`, which are understood between truth values only."""

    def apply(*operands: Element) -> Element:
        if not all(is_truth(each) for each in operands):
            raise TooLarge
        return logical(*operands)

    return apply


def _exclusive_or(left: Boolean, right: Boolean) -> Boolean:
    """One of two; where the one implies the other, as a narrow band does a wide one, their gap."""
    parts = [set(sympy.And.make_args(each)) for each in (left, right)]
    if parts[0] <= parts[1]:
        return sympy.And(left, sympy.Not(sympy.And(*(parts[1] - parts[0]))))
    if parts[1] <= parts[0]:
        return sympy.And(right, sympy.Not(sympy.And(*(parts[0] - parts[1]))))
    return sympy.Xor(left, right)


FUNCTIONS: dict[str, Callable[..., Element]] = {
    "add": arithmetic(lambda a, b: a + b),
    "sub": arithmetic(lambda a, b: a - b),
    "subtract": arithmetic(lambda a, b: a - b),
    "rsub": arithmetic(lambda a, b: b - a),
    "mul": arithmetic(lambda a, b: a * b),
    "multiply": arithmetic(lambda a, b: a * b),
    "neg": arithmetic(lambda a: -a),
    "abs": arithmetic(sympy.Abs),
    "exp": arithmetic(sympy.exp),
    "log": arithmetic(lambda a: -sympy.oo if a.is_zero else sympy.log(a)),
    "sqrt": arithmetic(sympy.sqrt),
    "rsqrt": arithmetic(lambda a: 1 / sympy.sqrt(a)),
    "reciprocal": arithmetic(lambda a: 1 / a),
    "tanh": arithmetic(sympy.tanh),
    "sigmoid": arithmetic(lambda a: 1 / (1 + sympy.exp(-a))),
    "pow": arithmetic(lambda a, b: a**b),
    "square": arithmetic(lambda a: a**2),
    "floor_divide": arithmetic(lambda a, b: sympy.floor(a / b)),
    "remainder": arithmetic(sympy.Mod),
    "maximum": arithmetic(sympy.Max),
    "minimum": arithmetic(sympy.Min),
    "le": arithmetic(sympy.Le),
    "lt": arithmetic(sympy.Lt),
    "ge": arithmetic(sympy.Ge),
    "gt": arithmetic(sympy.Gt),
    "eq": arithmetic(sympy.Eq),
    "ne": arithmetic(sympy.Ne),
    "less_equal": arithmetic(sympy.Le),
    "less": arithmetic(sympy.Lt),
    "greater_equal": arithmetic(sympy.Ge),
    "greater": arithmetic(sympy.Gt),
    "not_equal": arithmetic(sympy.Ne),
    "logical_not": _logical(sympy.Not),
    "logical_and": _logical(sympy.And),
    "logical_or": _logical(sympy.Or),
    "logical_xor": _logical(_exclusive_or),
    "bitwise_not": _bitwise(sympy.Not),
    "bitwise_and": _bitwise(sympy.And),
    "bitwise_or": _bitwise(sympy.Or),
    "bitwise_xor": _bitwise(_exclusive_or),
    "__and__": _bitwise(sympy.And),
    "__or__": _bitwise(sympy.Or),
}
"""Elementwise operators as functions of their elements."""
