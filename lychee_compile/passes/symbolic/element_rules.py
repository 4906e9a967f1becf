"""Tell how operators that are neither views nor elementwise functions make their elements.

There is one small function for each `Rule` of the table of operators. Each returns the element at
some indices, as an expression, and asks a `Reader` for the elements of the operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import sympy
import torch
import torch.fx
from sympy.logic.boolalg import Boolean

from lychee_compile.passes.graph.dataflow import (
    argument,
    first_input,
    is_operator,
    scalar_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import Rule
from lychee_compile.passes.symbolic.axes import ZERO, Axes, Axis, Index, Indices, size_expression
from lychee_compile.passes.symbolic.elementwise import (
    Element,
    Flag,
    arithmetic,
    branch,
    choose,
    is_truth,
    truth,
)
from lychee_compile.passes.symbolic.views import broadcast


class Reader(Protocol):
    """Reads elements of tensors, as `elements.Elements` does."""

    @property
    def axes(self) -> Axes:
        """Axes that indices are made of."""

    def of(self, value: Any, indices: Indices = ()) -> Element:
        """Return the element of a tensor node at `indices`, or a number."""

    def load(self, node: torch.fx.Node, indices: Indices) -> Element:
        """Return an element of `node` by name."""


def _divide(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    rounding = argument(node, "rounding_mode")
    if rounding == "trunc":
        return elements.load(node, indices)
    function = (lambda a, b: sympy.floor(a / b)) if rounding else (lambda a, b: a / b)
    first, second = (_operand(elements, node, place, indices) for place in (0, 1))
    return choose(arithmetic(function), first, second)


def _operand(elements: Reader, node: torch.fx.Node, place: int, indices: Indices) -> Element:
    value = node.args[place]
    if isinstance(value, torch.fx.Node) and isinstance(value_of(value), torch.Tensor):
        return elements.of(value, broadcast(indices, shape_of(value), shape_of(node)))
    return elements.of(value)


def _where(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    condition, yes, no = (_operand(elements, node, place, indices) for place in (0, 1, 2))
    return branch(truth(condition), *_of_one_kind(node, yes, no))


def _masked_fill(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    before, hidden, fill = (_operand(elements, node, place, indices) for place in (0, 1, 2))
    return branch(truth(hidden), *_of_one_kind(node, fill, before))


def _of_one_kind(node: torch.fx.Node, *values: Element) -> list[Element]:
    """Return `values` as truth values if `node` holds such, because scalars come as numbers."""
    if value_of(node).dtype != torch.bool:
        return list(values)
    return [choose(truth, value) for value in values]


def _triangle(keeps: Callable[[Index, Index, Any], Boolean]) -> Callable[..., Element]:
    def rule(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
        diagonal = scalar_of(argument(node, "diagonal", 0))
        inside = keeps(indices[-2], indices[-1], diagonal)
        value = elements.of(node.args[0], indices)
        if value_of(node).dtype == torch.bool:
            return sympy.And(inside, truth(value))
        return branch(inside, value, ZERO)

    return rule


def _arange(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    start, step = (
        scalar_of(argument(node, name, usual)) for name, usual in (("start", 0), ("step", 1))
    )
    return start + indices[0] * step


def _constant(value: int) -> Callable[..., Element]:
    def rule(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
        return (
            sympy.sympify(bool(value))
            if value_of(node).dtype == torch.bool
            else sympy.Integer(value)
        )

    return rule


def _full(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    name = "s" if is_operator(node, "scalar_tensor") else "fill_value"
    value = elements.of(argument(node, name))
    return truth(value) if value_of(node).dtype == torch.bool else value


def _index(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
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
    element = elements.of(source, (*before, *at, *after))
    # What a tensor holds may be negative: that names an element only of what stays a tensor.
    unsure = [each for each in at if not each.is_nonnegative]
    whole = element.args[0] if isinstance(element, Flag) else element
    named = isinstance(whole, sympy.Indexed) and all(each in whole.indices for each in unsure)
    return element if named or not unsure else elements.load(node, indices)


def _from_front(index: Index, size: Any, axes: Axes) -> Index:
    """Return an index that is negative, and so counts from the end, counted from the front."""
    ends = {axis: axes.sizes[axis] - 1 for axis in index.atoms(Axis)}
    known = index.is_number or (ends and index.free_symbols == set(ends))
    if known and index.xreplace(ends).is_negative:
        return sympy.expand(index + size_expression(size))
    return index


def _index_select(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    source = argument(node, "self")
    dim = argument(node, "dim") % len(shape_of(source))
    return _selected(elements, node, indices, source, dim, argument(node, "index"))


def _embedding(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    """Return the element of an embedding, which selects rows of its weight."""
    chosen = argument(node, "indices")
    return _selected(elements, node, indices, argument(node, "weight"), 0, chosen)


def _selected(
    elements: Reader,
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


def _index_put(elements: Reader, node: torch.fx.Node, indices: Indices) -> Element:
    """Return the element after `x[mask] = number`."""
    chosen, value = argument(node, "indices"), argument(node, "values")
    whole = len(chosen) == 1 and value_of(chosen[0]).dtype == torch.bool
    whole = whole and not argument(node, "accumulate", False)
    if not whole or len(shape_of(chosen[0])) != len(indices) or shape_of(value):
        return elements.load(node, indices)
    filled, before = elements.of(value), elements.of(node.args[0], indices)
    hidden = truth(elements.of(chosen[0], indices))
    return branch(hidden, *_of_one_kind(node, filled, before))


RULES: dict[Rule, Callable[[Reader, torch.fx.Node, Indices], Element]] = {
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
"""The function of each rule in the table of operators."""
