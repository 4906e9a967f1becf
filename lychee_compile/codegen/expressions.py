"""What the printer asks about sympy expressions."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

import sympy

LARGEST_POWER = 8
"""Up to which a power is written as a product."""


def as_float32(value: sympy.Expr) -> float:
    """Infinite where float32 is; otherwise as precise as it comes."""
    number = float(value)
    try:
        struct.pack("<f", number)
    except OverflowError:
        return math.copysign(math.inf, number)
    return number


def indices_of(element: sympy.Symbol | sympy.Indexed) -> tuple[sympy.Expr, ...]:
    """Of an element of a tensor; none of one without dimensions."""
    return element.indices if isinstance(element, sympy.Indexed) else ()


def ordered(operands: Iterable[sympy.Basic]) -> list[sympy.Basic]:
    """As in every other process; numbers last."""
    return sorted(operands, key=lambda each: (each.is_number, sympy.default_sort_key(each)))


def is_negative(term: sympy.Expr) -> bool:
    """Whether it is written with a minus."""
    return bool(term.as_coeff_Mul()[0].is_negative)


def is_inverse(factor: sympy.Expr) -> bool:
    """Whether it is a power that belongs below a fraction stroke."""
    return isinstance(factor, sympy.Pow) and bool(factor.exp.is_number and factor.exp.is_negative)


def is_short_power(power: sympy.Pow) -> bool:
    """Whether it is written as a product of its base."""
    exponent = power.exp
    return bool(exponent.is_number) and float(exponent) in range(2, LARGEST_POWER + 1)


def fraction(value: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Numerator and denominator of a sum such as kv/16 + q/16."""
    numerator, denominator = sympy.fraction(sympy.together(value))
    return numerator, denominator


def truncates_down(numerator: sympy.Expr, denominator: sympy.Expr) -> bool:
    """Whether rounding towards zero is rounding down."""
    return is_nonnegative(numerator) and is_nonnegative(denominator)


def is_nonnegative(value: sympy.Expr) -> bool:
    """What sympy proves, and a remainder by what may be zero: then there is no remainder."""
    remainder = isinstance(value, sympy.Mod) and value.args[1].is_nonnegative
    return bool(remainder or value.is_nonnegative)
