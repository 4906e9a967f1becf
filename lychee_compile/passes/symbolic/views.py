"""Carry indices back through views and copies: tell where an element of a view comes from.

There is one small function for each kind of view. Each returns the source tensor and, from an index
for each dimension of the output, the index for each dimension of the source.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.fx

from lychee_compile.passes.graph.dataflow import (
    argument,
    first_input,
    is_operator,
    operator_of,
    scalar_of,
    shape_of,
)
from lychee_compile.passes.graph.operator_facts import View
from lychee_compile.passes.symbolic.axes import ZERO, Axes, Indices, size_expression

Source = tuple[torch.fx.Node, Indices]


def source_of(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source | None:
    """Return the tensor that `node` is a view or copy of, with indices; None if it is no view."""
    if node.target is operator.getitem:
        return _part_of_several(node, indices)
    view = operator_of(node).view
    rule = None if view is None else _RULES.get(view)
    return None if rule is None else rule(node, indices, axes)


def _copy(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    return first_input(node), indices


def _reshape(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source | None:
    source = first_input(node)
    if node.target is torch.ops.aten.view.dtype:  # the same bits read as other numbers
        return None
    return source, axes.reshape(indices, shape_of(node), shape_of(source))


def _broadcast(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    source = first_input(node)
    return source, broadcast(indices, shape_of(source), shape_of(node))


def broadcast(indices: Indices, sizes: Any, wide: Any) -> Indices:
    """Return indices into a tensor of `sizes` that broadcasts to `wide`, which `indices` have."""
    ours = indices[len(indices) - len(sizes) :]
    wide = wide[len(wide) - len(sizes) :]
    return tuple(
        ZERO if size_expression(size) == 1 and size_expression(out) != 1 else index
        for index, size, out in zip(ours, sizes, wide, strict=True)
    )


def _permuted(order: list[int]) -> Callable[[Indices], Indices]:
    """Return a function to the source's indices if output dimension i is `order[i]` there."""
    return lambda indices: tuple(indices[order.index(place)] for place in range(len(order)))


def _permute(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    order = [int(dim) % len(indices) for dim in argument(node, "dims")]
    return first_input(node), _permuted(order)(indices)


def _swap(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    """Follow an operator that names two dimensions after its input."""
    formals = node.target._schema.arguments[1:3]  # type: ignore[union-attr]
    first, second = (int(argument(node, each.name)) for each in formals)
    return _swapped(node, indices, first, second)


def _swap_last(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    return _swapped(node, indices, -2, -1)


def _swapped(node: torch.fx.Node, indices: Indices, first: int, second: int) -> Source:
    order = list(range(len(indices)))
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return first_input(node), _permuted(order)(indices)


def _move(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    """Follow `movedim`, which names source and destination dimensions."""
    rank = len(indices)
    named = (argument(node, "source"), argument(node, "destination"))
    source, goal = (
        [dim % rank for dim in (each if isinstance(each, (list, tuple)) else [each])]
        for each in named
    )
    rest = [place for place in range(rank) if place not in source]
    order = [source[goal.index(place)] if place in goal else rest.pop(0) for place in range(rank)]
    return first_input(node), _permuted(order)(indices)


def _reverse(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    return first_input(node), indices[::-1]


def _select(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source | None:
    source = first_input(node)
    dim = argument(node, "dim") % len(shape_of(source))
    at = _bound(argument(node, "index"), shape_of(source)[dim])
    if at is None:
        return None
    return source, (*indices[:dim], at, *indices[dim:])


def _slice(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source | None:
    source = first_input(node)
    dim = argument(node, "dim", 0) % len(indices)
    size = shape_of(source)[dim]
    start = _bound(argument(node, "start", 0) or 0, size)
    step = scalar_of(argument(node, "step", 1))
    if start is None or step is None:
        return None
    return source, (*indices[:dim], indices[dim] * step + start, *indices[dim + 1 :])


def _bound(value: Any, size: Any) -> sympy.Expr | None:
    """Return an index or start of a slice, counted from the front; None if a tensor holds it."""
    at = scalar_of(value)
    if at is None:
        return None
    whole = size_expression(size)
    if at.is_negative:
        at = sympy.expand(at + whole)
        return sympy.Max(at, 0) if not at.is_nonnegative else at
    return at if at.is_nonnegative else None


def _part_of_several(node: torch.fx.Node, indices: Indices) -> Source | None:
    """Follow one of the outputs of `chunk`, `split`, `unbind` and the like."""
    several, which = first_input(node), node.args[1]
    if several.op != "call_function" or not isinstance(which, int):
        return None
    if operator_of(several).view is not View.PARTS:
        return None
    source = first_input(several)
    dim = argument(several, "dim", 0) % len(shape_of(source))
    if is_operator(several, "unbind"):
        return source, (*indices[:dim], sympy.Integer(which), *indices[dim:])
    parts = several.meta["val"]
    start = sum((size_expression(part.shape[dim]) for part in parts[:which]), ZERO)
    return source, (*indices[:dim], indices[dim] + start, *indices[dim + 1 :])


def _repeat(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    """Follow `repeat`, which lays whole copies one after the other."""
    source = first_input(node)
    sizes = shape_of(source)
    ours = indices[len(indices) - len(sizes) :]
    return source, tuple(
        axes.divide(index, size_expression(size))[1] if size_expression(size) != 1 else ZERO
        for index, size in zip(ours, sizes, strict=True)
    )


def _repeat_interleave(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source | None:
    """Follow `repeat_interleave`, which lays copies of one element side by side."""
    source, dim = first_input(node), argument(node, "dim")
    times = scalar_of(argument(node, "repeats"))
    if times is None or (dim is None and len(shape_of(source)) != 1):
        return None
    dim = (dim or 0) % len(indices)
    outer = axes.divide(indices[dim], times)[0]
    return source, (*indices[:dim], outer, *indices[dim + 1 :])


def _flip(node: torch.fx.Node, indices: Indices, axes: Axes) -> Source:
    dims = [dim % len(indices) for dim in argument(node, "dims")]
    sizes = shape_of(node)
    return first_input(node), tuple(
        size_expression(sizes[place]) - 1 - index if place in dims else index
        for place, index in enumerate(indices)
    )


Rule = Callable[[torch.fx.Node, Indices, Axes], Source | None]
_RULES: dict[View, Rule] = {
    View.COPY: _copy,
    View.RESHAPE: _reshape,
    View.BROADCAST: _broadcast,
    View.SWAP: _swap,
    View.SWAP_LAST: _swap_last,
    View.PERMUTE: _permute,
    View.MOVE: _move,
    View.REVERSE: _reverse,
    View.SELECT: _select,
    View.SLICE: _slice,
    View.REPEAT: _repeat,
    View.INTERLEAVE: _repeat_interleave,
    View.FLIP: _flip,
}
"""Rule of each kind of view but `PARTS`, whose outputs `getitem` takes."""


def is_shape_operator(node: torch.fx.Node) -> bool:
    """True if the output of `node` shows all elements of its input, each once."""
    view = operator_of(node).view
    return view is not None and view.keeps_all
