"""Find the position that a write puts tokens at: one that all heads share, and perhaps all rows.

cache[arange(rows)[:, None], positions]               positions
scatter(cache, 2, positions.view(-1, 1).expand(...))  positions
where(arange(slots) == position, new, cache)          position
cache * (1 - hot) + new * hot                         position, if hot is arange == position
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any

import sympy
import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.graph.aliasing import storage_of
from lychee_compile.passes.graph.dataflow import (
    ancestors,
    is_tensor,
    same,
    scalar_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.reasons import Reason, ReasonedError
from lychee_compile.passes.symbolic.axes import ZERO, Axes, Axis, Indices, with_finer_axes
from lychee_compile.passes.symbolic.elements import Elements
from lychee_compile.passes.symbolic.views import broadcast

NEAREST = 60
"""Largest number of operators among which a position is looked for."""
Shape = tuple[int | torch.SymInt, ...]


class NotBoundError(ReasonedError):
    """Keys belong to no cache whose index can be kept, for a reason.

    `kind` is "none", or "sliding" for a cache that keeps a window of keys only.
    """

    def __init__(self, reason: Reason, kind: str = "none") -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Positions:
    """Positions, one after the other."""

    node: torch.fx.Node | int
    """A tensor of integers that holds them; a number or a symbolic size if there is one only."""
    dim: int | None
    """Dimension of `node` that runs over tokens; None if there is one only."""
    rows: int | None = None
    """Dimension of the cache whose entries have positions of their own; None if all share them."""
    row_dim: int | None = None
    """Dimension of `node` that runs over these entries."""


class PositionReader:
    """Reads positions in one graph; `written` are the tensors whose memory the graph changes."""

    def __init__(self, graph: torch.fx.Graph, written: frozenset[torch.fx.Node]) -> None:
        self._graph, self._written = graph, written

    def at_all_rows(
        self, indices: Sequence[torch.fx.Node | None], shape: Shape, token_dim: int
    ) -> Positions:
        """Return the positions at which `x[indices] = ...` writes to all rows of a tensor.

        Raises `NotBoundError` if it writes to some rows only.
        """
        index = indices[token_dim] if token_dim < len(indices) else None
        given = [each for each in indices if each is not None]
        if index is None or any(value_of(each).dtype == torch.bool for each in given):
            raise NotBoundError(reasons.CACHE_NOT_BY_TOKEN())
        if given == [index] and len(shape_of(index)) < 2:
            return Positions(index, 0 if shape_of(index) else None)
        wide = broadcast_shape([shape_of(each) for each in given])

        def match(axes: Axes) -> Positions:
            elements, ours = self._elements(axes), axes_over(axes, wide)
            taken: dict[sympy.Basic, int] = {}
            for dim, each in enumerate(indices):
                if each is not None and dim != token_dim:
                    place = elements.of(each, broadcast(ours, shape_of(each), wide))
                    taken.update(dict.fromkeys(_covered(place, shape[dim], ours, wide), dim))
            position = elements.of(index, broadcast(ours, shape_of(index), wide))
            return self.holder(elements, position, index, taken)

        return self._found(match)

    def same_everywhere(self, index: torch.fx.Node, shape: Shape, token_dim: int) -> Positions:
        """Return the positions in `index`, if it repeats them over all dimensions but one.

        Raises `NotBoundError` if it does not.
        """
        sizes = shape_of(index)
        others = [dim for dim in range(len(shape)) if dim != token_dim]
        if len(sizes) != len(shape) or not all(same(sizes[dim], shape[dim]) for dim in others):
            raise NotBoundError(reasons.CACHE_NOT_BY_TOKEN())

        def match(axes: Axes) -> Positions:
            elements, ours = self._elements(axes), axes_over(axes, sizes)
            position = elements.of(index, ours)
            return self.holder(elements, position, index, _others(ours, token_dim))

        return self._found(match)

    def blend(self, node: torch.fx.Node, token_dim: int) -> tuple[torch.fx.Node, Positions] | None:
        """Return an input and a position if `node` is the input but for the slot there.

        The position is a number, a symbolic size or a tensor. None if `node` is anything else.
        """
        if node.op != "call_function" or token_dim >= len(shape_of(node)):
            return None
        caches = [
            each
            for each in islice(ancestors(node), NEAREST)
            if each.op == "placeholder"
            and is_tensor(each)
            and value_of(each).dtype == value_of(node).dtype
            and _alike(shape_of(each), shape_of(node))
        ]
        return with_finer_axes(lambda axes: self._blend(axes, node, caches, token_dim))

    def _blend(
        self, axes: Axes, node: torch.fx.Node, caches: list[torch.fx.Node], token_dim: int
    ) -> tuple[torch.fx.Node, Positions] | None:
        elements, ours = self._elements(axes), axes_over(axes, shape_of(node))
        choice = _two_ways(elements.of(node, ours)) if caches else None
        if choice is None:
            return None
        equal, kept = choice
        cache = next((each for each in caches if elements.load(each, ours) == kept), None)
        token = ours[token_dim]
        position = _solved(equal, token) if isinstance(token, Axis) else None
        if cache is None or position is None:
            return None
        return cache, self.holder(elements, position, node, _others(ours, token_dim))

    def _elements(self, axes: Axes) -> Elements:
        module = self._graph.owning_module
        assert module is not None
        return self.elements(axes, Names(module))

    def elements(self, axes: Axes, names: Names) -> Elements:
        """Return the elements of the tensors of the graph that are not written to, by name."""
        return Elements(axes, names, self._written)

    def holder(
        self,
        elements: Elements,
        position: sympy.Basic,
        index: torch.fx.Node,
        rows: Mapping[sympy.Basic, int],
    ) -> Positions:
        """Return the tensor behind `index`, or the number, whose elements are `position`.

        `rows` are the axes over which the write covers a whole dimension of the cache. Raises
        `NotBoundError` if positions differ along more than one of them, or no tensor is found.
        """
        if position.is_Integer:
            return Positions(int(position), None)
        free = _axes(position)
        apart = sorted(free & set(rows), key=str)
        if len(apart) > 1:
            raise NotBoundError(reasons.CACHE_ROWS_APART())
        order = [*apart, *sorted(free - set(apart), key=str)]
        for node in islice(ancestors(index), NEAREST):
            if storage_of(node) in self._written:
                continue
            if not free and not is_tensor(node) and scalar_of(node) == position:
                return Positions(node, None)
            dims = self._dims_of(elements, node, position, order)
            if dims is None:
                continue
            token = next(
                (d for d, axis in zip(dims, order, strict=True) if axis not in apart), None
            )
            if not apart:
                return Positions(node, token)
            return Positions(node, token, rows[apart[0]], dims[0])
        raise NotBoundError(reasons.CACHE_WRITE_UNKNOWN())

    def _dims_of(
        self,
        elements: Elements,
        node: torch.fx.Node,
        position: sympy.Basic,
        order: Sequence[sympy.Basic],
    ) -> tuple[int, ...] | None:
        """Return the dimensions of a tensor of integers that run over the axes `order`.

        None if its elements are not `position`.
        """
        if not is_tensor(node) or value_of(node).dtype not in (torch.int32, torch.int64):
            return None
        sizes = shape_of(node)
        long = [dim for dim, size in enumerate(sizes) if not same(size, 1)]
        if len(long) != len(order) or len(order) > 2:
            return None
        for dims in permutations(long):
            extents = [elements.axes.size(sizes[dim]) for dim in dims]
            at = [ZERO] * len(sizes)
            for dim, axis in zip(dims, order, strict=True):
                at[dim] = axis
            whole = extents == [elements.axes.sizes[axis] for axis in order]
            if whole and elements.of(node, tuple(at)) == position:
                return dims
        return None

    def _found(self, match: Any) -> Positions:
        found = with_finer_axes(match)
        if found is None:
            raise NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
        return found


def axes_over(axes: Axes, shape: Shape) -> Indices:
    """Return an index over each dimension of a shape."""
    return tuple(axes.index(f"w{dim}", size) for dim, size in enumerate(shape))


def _others(ours: Indices, token_dim: int) -> dict[sympy.Basic, int]:
    """Return the axes of all dimensions but that of tokens, with their dimensions."""
    return {
        axis: dim for dim, index in enumerate(ours) if dim != token_dim for axis in _axes(index)
    }


def _axes(expression: sympy.Basic) -> set[sympy.Basic]:
    return expression.atoms(Axis)


def _alike(left: Shape, right: Shape) -> bool:
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


def broadcast_shape(shapes: list[Shape]) -> Shape:
    """Return the shape that all of `shapes` broadcast to."""
    rank = max(map(len, shapes))
    wide: list[Any] = [1] * rank
    for shape in shapes:
        for dim, size in enumerate(shape, rank - len(shape)):
            if not same(size, 1):
                wide[dim] = size
    return tuple(wide)


def _covered(place: sympy.Basic, size: Any, ours: Indices, wide: Shape) -> set[sympy.Basic]:
    """Return the axis along which an index runs over all of a dimension of `size` entries.

    Raises `NotBoundError` if it does not.
    """
    if same(size, 1):
        return set()
    for axis, extent in zip(ours, wide, strict=True):
        if place == axis and same(extent, size):
            return {axis}
    raise NotBoundError(reasons.CACHE_NOT_BY_TOKEN())


def _two_ways(element: sympy.Basic) -> tuple[sympy.Eq, sympy.Basic] | None:
    """Return the condition and the other value of a choice that an equation decides, else None."""
    if not isinstance(element, sympy.Piecewise):
        return None
    (first, condition), *between, (last, _) = element.args
    if any(each[1] != condition for each in between):
        return None
    if isinstance(condition, sympy.Ne):
        return sympy.Eq(*condition.args, evaluate=False), first
    return (condition, last) if isinstance(condition, sympy.Eq) else None


def _solved(equal: sympy.Eq, axis: Axis) -> sympy.Expr | None:
    """Return what `axis` is equal to; None if the equation is not linear in it."""
    try:
        difference = sympy.expand(equal.lhs - equal.rhs)
    except TypeError:
        return None
    slope = difference.coeff(axis)
    if slope not in (1, -1):
        return None
    rest = sympy.expand(difference - slope * axis)
    return None if rest.has(axis) else sympy.expand(-rest * slope)
