"""Write the expression of keys or values as `kernels.reference.loads` evaluates it.

scale[b, h, kv, 0] * cache[b, h, kv, d]  ->  "at(0, b, h, kv, 0)*at(1, b, h, kv, d)"
words[b, h, kv, d] // 256 % 256          ->  "((bits(0, b, h, kv, d)//256)%256)"
tail[b, h, kv - s0, d]                   ->  "at(0, b, h, (kv + (-1*size(0))), d)"

Bits of integers that float32 does not hold are read by "bits". Sizes that only a call tells are
numbered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational

from lychee_compile.passes.detect.caching.loads import INDEX, Load
from lychee_compile.passes.graph.dataflow import value_of


def load_text(load: Load, numbers: Sequence[sympy.Symbol] = ()) -> str | None:
    """Return the expression of `load`, its leaves numbered in order; None if it has no text.

    `numbers` are the sizes that only a call tells, in the order of a call.
    """
    try:
        return _Writer(load, "at", numbers).text(load.element)
    except _NoTextError:
        return None


def page_text(load: Load, numbers: Sequence[sympy.Symbol]) -> str:
    """Return the expression of the page that a token lies in; "" if tokens do not lie in pages."""
    return "" if load.pages is None else _Writer(load, "entry", numbers).text(load.pages.page)


_WIDE = (torch.int32, torch.int64, torch.uint32)
"""Dtypes of integers that float32 rounds."""


class _NoTextError(Exception):
    """An operation that has no text, or a size that only a call tells."""


class _Writer:
    """Writes numbers, elements of leaves and choices; raises `_NoTextError` for all else."""

    def __init__(self, load: Load, reader: str, sizes: Sequence[sympy.Symbol]) -> None:
        """Read leaves by the function `reader`; those that are indices are read by "entry"."""
        self._sizes = {size: place for place, size in enumerate(sizes)}
        self._numbers = {name: place for place, (name, _) in enumerate(load.leaves)}
        self._wide = {name for name, leaf in load.leaves if value_of(leaf).dtype in _WIDE}
        self._reader = reader

    def text(self, value: Any) -> str:
        """Return the text of an expression."""
        if value.is_Number and value.is_finite:
            return f"({value})" if value.is_negative else str(value)
        for kind, write in _KINDS.items():
            if isinstance(value, kind):
                return write(self, value)
        raise _NoTextError

    def symbol(self, value: sympy.Symbol) -> str:
        """Return an index, a size, or a leaf of one number."""
        if value in INDEX:
            return str(value)
        if value in self._sizes:
            return f"size({self._sizes[value]})"
        return f"{self._reader_of(value.name)}({self._number(value.name)})"

    def indexed(self, value: sympy.Indexed) -> str:
        """Return an element of a leaf."""
        name = str(value.base)
        with self._reading("entry"):
            places = [self.text(each) for each in value.indices]
        return f"{self._reader_of(name)}({', '.join([self._number(name), *places])})"

    @contextmanager
    def _reading(self, reader: str) -> Iterator[None]:
        before, self._reader = self._reader, reader
        try:
            yield
        finally:
            self._reader = before

    def _reader_of(self, name: str) -> str:
        return "at" if self._reader == "bits" and name not in self._wide else self._reader

    def _cut(self, write: Callable[[], str]) -> str:
        """Return the text of a quotient or remainder, which takes bits of what it reads."""
        with self._reading("bits" if self._reader == "at" else self._reader):
            return write()

    def _number(self, name: str) -> str:
        if name not in self._numbers:
            raise _NoTextError
        return str(self._numbers[name])

    def choice(self, value: sympy.Piecewise) -> str:
        """Return the first value whose condition holds."""
        *choices, (text, holds) = value.args
        if holds != sympy.true:
            raise _NoTextError
        text = self.text(text)
        for each, condition in reversed(choices):
            text = f"where({self.text(condition)}, {self.text(each)}, {text})"
        return text

    def relation(self, value: Relational) -> str:
        """Return a comparison; integers are compared as they are."""
        whole = value.lhs.is_integer and value.rhs.is_integer
        with self._reading("entry" if whole else self._reader):
            return f"({self.text(value.lhs)} {value.rel_op} {self.text(value.rhs)})"

    def product(self, value: sympy.Expr) -> str:
        """Return a product, a quotient or a power."""
        above, below = sympy.fraction(value)
        if below != 1:
            return f"({self.text(above)})/({self.text(below)})"
        if isinstance(value, sympy.Pow):
            if not value.exp.is_Integer:
                raise _NoTextError
            return f"({self.text(value.base)})**{value.exp}"
        return self.joined("*")(value)

    def joined(self, sign: str) -> Callable[[Any], str]:
        """Return a function that writes all arguments with a sign between them."""
        return lambda value: "(" + sign.join(map(self.text, value.args)) + ")"

    def floor(self, value: sympy.floor) -> str:
        """Return a quotient of integers."""
        above, below = sympy.fraction(sympy.together(value.args[0]))
        return self._cut(lambda: f"(({self.text(above)})//({self.text(below)}))")

    def remainder(self, value: sympy.Mod) -> str:
        """Return a remainder."""
        return self._cut(lambda: self.joined("%")(value))


_KINDS: dict[type, Callable[[_Writer, Any], str]] = {
    sympy.Symbol: _Writer.symbol,
    sympy.Indexed: _Writer.indexed,
    sympy.Add: lambda writer, value: writer.joined(" + ")(value),
    sympy.Mul: _Writer.product,
    sympy.Pow: _Writer.product,
    sympy.Piecewise: _Writer.choice,
    Relational: _Writer.relation,
    sympy.And: lambda writer, value: writer.joined(" & ")(value),
    sympy.Or: lambda writer, value: writer.joined(" | ")(value),
    sympy.Not: lambda writer, value: f"~{writer.text(value.args[0])}",
    sympy.floor: _Writer.floor,
    sympy.Mod: _Writer.remainder,
}
"""Function that writes each kind of expression."""
