"""Tell what an element of a tensor is: an expression of axes and of elements of graph inputs.

    arange(kv_len) <= arange(query_len)[:, None] + length        kv <= q + length

Numbers are expressions, bool tensors are sympy Booleans, and a choice is a `Piecewise` at the top.
An element that no rule describes stays an element of its tensor: `name[b, q]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx

from lychee_compile.passes.graph.aliasing import storage_of
from lychee_compile.passes.graph.dataflow import (
    argument,
    first_input,
    is_operator,
    is_tensor,
    operator_of,
    scalar_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.graph.operator_facts import View
from lychee_compile.passes.symbolic.axes import Axes, Indices
from lychee_compile.passes.symbolic.element_rules import RULES
from lychee_compile.passes.symbolic.elementwise import (
    Element,
    Flag,
    TooLarge,
    arithmetic,
    choose,
    function_of,
    number,
    truth,
)
from lychee_compile.passes.symbolic.views import broadcast, source_of

DEEPEST = 40
"""Largest number of operators that an element is followed through."""


class Elements:
    """The elements of the tensors of one graph, as expressions."""

    def __init__(
        self,
        axes: Axes,
        names: Names,
        opaque: frozenset[torch.fx.Node] = frozenset(),
        known: Mapping[torch.fx.Node, Element] | None = None,
    ) -> None:
        self.axes, self.names = axes, names
        self._opaque = opaque
        self._known = dict(known or {})
        self._memo: dict[tuple[Any, Indices], Element] = {}
        self._depth = 0

    def of(self, value: Any, indices: Indices = ()) -> Element:
        """Return the element of a tensor node at `indices`, or a number."""
        scalar = scalar_of(value)
        if scalar is not None:
            return scalar
        if value in self._known:
            return self._known[value]
        key = (value, indices)
        if key not in self._memo:
            self._memo[key] = self._bounded(value, indices)
        return self._memo[key]

    def _bounded(self, node: torch.fx.Node, indices: Indices) -> Element:
        self._depth += 1
        try:
            return (
                self.load(node, indices) if self._depth > DEEPEST else self._evaluate(node, indices)
            )
        except (TooLarge, TypeError, NotImplementedError):  # sympy raises where kinds do not mix
            return self.load(node, indices)
        finally:
            self._depth -= 1

    def is_opaque(self, node: torch.fx.Node) -> bool:
        """True if `node` shows memory that is written to through another view."""
        return bool(self._opaque) and storage_of(node) in self._opaque

    def load(self, node: torch.fx.Node, indices: Indices) -> Element:
        """Return an element of `node` by name, without a look at what made it."""
        name = self.names.of(node)
        dtype = value_of(node).dtype if is_tensor(node) else torch.float32
        symbol = symbol_of(name, dtype)
        element = sympy.Indexed(sympy.IndexedBase(symbol), *indices) if indices else symbol
        return Flag(element) if dtype == torch.bool else element

    def _evaluate(self, node: torch.fx.Node, indices: Indices) -> Element:
        if self.is_opaque(node) or node.op != "call_function":
            constant = self.names.constant(node)
            return self.load(node, indices) if constant is None else constant
        described = operator_of(node)
        if _changes_kind(node):
            return self._converted(node, indices)
        viewed = source_of(node, indices, self.axes)
        if viewed is not None:
            return self.of(*viewed)
        if described.rule is not None:
            return RULES[described.rule](self, node, indices)
        function = function_of(described)
        if function is None or len(shape_of(node)) != len(indices):
            return self.load(node, indices)
        return self._elementwise(function, node, indices)

    def _elementwise(
        self, function: Callable[..., Element], node: torch.fx.Node, indices: Indices
    ) -> Element:
        operands = []
        for value in node.args:
            if isinstance(value, torch.fx.Node) and isinstance(value_of(value), torch.Tensor):
                operands.append(self.of(value, broadcast(indices, shape_of(value), shape_of(node))))
            elif isinstance(value, (int, float, torch.fx.Node)):
                operands.append(self.of(value))
        alpha = scalar_of(argument(node, "alpha", 1))
        if alpha is None:
            return self.load(node, indices)
        if alpha != 1:
            scaled = 0 if is_operator(node, "rsub") else 1
            operands = operands[:2]
            operands[scaled] = choose(arithmetic(lambda value: value * alpha), operands[scaled])
        result = choose(function, *operands)
        return choose(truth, result) if value_of(node).dtype == torch.bool else result

    def _converted(self, node: torch.fx.Node, indices: Indices) -> Element:
        element = self.of(first_input(node), indices)
        before, after = value_of(first_input(node)).dtype, value_of(node).dtype
        if after == torch.bool:
            return choose(truth, element)
        if before.is_floating_point and not element.is_integer:
            return self.load(node, indices)
        return choose(number, element)


def symbol_of(name: str, dtype: torch.dtype) -> sympy.Symbol:
    """Return the symbol of a tensor; it is an integer if the dtype is one."""
    kind = {} if dtype.is_floating_point or dtype == torch.bool else {"integer": True}
    return sympy.Symbol(name, **kind)


def _changes_kind(node: torch.fx.Node) -> bool:
    """True if a copy goes to truth values, or from them, or cuts off fractions.

    `view` with a dtype reads the bits of truth values as the numbers 1 and 0, and bytes of other
    numbers as truth values. If a number has more bytes, it makes several elements.
    """
    reads_bits = node.target is torch.ops.aten.view.dtype
    if operator_of(node).view is not View.COPY and not reads_bits:
        return False
    before, after = value_of(first_input(node)).dtype, value_of(node).dtype
    if reads_bits and before.itemsize != after.itemsize:
        return False
    cuts = before.is_floating_point and not after.is_floating_point and not reads_bits
    return cuts or (before == torch.bool) != (after == torch.bool)
