"""Match the dimensions of a tensor with those of a view of it, or of a copy in another shape."""

from __future__ import annotations

import torch.fx

from lychee_compile.passes.graph.dataflow import first_input, operator_of, shape_of
from lychee_compile.passes.symbolic.axes import Axes, Axis, with_finer_axes
from lychee_compile.passes.symbolic.views import source_of


def behind_views(node: torch.fx.Node) -> torch.fx.Node:
    """Return the first node up the graph that is no view or copy of all of its input."""
    while (view := operator_of(node).view) is not None and view.keeps_all:
        node = first_input(node)
    return node


def dimension_in(view: torch.fx.Node, base: torch.fx.Node, dim: int) -> int | None:
    """Return the dimension of `base` that dimension `dim` of `view` shows, else None.

    `view` shows all of `base`, perhaps in another shape.
    """

    def match(axes: Axes) -> int | None:
        ours = tuple(axes.index(f"v{place}", size) for place, size in enumerate(shape_of(view)))
        node, indices = view, ours
        while node is not base:
            source = source_of(node, indices, axes)
            if source is None:
                return None
            node, indices = source
        same = [place for place, index in enumerate(indices) if index == ours[dim]]
        return same[0] if len(same) == 1 and isinstance(ours[dim], Axis) else None

    return with_finer_axes(match)
