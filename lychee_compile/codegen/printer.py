"""Triton source of scores and masks: sympy expressions of s, b, h, q, kv and captured tensors.

    kv <= q + m[b]          kv <= q + tl.load(m + b * m_stride_0)
    30*tanh(s/240)          30 * (1 - 2 / (tl.exp(s / 120) + 1))

The text holds for scalars and tensors alike: operations are elementwise and broadcast. A number
made of integers alone is an exact integer; all other numbers are float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import reduce, singledispatchmethod

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanFunction, BooleanTrue

from lychee_compile.codegen.captured_tensors import LOADED, VARIABLES, CapturedTensors
from lychee_compile.codegen.expressions import (
    LARGEST_POWER,
    fraction,
    indices_of,
    is_inverse,
    is_negative,
    is_nonnegative,
    is_short_power,
    ordered,
    truncates_down,
)
from lychee_compile.codegen.forms import Form, Level, Unprintable, literal, real_number
from lychee_compile.codegen.specification import KV, Captured

__all__ = ["Unprintable", "print_expression"]

LARGEST_FACTOR = 128
"""Largest factor of a position in 32 bits: a product by more is computed in 64 bits."""


def print_expression(
    expression: sympy.Expr | Boolean,
    captured: Mapping[str, Captured],
    mask: str = "",
    variables: Collection[sympy.Symbol] = VARIABLES,
) -> str:
    """Return Triton source of `expression`, over `variables` of the kernel by their names.

    These are `s`, `b`, `h`, `q`, `kv` and `kv_len` for score and mask.

    An element of a captured tensor is read through a pointer of its name and the strides
    `<name>_stride_0`, ... `mask` is the name of a bool tensor along kv. An element that depends on
    kv is read if its mask is true, else it is 0. Without a mask, and along all other axes, indices
    have to be in range.

    Raises Unprintable for functions, symbols and dtypes without a Triton form. It is also raised
    for indices that may be negative: PyTorch counts these from the end.
    """
    return _Printer(CapturedTensors(captured, variables), mask).form(sympy.sympify(expression)).text


class _Printer:
    def __init__(self, captured: CapturedTensors, mask: str) -> None:
        self._captured, self._mask = captured, mask

    def form(self, expression: sympy.Basic) -> Form:
        return literal(expression) if expression.is_number else self._form(expression)

    def _atom(self, expression: sympy.Basic) -> str:
        return self.form(expression).within(Level.ATOM)

    def _floating(self, expression: sympy.Expr) -> str:
        text = self.form(expression).text
        return f"tl.cast({text}, tl.float32)" if self._captured.is_integer(expression) else text

    @singledispatchmethod
    def _form(self, expression: sympy.Basic) -> Form:
        raise Unprintable(f"no Triton form of {type(expression).__name__}: {expression}")

    @_form.register
    def _symbol(self, symbol: sympy.Symbol) -> Form:
        if symbol in self._captured.variables:
            return Form(symbol.name)
        return self._element(symbol)

    @_form.register
    def _element(self, element: sympy.Indexed) -> Form:
        """Print an element of a captured tensor: float32, int32, int64 or a truth value."""
        tensor, indices = self._captured.tensor_of(element), indices_of(element)
        address = [tensor.name]
        for dim, index in enumerate(indices):
            if not (self._captured.is_integer(index) and is_nonnegative(index)):
                raise Unprintable(f"index {index} of {element}: it may be negative")
            if index != 0:
                times = "" if index == 1 else f"{self._atom(index)} * "
                address.append(f"{times}{tensor.name}_stride_{dim}")
        masked = self._mask and any(KV in index.free_symbols for index in indices)
        mask = f", mask={self._mask}, other=0" if masked else ""
        text = f"tl.load({' + '.join(address)}{mask}){LOADED[tensor.dtype]}"
        return Form(text, Level.COMPARISON if tensor.dtype == "bool" else Level.ATOM)

    @_form.register
    def _sum(self, total: sympy.Add) -> Form:
        terms = total.as_ordered_terms()
        first = next((each for each in terms if not is_negative(each)), terms[0])
        text = self.form(first).within(Level.SUM)
        for term in terms:
            if term is not first:
                sign, size = ("-", -term) if is_negative(term) else ("+", term)
                text += f" {sign} {self.form(size).within(Level.PRODUCT)}"
        return Form(text, Level.SUM)

    @_form.register
    def _product(self, product: sympy.Mul) -> Form:
        """Print the factors above and below a fraction stroke, each with a number."""
        number, above, below = sympy.S.One, [], []
        for factor in product.as_ordered_factors():
            if factor.is_number:
                number *= factor
            elif is_inverse(factor):
                below.append(1 / factor)
            else:
                above.append(factor)
        size = abs(real_number(number))
        over, under = (size.p, size.q) if size.is_Rational else (size, 1)
        form = self._factors(sympy.sympify(over), above)
        if below or under != 1:
            divisor = self._factors(sympy.sympify(under), below).within(Level.ATOM)
            form = Form(f"{form.text} / {divisor}", Level.PRODUCT)
        return Form(f"-{form.text}", Level.SUM) if number.is_negative else form

    def _factors(self, number: sympy.Expr, factors: Sequence[sympy.Expr]) -> Form:
        """Print a product, in 64 bits if a product of positions could need more than 32."""
        # After a float32 no product overflows.
        factors = sorted(factors, key=self._captured.is_integer)
        whole = number.is_Integer and all(map(self._captured.is_integer, factors))
        texts = [self._atom(each) for each in factors]
        if whole and factors and (len(factors) > 1 or number > LARGEST_FACTOR):
            texts[0] = f"tl.cast({self.form(factors[0]).text}, tl.int64)"
        if number != 1 or not factors:
            texts.insert(0, self._atom(number))
        return Form(" * ".join(texts), Level.PRODUCT if len(texts) > 1 else Level.ATOM)

    @_form.register
    def _power(self, power: sympy.Pow) -> Form:
        base, exponent = power.args
        if is_inverse(power):
            return Form(f"1 / {self._atom(1 / power)}", Level.PRODUCT)
        if exponent == sympy.S.Half:
            return Form(f"tl.sqrt({self._floating(base)})")
        if is_short_power(power):
            return self._factors(sympy.S.One, [base] * int(exponent))
        if exponent.is_Rational and exponent.q == 2 and exponent.p <= LARGEST_POWER:
            return self._factors(sympy.S.One, [sympy.sqrt(base)] * exponent.p)
        if base.is_number and base.is_positive:
            bits = sympy.S.One if base == 2 else sympy.Float(math.log2(base))
            return Form(f"tl.exp2({self._floating(bits * exponent)})")
        raise Unprintable(f"no Triton form of the power {power}")

    @_form.register
    def _exp(self, function: sympy.exp) -> Form:
        return Form(f"tl.exp({self._floating(function.args[0])})")

    @_form.register
    def _log(self, function: sympy.log) -> Form:
        return Form(f"tl.log({self._floating(function.args[0])})")

    @_form.register
    def _tanh(self, function: sympy.tanh) -> Form:
        """Print tanh by exp alone. The result is right also if exp is 0 or infinite."""
        doubled = self._floating(2 * function.args[0])
        return Form(f"1 - 2 / (tl.exp({doubled}) + 1)", Level.SUM)

    @_form.register
    def _abs(self, function: sympy.Abs) -> Form:
        return Form(f"tl.abs({self.form(function.args[0]).text})")

    @_form.register
    def _max(self, function: sympy.Max) -> Form:
        return self._pairwise("tl.maximum", function.args)

    @_form.register
    def _min(self, function: sympy.Min) -> Form:
        return self._pairwise("tl.minimum", function.args)

    def _pairwise(self, name: str, operands: Iterable[sympy.Expr]) -> Form:
        texts = [self.form(each).text for each in ordered(operands)]
        return Form(reduce(lambda left, right: f"{name}({left}, {right})", texts))

    @_form.register
    def _floor(self, function: sympy.floor) -> Form:
        if self._captured.is_integer(function):
            return self._floor_divide(*fraction(function.args[0]))
        return Form(f"tl.floor({self._floating(function.args[0])})")

    @_form.register
    def _ceiling(self, function: sympy.ceiling) -> Form:
        if self._captured.is_integer(function):
            numerator, denominator = fraction(function.args[0])
            text = self._floor_divide(-numerator, denominator).within(Level.ATOM)
            return Form(f"-{text}", Level.SUM)
        return Form(f"tl.ceil({self._floating(function.args[0])})")

    def _floor_divide(self, numerator: sympy.Expr, denominator: sympy.Expr) -> Form:
        if denominator == 1:
            return self.form(numerator)
        dividend, divisor = self.form(numerator), self._atom(denominator)
        if not truncates_down(numerator, denominator):
            rest = self._remainder(numerator, denominator).within(Level.PRODUCT)
            dividend = Form(f"{dividend.within(Level.SUM)} - {rest}", Level.SUM)
        return Form(f"{dividend.within(Level.ATOM)} // {divisor}", Level.PRODUCT)

    def _remainder(self, numerator: sympy.Expr, denominator: sympy.Expr) -> Form:
        """Print a remainder with the sign of the denominator; Triton divides towards zero."""
        divisor = self._atom(denominator)
        text = f"{self._atom(numerator)} % {divisor}"
        if not truncates_down(numerator, denominator):
            text = f"({text} + {divisor}) % {divisor}"
        return Form(text, Level.PRODUCT)

    @_form.register
    def _mod(self, function: sympy.Mod) -> Form:
        numerator, denominator = function.args
        if self._captured.is_integer(function):
            return self._remainder(numerator, denominator)
        dividend, divisor = self.form(numerator).within(Level.SUM), self._atom(denominator)
        quotient = f"{self._atom(numerator)} / {divisor}"
        return Form(f"{dividend} - {divisor} * tl.floor({quotient})", Level.SUM)

    @_form.register
    def _truth(self, value: BooleanTrue | BooleanFalse) -> Form:
        return Form(str(bool(value)))

    @_form.register
    def _flag(self, function: BooleanFunction) -> Form:
        """Print an element of a bool tensor, around which sympy needs a function."""
        element = function.args[0]
        if len(function.args) > 1 or not isinstance(element, (sympy.Symbol, sympy.Indexed)):
            raise Unprintable(f"no Triton form of {type(function).__name__}: {function}")
        form = self._element(element)
        if form.level is Level.COMPARISON:
            return form
        return Form(f"{form.text} != 0", Level.COMPARISON)

    @_form.register
    def _relation(self, relation: Relational) -> Form:
        left, right = (self.form(each).within(Level.SUM) for each in relation.args)
        return Form(f"{left} {relation.rel_op} {right}", Level.COMPARISON)

    @_form.register
    def _and(self, function: sympy.And) -> Form:
        return self._logic(" & ", function.args)

    @_form.register
    def _or(self, function: sympy.Or) -> Form:
        return self._logic(" | ", function.args)

    @_form.register
    def _xor(self, function: sympy.Xor) -> Form:
        return self._logic(" ^ ", function.args)

    def _logic(self, operator: str, operands: Iterable[Boolean]) -> Form:
        texts = [self.form(each).within(Level.SUM) for each in ordered(operands)]
        return Form(operator.join(texts), Level.LOGIC)

    @_form.register
    def _not(self, function: sympy.Not) -> Form:
        return Form(f"~{self._atom(function.args[0])}")

    @_form.register
    def _if(self, function: sympy.ITE) -> Form:
        condition, yes, no = (self.form(each).text for each in function.args)
        return Form(f"tl.where({condition}, {yes}, {no})")

    @_form.register
    def _choice(self, choice: sympy.Piecewise) -> Form:
        """Print the first value whose condition holds; the last value if none does."""
        *first, (last, _) = choice.args
        text = self.form(last).text
        for value, condition in reversed(first):
            text = f"tl.where({self.form(condition).text}, {self.form(value).text}, {text})"
        return Form(text)
