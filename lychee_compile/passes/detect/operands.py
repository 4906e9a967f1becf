"""Find the tensors that really hold the operands of an attention, and read their dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch
import torch.fx

from lychee_compile.passes.graph.aliasing import is_pure_view
from lychee_compile.passes.graph.dataflow import is_operator, is_tensor, shape_of, value_of
from lychee_compile.passes.symbolic.axes import Axes, Axis, Indices
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.views import broadcast, source_of

Layout = tuple[tuple[Axis, ...], ...]
"""Axes of each dimension of a tensor, outermost first; none for a dimension of size one."""


@dataclass(frozen=True)
class Operand:
    """A tensor whose dimensions are whole axes, side by side."""

    node: torch.fx.Node
    layout: Layout

    @property
    def axes(self) -> frozenset[Axis]:
        """Return all axes of the tensor."""
        return frozenset(axis for dimension in self.layout for axis in dimension)


@dataclass(frozen=True)
class Place:
    """A tensor on the way back from an operand, and the indices that the operand reads it at."""

    node: torch.fx.Node
    indices: Indices
    factor: sympy.Expr
    """Number that this tensor is multiplied by to give the operand."""

    def operand(self, axes: Axes) -> Operand | None:
        """Return this place as an operand; None if its dimensions are not whole axes."""
        layout = []
        for index, size in zip(self.indices, shape_of(self.node), strict=True):
            digits = axes.digits(index, size)
            if digits is None:
                return None
            layout.append(digits)
        axes_held = [axis for digits in layout for axis in digits]
        repeats = len(set(axes_held)) < len(axes_held)  # a diagonal
        return None if repeats else Operand(self.node, tuple(layout))


def places_behind(
    node: torch.fx.Node, indices: Indices, elements: Elements, casts: bool
) -> list[Place]:
    """Return `node` and the tensors whose elements, times a constant, it shows, nearest first.

    With `casts`, changes of dtype that lose nothing are followed too.
    """
    places = [Place(node, indices, sympy.S.One)]
    while True:
        place = places[-1]
        if elements.is_opaque(place.node):
            return places
        behind = _view_behind(place, elements, casts) or _factor_behind(place, elements)
        if behind is None:
            return places
        places.append(behind)


def _view_behind(place: Place, elements: Elements, casts: bool) -> Place | None:
    if place.node.op != "call_function":
        return None
    viewed = source_of(place.node, place.indices, elements.axes)
    if viewed is None:
        return None
    before, after = value_of(viewed[0]).dtype, value_of(place.node).dtype
    if before != after and not (casts and widens(before, after)):
        return None
    return Place(*viewed, place.factor)


def _factor_behind(place: Place, elements: Elements) -> Place | None:
    multiplies, divides = is_operator(place.node, "mul"), is_operator(place.node, "div")
    if not (multiplies or divides) or place.node.kwargs.get("rounding_mode"):
        return None
    operands = list(place.node.args[:2])
    if multiplies and not is_tensor(operands[0]):
        operands.reverse()
    source, other = operands
    if multiplies and is_tensor(other) and not shape_of(source):  # type: ignore[arg-type]
        source, other = other, source
    if not is_tensor(source):
        return None
    assert isinstance(source, torch.fx.Node)
    same_kind = value_of(source).dtype == value_of(place.node).dtype
    if is_tensor(other) and (shape_of(other) or not same_kind):  # type: ignore[arg-type]
        return None
    value = elements.of(other)
    if not same_kind or not value.is_number or not value.is_finite or value == 0:
        return None
    inside = broadcast(place.indices, shape_of(source), shape_of(place.node))
    return Place(source, inside, place.factor * (value if multiplies else 1 / value))


def widens(before: torch.dtype, after: torch.dtype) -> bool:
    """True if every number of the dtype `before` is a number of `after`."""
    floating = before.is_floating_point and after.is_floating_point
    if not floating or min(before.itemsize, after.itemsize) < 2:
        return before == after
    return torch.promote_types(before, after) == after


def reader_of(places: list[Place], place: Place, product: torch.fx.Node) -> torch.fx.Node:
    """Return the operator that first reads the memory of `place` on the way to `product`."""
    behind = places[: places.index(place)]
    for each in reversed(behind):
        if not is_pure_view(each.node):
            return each.node
    return product


def deepest(places: Iterable[Place], axes: Axes) -> tuple[Place, Operand] | None:
    """Return the last place with whole axes and the fewest of them, so that no head is repeated."""
    best = None
    for place in places:
        operand = place.operand(axes)
        if operand is not None and (best is None or len(operand.axes) <= len(best[1].axes)):
            best = place, operand
    return best
