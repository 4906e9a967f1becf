"""Emit the operators that bring a tensor from one layout of axes to another.

layout ((b, h), (t,), (d,))  ->  wanted ((b,), (h,), (t,), (d,))      unflatten
layout ((b,), (t,), (h,), (d,))  ->  wanted ((b,), (h,), (t,), (d,))  permute
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.operands import Layout, Operand
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import aten, value_of
from lychee_compile.passes.symbolic.axes import Axes, Axis

Size = int | torch.fx.Node


class Emitter:
    """Adds nodes to a graph, each with its fake value."""

    def __init__(self, graph: torch.fx.Graph, mode: Any) -> None:
        self.graph, self.mode = graph, mode

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A call of `target`, at the graph's insert point."""
        node = self.graph.call_function(target, args, kwargs)
        with self.mode:
            values = torch.fx.node.map_arg(args, value_of), torch.fx.node.map_arg(kwargs, value_of)
            node.meta["val"] = target(*values[0], **values[1])
        return node


class Rearranger:
    """Rearranges operands of one attention. Raises `RewriteError` where sizes are not known."""

    def __init__(self, emit: Emitter, axes: Axes, size_node: Callable[[Axis], Size | None]) -> None:
        self._emit, self._axes, self._size_node = emit, axes, size_node

    def __call__(self, operand: Operand, wanted: Layout, *, whole: bool) -> torch.fx.Node:
        """`operand` laid out as `wanted`.

        With `whole` axes it lacks are expanded; without, a dimension it has none of is of size one.
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
        """One dimension per axis, none of size one."""
        result: list[tuple[Axis, ...]] = []
        for dim in reversed(range(len(layout))):
            held = layout[dim]
            if not held:
                node = self._emit(aten.squeeze.dim, node, dim)
            elif len(held) > 1:
                node = self._emit(aten.unflatten.int, node, dim, self._sizes(held))
            result = [(axis,) for axis in held] + result
        return node, result

    def _sizes(self, axes: tuple[Axis, ...]) -> list[Any]:
        """Sizes for `unflatten`, of which it can find out one."""
        sizes: list[Any] = []
        for axis in axes:
            size = self._axes.sizes[axis]
            sizes.append(int(size) if size.is_Integer else -1)
        if sizes.count(-1) > 1:
            raise RewriteError(reasons.SEVERAL_SIZES_UNKNOWN())
        return sizes

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
        sizes: list[Any] = []
        for dim, axis in enumerate(flat):
            if axis in present:
                sizes.append(-1)
                continue
            node = self._emit(aten.unsqueeze.default, node, dim)
            size = self._size_node(axis)
            if size is None:
                raise RewriteError(reasons.SIZE_NOT_IN_GRAPH(axis=axis))
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
        held == axes or (not held and not whole) for held, axes in zip(layout, wanted, strict=True)
    )
