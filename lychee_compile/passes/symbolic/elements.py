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
from sympy.logic.boolalg import Boolean

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
from lychee_compile.passes.graph.operator_facts import Rule, View
from lychee_compile.passes.symbolic.axes import ZERO, Axes, Axis, Index, Indices, size_expression
from lychee_compile.passes.symbolic.elementwise import (
    Element,
    Flag,
    TooLarge,
    arithmetic,
    branch,
    choose,
    function_of,
    is_truth,
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
        given: Mapping[torch.fx.Node, Element] | None = None,
    ) -> None:
        self.axes, self.names = axes, names
        self._opaque = opaque
        self._given = dict(given or {})
        self._memo: dict[tuple[Any, Indices], Element] = {}
        self._depth = 0

    def of(self, value: Any, indices: Indices = ()) -> Element:
        """Return the element of a tensor node at `indices`, or a number."""
        scalar = scalar_of(value)
        if scalar is not None:
            return scalar
        if value in self._given:
            return self._given[value]
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
            return _RULES[described.rule](self, node, indices)
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

    `view` with a dtype reads the bits of truth values as the numbers 1 and 0.
    """
    reads_bits = node.target is torch.ops.aten.view.dtype
    if operator_of(node).view is not View.COPY and not reads_bits:
        return False
    before, after = value_of(first_input(node)).dtype, value_of(node).dtype
    cuts = before.is_floating_point and not after.is_floating_point and not reads_bits
    return cuts or (before == torch.bool) != (after == torch.bool)


def _divide(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    rounding = argument(node, "rounding_mode")
    if rounding == "trunc":
        return elements.load(node, indices)
    function = (lambda a, b: sympy.floor(a / b)) if rounding else (lambda a, b: a / b)
    first, second = (_operand(elements, node, place, indices) for place in (0, 1))
    return choose(arithmetic(function), first, second)


def _operand(elements: Elements, node: torch.fx.Node, place: int, indices: Indices) -> Element:
    value = node.args[place]
    if isinstance(value, torch.fx.Node) and isinstance(value_of(value), torch.Tensor):
        return elements.of(value, broadcast(indices, shape_of(value), shape_of(node)))
    return elements.of(value)


def _where(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    condition, yes, no = (_operand(elements, node, place, indices) for place in (0, 1, 2))
    return branch(truth(condition), *_of_one_kind(node, yes, no))


def _masked_fill(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    before, hidden, fill = (_operand(elements, node, place, indices) for place in (0, 1, 2))
    return branch(truth(hidden), *_of_one_kind(node, fill, before))


def _of_one_kind(node: torch.fx.Node, *values: Element) -> list[Element]:
    """Return `values` as truth values if `node` holds such, because scalars come as numbers."""
    if value_of(node).dtype != torch.bool:
        return list(values)
    return [choose(truth, value) for value in values]


def _triangle(keeps: Callable[[Index, Index, Any], Boolean]) -> Callable[..., Element]:
    def rule(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
        diagonal = scalar_of(argument(node, "diagonal", 0))
        inside = keeps(indices[-2], indices[-1], diagonal)
        value = elements.of(node.args[0], indices)
        if value_of(node).dtype == torch.bool:
            return sympy.And(inside, truth(value))
        return branch(inside, value, ZERO)

    return rule


def _arange(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    start, step = (
        scalar_of(argument(node, name, usual)) for name, usual in (("start", 0), ("step", 1))
    )
    return start + indices[0] * step


def _constant(value: int) -> Callable[..., Element]:
    def rule(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
        return (
            sympy.sympify(bool(value))
            if value_of(node).dtype == torch.bool
            else sympy.Integer(value)
        )

    return rule


def _full(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    name = "s" if is_operator(node, "scalar_tensor") else "fill_value"
    value = elements.of(argument(node, name))
    return truth(value) if value_of(node).dtype == torch.bool else value


def _index(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    """Return the element of indexing with neighbouring tensors, as in `cache[rows, positions]`."""
    source, chosen = first_input(node), list(argument(node, "indices"))
    places = [place for place, each in enumerate(chosen) if each is not None]
    bools = any(value_of(each).dtype == torch.bool for each in chosen if each is not None)
    if bools or places != list(range(places[0], places[-1] + 1)):
        return elements.load(node, indices)
    tensors = [chosen[place] for place in places]
    rank = max(len(shape_of(each)) for each in tensors)
    before, ours, after = (
        indices[: places[0]], indices[places[0] : places[0] + rank], indices[places[0] + rank :]
    )  # fmt: skip
    wide = torch.broadcast_shapes(
        *(tuple(1 if isinstance(s, torch.SymInt) else s for s in shape_of(t)) for t in tensors)
    )
    if any(isinstance(size, torch.SymInt) for each in tensors for size in shape_of(each)):
        wide = max((shape_of(each) for each in tensors), key=len)
    at = [elements.of(each, broadcast(ours, shape_of(each), wide)) for each in tensors]
    if any(isinstance(each, sympy.Piecewise) or is_truth(each) for each in at):
        return elements.load(node, indices)
    sizes = [shape_of(source)[place] for place in places]
    at = [_from_front(each, size, elements.axes) for each, size in zip(at, sizes, strict=True)]
    found = elements.of(source, (*before, *at, *after))
    # What a tensor holds may be negative: that names an element only of what stays a tensor.
    unsure = [each for each in at if not each.is_nonnegative]
    whole = found.args[0] if isinstance(found, Flag) else found
    named = isinstance(whole, sympy.Indexed) and all(each in whole.indices for each in unsure)
    return found if named or not unsure else elements.load(node, indices)


def _from_front(index: Index, size: Any, axes: Axes) -> Index:
    """Return an index that is negative, and so counts from the end, counted from the front."""
    ends = {axis: axes.sizes[axis] - 1 for axis in index.atoms(Axis)}
    known = index.is_number or (ends and index.free_symbols == set(ends))
    if known and index.xreplace(ends).is_negative:
        return sympy.expand(index + size_expression(size))
    return index


def _index_select(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    source = argument(node, "self")
    dim = argument(node, "dim") % len(shape_of(source))
    return _selected(elements, node, indices, source, dim, argument(node, "index"))


def _embedding(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    """Return the element of an embedding, which selects rows of its weight."""
    chosen = argument(node, "indices")
    return _selected(elements, node, indices, argument(node, "weight"), 0, chosen)


def _selected(
    elements: Elements,
    node: torch.fx.Node,
    indices: Indices,
    source: torch.fx.Node,
    dim: int,
    chosen: torch.fx.Node,
) -> Element:
    """Return the element of `source` that the tensor `chosen` selects along `dim`."""
    rank = len(shape_of(chosen))
    at = elements.of(chosen, indices[dim : dim + rank])
    if isinstance(at, sympy.Piecewise) or is_truth(at):
        return elements.load(node, indices)
    if source.op == "call_function" and not at.is_nonnegative:
        return elements.load(node, indices)
    return elements.of(source, (*indices[:dim], at, *indices[dim + rank :]))


def _index_put(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    """Return the element after `x[mask] = number`."""
    chosen, value = argument(node, "indices"), argument(node, "values")
    whole = len(chosen) == 1 and value_of(chosen[0]).dtype == torch.bool
    whole = whole and not argument(node, "accumulate", False)
    if not whole or len(shape_of(chosen[0])) != len(indices) or shape_of(value):
        return elements.load(node, indices)
    filled, before = elements.of(value), elements.of(node.args[0], indices)
    hidden = truth(elements.of(chosen[0], indices))
    return branch(hidden, *_of_one_kind(node, filled, before))


_RULES: dict[Rule, Callable[[Elements, torch.fx.Node, Indices], Element]] = {
    Rule.DIVIDE: _divide,
    Rule.WHERE: _where,
    Rule.MASKED_FILL: _masked_fill,
    Rule.LOWER_TRIANGLE: _triangle(lambda row, column, diagonal: sympy.Le(column, row + diagonal)),
    Rule.UPPER_TRIANGLE: _triangle(lambda row, column, diagonal: sympy.Ge(column, row + diagonal)),
    Rule.ARANGE: _arange,
    Rule.ONES: _constant(1),
    Rule.ZEROS: _constant(0),
    Rule.FULL: _full,
    Rule.INDEX: _index,
    Rule.INDEX_SELECT: _index_select,
    Rule.EMBEDDING: _embedding,
    Rule.INDEX_PUT: _index_put,
}
