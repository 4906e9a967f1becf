"""Expressions in the words of Python, as the report shows them.

Eq(Mod(kv, 2), 0)        kv % 2 == 0
"""

from __future__ import annotations

from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter


def formula(expression: sympy.Basic) -> str:
    """Return an expression as text, with `==`, `!=` and `%` where sympy writes functions."""
    return str(_Printer().doprint(expression))


class _Printer(StrPrinter):
    def parenthesize(self, item: Any, level: int, strict: bool = False) -> str:
        """Return `item` as text, in parentheses if it binds no tighter than `level`."""
        if isinstance(item, Relational) and level >= PRECEDENCE["Relational"]:
            return f"({self._print(item)})"
        return str(super().parenthesize(item, level, strict))

    def _print_Relational(self, relation: Relational) -> str:  # noqa: N802
        left, right = (self.parenthesize(each, PRECEDENCE["Relational"]) for each in relation.args)
        return f"{left} {relation.rel_op} {right}"

    def _print_Mod(self, function: sympy.Mod) -> str:  # noqa: N802
        left, right = (self._factor(each) for each in function.args)
        return f"{left} % {right}"

    def _factor(self, expression: Any) -> str:
        return str(self.parenthesize(expression, PRECEDENCE["Mul"], strict=False))
