"""Triton source of scores and masks: sympy expressions of s, b, h, q, kv and captured tensors.

    kv <= q + m[b]          kv <= q + tl.load(m + b * m_stride_0)
    30*tanh(s/240)          30 * (1 - 2 / (tl.exp(s / 120) + 1))

The text holds for scalars and tensors alike: operations are elementwise and broadcast. A number
made of integers alone is an exact integer; all other numbers are float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from functools import reduce, singledispatchmethod
from typing import Any, NamedTuple

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanFunction, BooleanTrue

from lychee_compile.codegen.expressions import (
    LARGEST_POWER,
    as_float32,
    fraction,
    indices_of,
    is_inverse,
    is_negative,
    is_nonnegative,
    is_short_power,
    ordered,
    truncates_down,
)
from lychee_compile.codegen.specification import KV, KV_LEN, B, Captured, H, Q, S

LARGEST_FACTOR = 128
"""Largest factor of a position in 32 bits: a product by more is computed in 64 bits."""

_FLOAT32, _INT32 = ".to(tl.float32)", ".to(tl.int32)"
_LOADED = {
    "bool": " != 0",
    "float16": _FLOAT32,
    "bfloat16": _FLOAT32,
    "float32": "",
    "float64": _FLOAT32,
    "int8": _INT32,
    "int16": _INT32,
    "int32": "",
    "int64": "",
    "uint8": _INT32,
}
"""Text after a load from a tensor of each dtype."""
_BUILT = (sympy.Add, sympy.Mul, sympy.Abs, sympy.Max, sympy.Min, sympy.Mod)
"""Functions that give integers for integers."""


class Unprintable(ValueError):  # noqa: N818  the site is left as it was
    """An expression that has no Triton form. The message names the part that has none."""


def print_expression(
    expression: sympy.Expr | Boolean, captured: Mapping[str, Captured], mask: str = ""
) -> str:
    """Return Triton source of `expression`, over variables `s`, `b`, `h`, `q`, `kv` and `kv_len`.

    An element of a captured tensor is read through a pointer of its name and the strides
    `<name>_stride_0`, ... `mask` is the name of a bool tensor along kv. An element that depends on
    kv is read if its mask is true, else it is 0. Without a mask, and along all other axes, indices
    have to be in range.

    Raises Unprintable for functions, symbols and dtypes without a Triton form. It is also raised
    for indices that may be negative: PyTorch counts these from the end.
    """
    return _Printer(captured, mask).form(sympy.sympify(expression)).text


class _Level(IntEnum):
    """Precedence of the outermost operator of a text: a higher level binds more tightly."""

    COMPARISON = 0
    LOGIC = 1
    SUM = 2
    PRODUCT = 3
    ATOM = 4


class _Form(NamedTuple):
    text: str
    level: _Level = _Level.ATOM

    def within(self, level: _Level) -> str:
        """Return the text, in parentheses unless it binds at least as tightly as `level`."""
        return self.text if self.level >= level else f"({self.text})"


class _Printer:
    def __init__(self, captured: Mapping[str, Captured], mask: str) -> None:
        self._captured, self._mask = captured, mask

    def form(self, expression: sympy.Basic) -> _Form:
        return _number(expression) if expression.is_number else self._form(expression)

    def _atom(self, expression: sympy.Basic) -> str:
        return self.form(expression).within(_Level.ATOM)

    def _floating(self, expression: sympy.Expr) -> str:
        text = self.form(expression).text
        return f"tl.cast({text}, tl.float32)" if self._is_integer(expression) else text

    def _is_integer(self, expression: sympy.Basic) -> bool:
        """True if the text of a number has an integer type."""
        if isinstance(expression, (sympy.Symbol, sympy.Indexed)):
            if expression in (B, H, Q, KV, KV_LEN):
                return True
            return expression != S and "int" in self._tensor(expression).dtype
        if isinstance(expression, (sympy.floor, sympy.ceiling)):
            return all(map(self._is_integer, fraction(expression.args[0])))
        if isinstance(expression, sympy.Piecewise):
            return all(self._is_integer(value) for value, _ in expression.args)
        if isinstance(expression, sympy.Pow):
            return is_short_power(expression) and self._is_integer(expression.base)
        if isinstance(expression, _BUILT):
            return all(map(self._is_integer, expression.args))
        return isinstance(expression, sympy.Integer)

    @singledispatchmethod
    def _form(self, expression: Any) -> _Form:
        raise Unprintable(f"no Triton form of {type(expression).__name__}: {expression}")

    @_form.register
    def _symbol(self, symbol: sympy.Symbol) -> _Form:
        if symbol in (S, B, H, Q, KV, KV_LEN):
            return _Form(symbol.name)
        return self._element(symbol)

    @_form.register
    def _element(self, element: sympy.Indexed) -> _Form:
        """Print an element of a captured tensor: float32, int32, int64 or a truth value."""
        tensor, indices = self._tensor(element), indices_of(element)
        address = [tensor.name]
        for dim, index in enumerate(indices):
            if not (self._is_integer(index) and is_nonnegative(index)):
                raise Unprintable(f"index {index} of {element}: it may be negative")
            if index != 0:
                times = "" if index == 1 else f"{self._atom(index)} * "
                address.append(f"{times}{tensor.name}_stride_{dim}")
        masked = self._mask and any(KV in index.free_symbols for index in indices)
        mask = f", mask={self._mask}, other=0" if masked else ""
        text = f"tl.load({' + '.join(address)}{mask}){_LOADED[tensor.dtype]}"
        return _Form(text, _Level.COMPARISON if tensor.dtype == "bool" else _Level.ATOM)

    def _tensor(self, element: sympy.Symbol | sympy.Indexed) -> Captured:
        name = element.base.name if isinstance(element, sympy.Indexed) else element.name
        tensor = self._captured.get(name)
        if tensor is None:
            raise Unprintable(f"{element} is no variable of a kernel and no captured tensor")
        if len(indices_of(element)) != tensor.rank:
            raise Unprintable(f"{element}: {name} has {tensor.rank} dimensions")
        if tensor.dtype not in _LOADED:
            raise Unprintable(f"{name} is of {tensor.dtype}, not of {', '.join(_LOADED)}")
        return tensor

    @_form.register
    def _sum(self, total: sympy.Add) -> _Form:
        terms = total.as_ordered_terms()
        first = next((each for each in terms if not is_negative(each)), terms[0])
        text = self.form(first).within(_Level.SUM)
        for term in terms:
            if term is not first:
                sign, size = ("-", -term) if is_negative(term) else ("+", term)
                text += f" {sign} {self.form(size).within(_Level.PRODUCT)}"
        return _Form(text, _Level.SUM)

    @_form.register
    def _product(self, product: sympy.Mul) -> _Form:
        """Print the factors above and below a fraction stroke, each with a number."""
        number, above, below = sympy.S.One, [], []
        for factor in product.as_ordered_factors():
            if factor.is_number:
                number *= factor
            elif is_inverse(factor):
                below.append(1 / factor)
            else:
                above.append(factor)
        size = abs(_real(number))
        over, under = (size.p, size.q) if size.is_Rational else (size, 1)
        form = self._factors(sympy.sympify(over), above)
        if below or under != 1:
            divisor = self._factors(sympy.sympify(under), below).within(_Level.ATOM)
            form = _Form(f"{form.text} / {divisor}", _Level.PRODUCT)
        return _Form(f"-{form.text}", _Level.SUM) if number.is_negative else form

    def _factors(self, number: sympy.Expr, factors: Sequence[sympy.Expr]) -> _Form:
        """Print a product, in 64 bits if a product of positions could need more than 32."""
        factors = sorted(factors, key=self._is_integer)  # after a float32 nothing overflows
        whole = number.is_Integer and all(map(self._is_integer, factors))
        texts = [self._atom(each) for each in factors]
        if whole and factors and (len(factors) > 1 or number > LARGEST_FACTOR):
            texts[0] = f"tl.cast({self.form(factors[0]).text}, tl.int64)"
        if number != 1 or not factors:
            texts.insert(0, self._atom(number))
        return _Form(" * ".join(texts), _Level.PRODUCT if len(texts) > 1 else _Level.ATOM)

    @_form.register
    def _power(self, power: sympy.Pow) -> _Form:
        base, exponent = power.args
        if is_inverse(power):
            return _Form(f"1 / {self._atom(1 / power)}", _Level.PRODUCT)
        if exponent == sympy.S.Half:
            return _Form(f"tl.sqrt({self._floating(base)})")
        if is_short_power(power):
            return self._factors(sympy.S.One, [base] * int(exponent))
        if exponent.is_Rational and exponent.q == 2 and exponent.p <= LARGEST_POWER:
            return self._factors(sympy.S.One, [sympy.sqrt(base)] * exponent.p)
        if base.is_number and base.is_positive:
            bits = sympy.S.One if base == 2 else sympy.Float(math.log2(base))
            return _Form(f"tl.exp2({self._floating(bits * exponent)})")
        raise Unprintable(f"no Triton form of the power {power}")

    @_form.register
    def _exp(self, function: sympy.exp) -> _Form:
        return _Form(f"tl.exp({self._floating(function.args[0])})")

    @_form.register
    def _log(self, function: sympy.log) -> _Form:
        return _Form(f"tl.log({self._floating(function.args[0])})")

    @_form.register
    def _tanh(self, function: sympy.tanh) -> _Form:
        """Print tanh by exp alone. The result is right also if exp is 0 or infinite."""
        doubled = self._floating(2 * function.args[0])
        return _Form(f"1 - 2 / (tl.exp({doubled}) + 1)", _Level.SUM)

    @_form.register
    def _abs(self, function: sympy.Abs) -> _Form:
        return _Form(f"tl.abs({self.form(function.args[0]).text})")

    @_form.register
    def _max(self, function: sympy.Max) -> _Form:
        return self._pairwise("tl.maximum", function.args)

    @_form.register
    def _min(self, function: sympy.Min) -> _Form:
        return self._pairwise("tl.minimum", function.args)

    def _pairwise(self, name: str, operands: Iterable[sympy.Expr]) -> _Form:
        texts = [self.form(each).text for each in ordered(operands)]
        return _Form(reduce(lambda left, right: f"{name}({left}, {right})", texts))

    @_form.register
    def _floor(self, function: sympy.floor) -> _Form:
        if self._is_integer(function):
            return self._floor_divide(*fraction(function.args[0]))
        return _Form(f"tl.floor({self._floating(function.args[0])})")

    @_form.register
    def _ceiling(self, function: sympy.ceiling) -> _Form:
        if self._is_integer(function):
            numerator, denominator = fraction(function.args[0])
            text = self._floor_divide(-numerator, denominator).within(_Level.ATOM)
            return _Form(f"-{text}", _Level.SUM)
        return _Form(f"tl.ceil({self._floating(function.args[0])})")

    def _floor_divide(self, numerator: sympy.Expr, denominator: sympy.Expr) -> _Form:
        if denominator == 1:
            return self.form(numerator)
        dividend, divisor = self.form(numerator), self._atom(denominator)
        if not truncates_down(numerator, denominator):
            rest = self._remainder(numerator, denominator).within(_Level.PRODUCT)
            dividend = _Form(f"{dividend.within(_Level.SUM)} - {rest}", _Level.SUM)
        return _Form(f"{dividend.within(_Level.ATOM)} // {divisor}", _Level.PRODUCT)

    def _remainder(self, numerator: sympy.Expr, denominator: sympy.Expr) -> _Form:
        """Print a remainder with the sign of the denominator; Triton divides towards zero."""
        divisor = self._atom(denominator)
        text = f"{self._atom(numerator)} % {divisor}"
        if not truncates_down(numerator, denominator):
            text = f"({text} + {divisor}) % {divisor}"
        return _Form(text, _Level.PRODUCT)

    @_form.register
    def _mod(self, function: sympy.Mod) -> _Form:
        numerator, denominator = function.args
        if self._is_integer(function):
            return self._remainder(numerator, denominator)
        dividend, divisor = self.form(numerator).within(_Level.SUM), self._atom(denominator)
        quotient = f"{self._atom(numerator)} / {divisor}"
        return _Form(f"{dividend} - {divisor} * tl.floor({quotient})", _Level.SUM)

    @_form.register
    def _truth(self, value: BooleanTrue | BooleanFalse) -> _Form:
        return _Form(str(bool(value)))

    @_form.register
    def _flag(self, function: BooleanFunction) -> _Form:
        """Print an element of a bool tensor, around which sympy needs a function."""
        element = function.args[0]
        if len(function.args) > 1 or not isinstance(element, (sympy.Symbol, sympy.Indexed)):
            raise Unprintable(f"no Triton form of {type(function).__name__}: {function}")
        form = self._element(element)
        if form.level is _Level.COMPARISON:
            return form
        return _Form(f"{form.text} != 0", _Level.COMPARISON)

    @_form.register
    def _relation(self, relation: Relational) -> _Form:
        left, right = (self.form(each).within(_Level.SUM) for each in relation.args)
        return _Form(f"{left} {relation.rel_op} {right}", _Level.COMPARISON)

    @_form.register
    def _and(self, function: sympy.And) -> _Form:
        return self._logic(" & ", function.args)

    @_form.register
    def _or(self, function: sympy.Or) -> _Form:
        return self._logic(" | ", function.args)

    @_form.register
    def _xor(self, function: sympy.Xor) -> _Form:
        return self._logic(" ^ ", function.args)

    def _logic(self, operator: str, operands: Iterable[Boolean]) -> _Form:
        texts = [self.form(each).within(_Level.SUM) for each in ordered(operands)]
        return _Form(operator.join(texts), _Level.LOGIC)

    @_form.register
    def _not(self, function: sympy.Not) -> _Form:
        return _Form(f"~{self._atom(function.args[0])}")

    @_form.register
    def _if(self, function: sympy.ITE) -> _Form:
        condition, yes, no = (self.form(each).text for each in function.args)
        return _Form(f"tl.where({condition}, {yes}, {no})")

    @_form.register
    def _choice(self, choice: sympy.Piecewise) -> _Form:
        """Print the first value whose condition holds; the last value if none does."""
        *first, (last, _) = choice.args
        text = self.form(last).text
        for value, condition in reversed(first):
            text = f"tl.where({self.form(condition).text}, {self.form(value).text}, {text})"
        return _Form(text)


def _real(value: sympy.Expr) -> sympy.Expr:
    if not value.is_extended_real:
        raise Unprintable(f"{value} is no real number")
    return value


def _number(value: sympy.Expr) -> _Form:
    """Print a literal: an integer, or a float32 number."""
    if isinstance(value, sympy.Integer):
        if not -(2**63) <= int(value) < 2**63:
            raise Unprintable(f"{value} needs more than 64 bits")
        return _Form(str(value), _Level.SUM if value < 0 else _Level.ATOM)
    number = as_float32(_real(value))
    if math.isinf(number):
        return _Form(f'float("{number}")')
    return _Form(repr(number), _Level.SUM if number < 0 else _Level.ATOM)
