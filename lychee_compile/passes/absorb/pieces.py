"""Emit parts of tensors by the axes that they hold, and sums of products over axes."""

from __future__ import annotations

import string
from itertools import pairwise

import sympy
import torch.fx

from lychee_compile.passes.detect.operands import Layout, Operand, Place
from lychee_compile.passes.graph.dataflow import aten, shape_of, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.rearrange import Rearranger
from lychee_compile.passes.symbolic.axes import Axes, Axis, Index, free_axes


class NoPiece(Exception):  # noqa: N818  no error: the graph stays as it is
    """The elements that indices reach are no part of a tensor that views show."""


def piece(place: Place, axes: Axes, emit: Emitter) -> Operand:
    """Emit the part of a tensor that its indices reach, with whole axes as dimensions.

        weight[h * 192 + d, c], d < 128        weight.unflatten(0, (heads, 192))[:, :128]

    Raises `NoPiece` if no such views show that part.
    """
    node = place.node
    layout: Layout = ()
    sizes = shape_of(node)
    for dim in reversed(range(len(sizes))):
        digits = axes.digits(place.indices[dim], sizes[dim])
        found: Layout = () if digits is None else (digits,)
        if digits is None:
            node, found = _cut(node, dim, place.indices[dim], axes, emit)
        layout = (*found, *layout)
    operand = Operand(node, layout)
    if len(operand.axes) < sum(map(len, layout)):  # a diagonal
        raise NoPiece
    return operand


def _cut(
    node: torch.fx.Node, dim: int, index: Index, axes: Axes, emit: Emitter
) -> tuple[torch.fx.Node, Layout]:
    """Take a dimension apart by the strides of the axes in its index, and cut out their spans."""
    size = shape_of(node)[dim]
    held: list[Axis | None] = sorted(free_axes([index]), key=index.coeff, reverse=True)
    strides = [index.coeff(axis) for axis in held]
    first = sympy.expand(index - sum(s * axis for s, axis in zip(strides, held, strict=True)))
    if not isinstance(size, int) or not all(each.is_Integer for each in (first, *strides)):
        raise NoPiece
    if not strides or strides[-1] != 1:
        held, strides = [*held, None], [*strides, sympy.S.One]
    bounds = [size, *map(int, strides)]
    if bounds[-1] != 1 or any(large % small for large, small in pairwise(bounds)):
        raise NoPiece
    counts = [large // small for large, small in pairwise(bounds)]
    if len(counts) > 1:
        node = emit(aten.unflatten.int, node, dim, counts)
    rest = int(first)
    for place, (axis, count, stride) in enumerate(zip(held, counts, bounds[1:], strict=True)):
        begin, rest = divmod(rest, stride)
        span = sympy.S.One if axis is None else axes.sizes[axis]
        if begin < 0 or not span.is_Integer or begin + int(span) > count:
            raise NoPiece
        if span != count:
            node = emit(aten.slice.Tensor, node, dim + place, begin, begin + int(span))
    return node, tuple(() if axis is None else (axis,) for axis in held)


def contracted(
    left: Operand, right: Operand, wanted: Layout, rearrange: Rearranger, emit: Emitter
) -> torch.fx.Node:
    """Emit the sum of products over the axes that `wanted` lacks, laid out as `wanted`.

    Raises `NoPiece` if an axis of `wanted` is in no operand, or one of `right` is in no other.
    """
    order = [axis for dimension in wanted for axis in dimension]
    if set(order) - left.axes - right.axes or right.axes - left.axes - set(order):
        raise NoPiece
    letters = dict(zip(sorted(left.axes | right.axes, key=str), string.ascii_letters, strict=False))
    operands, terms = [], []
    for operand in (left, right):
        held = [axis for dimension in operand.layout for axis in dimension]
        operands.append(rearrange(operand, tuple((axis,) for axis in held), whole=False))
        terms.append("".join(letters[axis] for axis in held))
    result = "".join(letters[axis] for axis in order)
    operands[1] = emit.cast(operands[1], value_of(operands[0]).dtype)
    made = emit(aten.einsum.default, f"{terms[0]},{terms[1]}->{result}", operands)
    return rearrange(Operand(made, tuple((axis,) for axis in order)), wanted, whole=False)
