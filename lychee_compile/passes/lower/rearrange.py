"""Emit the operators that bring a tensor from one layout of axes to another.

layout ((b, h), (t,), (d,))  ->  wanted ((b,), (h,), (t,), (d,))      unflatten
layout ((b,), (t,), (h,), (d,))  ->  wanted ((b,), (h,), (t,), (d,))  permute
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection

import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.operands import Layout, Operand
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import aten
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.symbolic.axes import Axes, Axis

Size = int | torch.fx.Node


class AxisSizes:
    """Sizes of the axes of one attention, as numbers or as nodes made of its operands.

    mask (nW,), (T,), (L,)              nW = sym_size(mask, 0)
    key (b, nW), (h,), (L,), (d,)       b  = sym_size(key, 0) // nW
    """

    def __init__(self, attention: Attention, emit: Emitter) -> None:
        self._sizes, self._emit = attention.axes.sizes, emit
        biases, masks = attention.score.biases, attention.score.masks
        operands = [attention.key, attention.value, attention.query]
        operands += [bias.operand for bias in biases] + [mask.operand for mask in masks]
        dimensions = [
            (operand, dim, axes)
            for operand in operands
            for dim, axes in enumerate(operand.layout)
            if axes
        ]
        self._dimensions: list[tuple[Operand, int, tuple[Axis, ...]]] = sorted(
            dimensions, key=lambda each: len(each[2])
        )

    def __call__(self, axis: Axis, unknown: Collection[Axis] = ()) -> Size | None:
        """Return the size of an axis; None if the operands do not tell it.

        A dimension that holds several axes tells the size of one by those of the others, of which
        none may be in `unknown`.
        """
        size = self._sizes[axis]
        if size.is_Integer:
            return int(size)
        unknown = {*unknown, axis}
        for operand, dim, axes in self._dimensions:
            others = [each for each in axes if each != axis]
            if len(others) == len(axes) or unknown & set(others):
                continue
            known = [self(each, unknown) for each in others]
            if None in known:
                continue
            node = self._emit(aten.sym_size.int, operand.node, dim)
            for each in known:
                node = self._emit(operator.floordiv, node, each)
            return node
        return None


class Rearranger:
    """Rearranges operands of one attention. Raises `RewriteError` if a size is not known."""

    def __init__(self, emit: Emitter, axes: Axes, size_node: Callable[[Axis], Size | None]) -> None:
        self._emit, self._axes, self._size_node = emit, axes, size_node

    def __call__(self, operand: Operand, wanted: Layout, *, whole: bool) -> torch.fx.Node:
        """Return `operand`, laid out as `wanted`.

        With `whole`, axes that `operand` lacks are expanded. Without it, a dimension none of whose
        axes `operand` has is of size one.
        """
        if _is_already(operand.layout, wanted, whole):
            return operand.node
        node, layout = self._apart(operand.node, operand.layout)
        present = [axes[0] for axes in layout if axes]
        needed = [
            [
                axis
                for axis in axes
                if whole or axis in present or any(each in present for each in axes)
            ]
            for axes in wanted
        ]
        flat = [axis for axes in needed for axis in axes]
        if not set(present) <= set(flat):
            raise RewriteError(reasons.UNWANTED_AXES(tensor=operand.node))
        node = self._in_order(node, present, [axis for axis in flat if axis in present])
        node = self._with_missing(node, flat, present)
        return self._together(node, needed)

    def _apart(
        self, node: torch.fx.Node, layout: Layout
    ) -> tuple[torch.fx.Node, list[tuple[Axis, ...]]]:
        """Return `node` with one dimension per axis and none of size one, and its layout."""
        result: list[tuple[Axis, ...]] = []
        for dim in reversed(range(len(layout))):
            axes = layout[dim]
            if not axes:
                node = self._emit(aten.squeeze.dim, node, dim)
            elif len(axes) > 1:
                node = self._emit(aten.unflatten.int, node, dim, self._sizes(axes))
            result = [(axis,) for axis in axes] + result
        return node, result

    def _sizes(self, axes: tuple[Axis, ...]) -> list[Size]:
        """Return sizes for `unflatten`; -1 stands for the first one that is not known otherwise."""
        sizes: list[Size | None] = [
            int(size) if size.is_Integer else None
            for size in (self._axes.sizes[axis] for axis in axes)
        ]
        if sizes.count(None) > 1:
            pairs = zip(sizes, axes, strict=True)
            known = [self._size_node(axis) if size is None else size for size, axis in pairs]
            inferred = known.index(None) if None in known else sizes.index(None)
            sizes = [*known[:inferred], None, *known[inferred + 1 :]]
        if sizes.count(None) > 1:
            raise RewriteError(reasons.SEVERAL_SIZES_UNKNOWN())
        return [-1 if size is None else size for size in sizes]

    def _in_order(
        self, node: torch.fx.Node, present: list[Axis], wanted: list[Axis]
    ) -> torch.fx.Node:
        order = [present.index(axis) for axis in wanted]
        return node if order == sorted(order) else self._emit(aten.permute.default, node, order)

    def _with_missing(
        self, node: torch.fx.Node, flat: list[Axis], present: list[Axis]
    ) -> torch.fx.Node:
        missing = [axis for axis in flat if axis not in present]
        if not missing:
            return node
        sizes: list[Size] = []
        for dim, axis in enumerate(flat):
            if axis in present:
                sizes.append(-1)
                continue
            node = self._emit(aten.unsqueeze.default, node, dim)
            size = self._size_node(axis)
            if size is None:
                raise RewriteError(reasons.SIZE_NOT_IN_GRAPH())
            sizes.append(size)
        return self._emit(aten.expand.default, node, sizes)

    def _together(self, node: torch.fx.Node, needed: list[list[Axis]]) -> torch.fx.Node:
        for dim, axes in enumerate(needed):
            if not axes:
                node = self._emit(aten.unsqueeze.default, node, dim)
            elif len(axes) > 1:
                node = self._emit(aten.flatten.using_ints, node, dim, dim + len(axes) - 1)
        return node


def _is_already(layout: Layout, wanted: Layout, whole: bool) -> bool:
    return len(layout) == len(wanted) and all(
        present == axes or (not present and not whole)
        for present, axes in zip(layout, wanted, strict=True)
    )
