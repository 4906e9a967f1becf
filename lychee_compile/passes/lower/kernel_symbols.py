"""Translate expressions of an attention's axes and of tensors into the symbols of a kernel.

axes (b, kv_head, group, kv), `length`, `slopes`        b, h, kv, `given_length`, `given_slopes`
slopes[4*kv_head + group]                               given_slopes[h]
slopes_2[kv_head]                                       given_slopes[floor(h/4)]
"""

from __future__ import annotations

from typing import TypeVar

import sympy
import torch.fx

from lychee_compile.codegen.specification import KV, KV_LEN, B, Captured, H, Q
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.dataflow import shape_of, value_of
from lychee_compile.passes.symbolic.axes import Axis, size_expression
from lychee_compile.passes.symbolic.elements import symbol_of

Expression = TypeVar("Expression", bound=sympy.Basic)


class KernelSymbols:
    """Symbols of a kernel for all axes and tensors in some expressions of one attention."""

    def __init__(self, attention: Attention, *expressions: sympy.Basic) -> None:
        symbols = set().union(*(each.atoms(sympy.Symbol) for each in expressions))
        tensors = _tensors(attention, symbols)
        self.nodes: tuple[torch.fx.Node, ...] = tuple(sorted(tensors))
        """Tensors that the expressions read, in the order of the graph."""
        names = _names(attention, self.nodes)
        self.captured: tuple[Captured, ...] = tuple(map(captured_as, names, self.nodes))
        """Parameters of the kernel for these tensors, in the same order."""
        self._sizes = {tensors[node]: shape_of(node) for node in self.nodes}
        self._tensor_names = {
            tensors[node]: symbol_of(name, value_of(node).dtype)
            for node, name in zip(self.nodes, names, strict=True)
        }
        self._digits = _digits(attention)
        self._kv_len = _kv_len(attention)

    def __call__(self, expression: Expression) -> Expression:
        """Return `expression` in symbols of the kernel; sizes without a symbol stay as they are."""
        element = expression.replace(lambda each: isinstance(each, sympy.Indexed), self._from_front)
        digits = {axis: digit for axis, (digit, _) in self._digits.items()}
        translated = element.xreplace(self._tensor_names).xreplace(digits)
        for digit, alone in self._digits.values():
            if digit != alone:
                translated = translated.subs(digit, alone)
        return translated.xreplace(self._kv_len)

    def _from_front(self, element: sympy.Indexed) -> sympy.Indexed:
        """Return `element` with every index that may be negative as a remainder.

        A negative index counts from the end.
        """
        base, *indices = element.args
        counted = (
            index if index.is_nonnegative else sympy.Mod(index, size_expression(size))
            for index, size in zip(indices, self._sizes[base.label], strict=True)
        )
        return sympy.Indexed(base, *counted)


def captured_as(name: str, node: torch.fx.Node) -> Captured:
    """Return the parameter of a kernel for a tensor of the graph."""
    dtype = str(value_of(node).dtype).removeprefix("torch.")
    return Captured(name, dtype, len(shape_of(node)))


def _tensors(attention: Attention, symbols: set[sympy.Symbol]) -> dict[torch.fx.Node, sympy.Symbol]:
    """Return the symbols that stand for tensors; the others are axes and sizes."""
    known = attention.names.tensors()
    tensors = {}
    for symbol in symbols:
        node = known.get(symbol.name)
        if node is not None and symbol == symbol_of(symbol.name, value_of(node).dtype):
            tensors[node] = symbol
    return tensors


def _names(attention: Attention, nodes: tuple[torch.fx.Node, ...]) -> list[str]:
    """Return names that are the same in every layer, so that layers share a kernel.

    No name is one of a kernel's own: they begin with "given_".
    """
    names: list[str] = []
    for node in nodes:
        base = name = f"given_{attention.names.base(node)}"
        count = 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


def _digits(attention: Attention) -> dict[Axis, tuple[sympy.Expr, sympy.Expr]]:
    """Return each axis as a digit of b, h, q or kv, in two forms.

    The first form adds up with the other digits, the second is for a digit that is left alone. Two
    axes of sizes 2 and 4 are floor(h/4) and h - 4*floor(h/4), so that 4*a + c becomes h.
    """
    digits: dict[Axis, tuple[sympy.Expr, sympy.Expr]] = {}
    for symbol, axes in zip((B, H, Q, KV), attention.roles.score_layout(), strict=True):
        rest = symbol
        for axis in reversed(axes[1:]):
            size = attention.axes.sizes[axis]
            outer = sympy.floor(rest / size)
            digits[axis] = rest - size * outer, sympy.Mod(rest, size)
            rest = outer
        digits |= dict.fromkeys(axes[:1], (rest, rest))
    return digits


def _kv_len(attention: Attention) -> dict[sympy.Symbol, sympy.Expr]:
    """Return the symbol in the number of keys, as of a growing cache, in terms of KV_LEN."""
    kv_len = sympy.sympify(attention.kv_len)
    for symbol in sorted(kv_len.free_symbols, key=str):
        rest = sympy.expand(kv_len - symbol)
        if symbol not in rest.free_symbols:
            return {symbol: KV_LEN - rest}
    return {}
