"""Printed expressions: texts of which the outermost operator is known, and literals."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import sympy

from lychee_compile.codegen.expressions import as_float32


class Unprintable(ValueError):  # noqa: N818  the site is left as it was
    """An expression that has no Triton form. The message names the part that has none."""


class Level(IntEnum):
    """Precedence of the outermost operator of a text: a higher level binds more tightly."""

    COMPARISON = 0
    LOGIC = 1
    SUM = 2
    PRODUCT = 3
    ATOM = 4


class Form(NamedTuple):
    """Triton source of an expression."""

    text: str
    level: Level = Level.ATOM

    def within(self, level: Level) -> str:
        """Return the text, in parentheses unless it binds at least as tightly as `level`."""
        return self.text if self.level >= level else f"({self.text})"


def real_number(value: sympy.Expr) -> sympy.Expr:
    """Return a number. Raises Unprintable if it is not real."""
    if not value.is_extended_real:
        raise Unprintable(f"{value} is no real number")
    return value


def literal(value: sympy.Expr) -> Form:
    """Print a literal: an integer, or a float32 number."""
    if isinstance(value, sympy.Integer):
        if not -(2**63) <= int(value) < 2**63:
            raise Unprintable(f"{value} needs more than 64 bits")
        return Form(str(value), Level.SUM if value < 0 else Level.ATOM)
    number = as_float32(real_number(value))
    if math.isinf(number):
        return Form(f'float("{number}")')
    return Form(repr(number), Level.SUM if number < 0 else Level.ATOM)
