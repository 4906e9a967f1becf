"""Facts about sympy expressions that decide how the printer writes them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

import sympy

LARGEST_POWER = 8
"""Largest exponent of a power that is written as a product."""


def as_float32(value: sympy.Expr) -> float:
    """Return a number in full precision, but infinite if it overflows float32."""
    number = float(value)
    try:
        struct.pack("<f", number)
    except OverflowError:
        return math.copysign(math.inf, number)
    return number


def indices_of(element: sympy.Symbol | sympy.Indexed) -> tuple[sympy.Expr, ...]:
    """Return the indices of a tensor's element; none for a tensor without dimensions."""
    return element.indices if isinstance(element, sympy.Indexed) else ()


def ordered(operands: Iterable[sympy.Basic]) -> list[sympy.Basic]:
    """Return operands in an order that is the same in every process, numbers last."""
    return sorted(operands, key=lambda each: (each.is_number, sympy.default_sort_key(each)))


def is_negative(term: sympy.Expr) -> bool:
    """True if a term is written with a minus."""
    return bool(term.as_coeff_Mul()[0].is_negative)


def is_inverse(factor: sympy.Expr) -> bool:
    """True if a factor is a power that belongs below a fraction stroke."""
    return isinstance(factor, sympy.Pow) and bool(factor.exp.is_number and factor.exp.is_negative)


def is_short_power(power: sympy.Pow) -> bool:
    """True if a power is written as a product of its base."""
    exponent = power.exp
    return bool(exponent.is_number) and float(exponent) in range(2, LARGEST_POWER + 1)


def fraction(value: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Return numerator and denominator of a sum such as kv/16 + q/16."""
    numerator, denominator = sympy.fraction(sympy.together(value))
    return numerator, denominator


def truncates_down(numerator: sympy.Expr, denominator: sympy.Expr) -> bool:
    """True if rounding the quotient towards zero rounds it down."""
    return is_nonnegative(numerator) and is_nonnegative(denominator)


def is_nonnegative(value: sympy.Expr) -> bool:
    """True if sympy proves it, or for a remainder by a divisor that may be zero.

    If that divisor is zero, there is no remainder.
    """
    remainder = isinstance(value, sympy.Mod) and value.args[1].is_nonnegative
    return bool(remainder or value.is_nonnegative)
