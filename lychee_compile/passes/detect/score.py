"""Records of the score and the mask of one attention."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.specification import S
from lychee_compile.kernels.reference.hidden import HIDDEN
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.symbolic.elementwise import Element, choose, piecewise


@dataclass(frozen=True)
class Mask:
    """Keys hidden by a bool tensor."""

    operand: Operand
    hidden_when: bool
    fill: float
    """Number in the place of a hidden score: -inf, or a low number."""


@dataclass(frozen=True)
class Bias:
    """A tensor added to the scores, times a number."""

    operand: Operand
    times: float
    element: Element
    """An element of the tensor."""

    @property
    def hides(self) -> bool:
        """True if it does nothing but hide keys, by low numbers."""
        if not isinstance(self.element, sympy.Piecewise):
            return False
        return all(value.is_zero or hides(value * self.times) for value, _ in self.element.args)

    @property
    def added(self) -> Element:
        """Return the number that is added to the score of a key that is not hidden."""
        value = self._value
        return without_hiding(value) if isinstance(value, sympy.Piecewise) else value

    @property
    def hidden(self) -> list[Boolean]:
        """Return the conditions under which it hides a key."""
        return [condition for condition, _ in self.levels]

    @property
    def levels(self) -> list[tuple[Boolean, sympy.Expr]]:
        """Return the conditions under which it hides a key, each with the number it adds then."""
        value = self._value
        branches = exclusive(value) if isinstance(value, sympy.Piecewise) else []
        return [(condition, low_part(each)) for each, condition in branches if hides(each)]

    @property
    def _value(self) -> Element:
        times = self.times
        return self.element if times == 1 else choose(lambda each: each * times, self.element)


@dataclass(frozen=True)
class Score:
    """The score of a visible key: softcap tanh(scale s / softcap) + biases.

    `factors` are tensors that multiply s too, one number for each query.
    """

    expression: sympy.Expr = S
    """The whole score, in s and the axes."""
    scale: float = 1.0
    softcap: float | None = None
    factors: tuple[tuple[Operand, bool], ...] = ()
    """Each tensor or symbolic number, and True if s is divided by it."""
    biases: tuple[Bias, ...] = ()
    masks: tuple[Mask, ...] = ()
    visible: Boolean = sympy.true
    """Condition over the axes under which a key is visible."""
    extra: Operand | None = None
    """Logits that take part in the softmax and have no value: attention sinks."""
    extra_times: float = 1.0
    """Number that the extra logits are multiplied by."""
    unsupported: Reason | None = None
    """Reason why the score could not be expressed; None if it could."""

    @property
    def monotone(self) -> bool:
        """True if a larger s is proved to give a larger score, so that bounds hold for both."""
        return increases(self.expression)


def increases(expression: sympy.Basic) -> bool:
    """True if an expression is proved to grow with s, all else equal."""
    if expression == S:
        return True
    parts = [each for each in expression.args if S in each.free_symbols]
    others = [each for each in expression.args if S not in each.free_symbols]
    if isinstance(expression, sympy.Piecewise):
        values = [value for value, _ in expression.args if S in value.free_symbols]
        return bool(values) and all(map(increases, values))
    if isinstance(expression, (sympy.Add, sympy.Max, sympy.Min, sympy.tanh, sympy.exp)):
        return bool(parts) and all(map(increases, parts))
    if isinstance(expression, sympy.Mul) and len(parts) == 1:
        return bool(sympy.Mul(*others).is_positive) and increases(parts[0])
    return False


def exclusive(choice: sympy.Piecewise) -> list[tuple[sympy.Expr, Boolean]]:
    """Return the branches of a choice, each with the condition under which it is taken."""
    taken, branches = sympy.false, []
    for value, condition in choice.args:
        branches.append((value, sympy.And(condition, sympy.Not(taken))))
        taken = sympy.Or(taken, condition)
    return branches


def without_hiding(choice: sympy.Piecewise) -> Element:
    """Return a choice without the branches that hide a key."""
    pairs = [(value, condition) for value, condition in choice.args if not hides(value)]
    if len(pairs) == len(choice.args):
        return choice
    return piecewise([*pairs[:-1], (pairs[-1][0], sympy.true)]) if pairs else sympy.S.Zero


def hides(value: Element) -> bool:
    """True if a number, or the number in a sum, is that of a hidden key (`reference.hidden`)."""
    low = low_part(value)
    return bool(low.is_number and low.is_extended_real and low <= HIDDEN)


def low_part(value: Element) -> Element:
    """Return the number in a sum, and anything else as it is."""
    return value.as_coeff_Add()[0] if isinstance(value, sympy.Add) else value
