"""Write the expression of keys or values as `kernels.reference.loads` evaluates it.

scale[b, h, kv, 0] * cache[b, h, kv, d]  ->  "at(0, b, h, kv, 0)*at(1, b, h, kv, d)"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from lychee_compile.passes.detect.caching.loads import INDEX, Load


def load_text(load: Load) -> str | None:
    """Return the expression of `load`, its leaves numbered in order; None if it has no text."""
    try:
        return _Printer(load).doprint(load.element)
    except _NoTextError:
        return None


def page_text(load: Load) -> str:
    """Return the expression of the page that a token lies in; "" if tokens do not lie in pages."""
    return "" if load.pages is None else _Printer(load, "entry").doprint(load.pages.page)


class _NoTextError(Exception):
    """An operation, or a size that only a call tells."""


class _Printer(StrPrinter):
    """Writes numbers, elements of leaves and choices; raises `_NoTextError` for all else."""

    printmethod = "_no_method"  # expressions do not print themselves

    def __init__(self, load: Load, reader: str = "at") -> None:
        super().__init__({"order": "none"})
        names = [name for name, _ in load.leaves]
        self._numbers: Mapping[str, int] = {name: place for place, name in enumerate(names)}
        self._reader = reader

    def _print_Symbol(self, expr: sympy.Symbol) -> str:
        if expr in INDEX:
            return str(expr)
        if expr.name not in self._numbers:
            raise _NoTextError
        return f"{self._reader}({self._numbers[expr.name]})"

    def _print_Indexed(self, expr: sympy.Indexed) -> str:
        number = self._numbers.get(str(expr.base))
        if number is None:
            raise _NoTextError
        reader, self._reader = self._reader, "entry"
        places = [self._print(each) for each in expr.indices]
        self._reader = reader
        return f"{reader}({', '.join([str(number), *places])})"

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *choices, (last, holds) = expr.args
        if holds != sympy.true:
            raise _NoTextError
        text = self._print(last)
        for value, condition in reversed(choices):
            text = f"where({self._print(condition)}, {self._print(value)}, {text})"
        return text

    def _print_Relational(self, expr: Any) -> str:
        signs = {"Equality": "==", "Unequality": "!="}
        name = type(expr).__name__
        return f"({self._print(expr.lhs)} {signs.get(name, expr.rel_op)} {self._print(expr.rhs)})"

    def _print_And(self, expr: sympy.And) -> str:
        return "(" + " & ".join(map(self._print, expr.args)) + ")"

    def _print_Or(self, expr: sympy.Or) -> str:
        return "(" + " | ".join(map(self._print, expr.args)) + ")"

    def _print_Not(self, expr: sympy.Not) -> str:
        return f"~{self._print(expr.args[0])}"

    def _print_floor(self, expr: sympy.floor) -> str:
        above, below = sympy.fraction(sympy.together(expr.args[0]))
        return f"(({self._print(above)})//({self._print(below)}))"

    def _print_Mod(self, expr: sympy.Mod) -> str:
        return f"(({self._print(expr.args[0])})%({self._print(expr.args[1])}))"

    def _print_Function(self, expr: Any) -> str:
        raise _NoTextError

    def emptyPrinter(self, expr: Any) -> str:
        raise _NoTextError
