"""Tell which element of a sum of exponentials divides an element of a softmax."""

from __future__ import annotations

import torch.fx

from lychee_compile.passes.detect.softmax.softmaxes import Softmax
from lychee_compile.passes.graph.dataflow import first_input, is_operator, operator_of, shape_of
from lychee_compile.passes.symbolic.axes import Axes, Indices
from lychee_compile.passes.symbolic.views import broadcast, source_of


def divisor_place(
    indices: Indices, softmax: Softmax, axes: Axes, goal: torch.fx.Node | None = None
) -> Indices | None:
    """Return the indices of a total that its reader reads at the reader's own `indices`.

    With a `goal`, an operand of the total, return the indices that are read of that.
    """
    reader = softmax.reader
    assert reader is not None
    if len(indices) != len(shape_of(reader)):
        return None
    for operand in reader.args[1:2] if is_operator(reader, "div") else reader.args[:2]:
        if not isinstance(operand, torch.fx.Node):
            continue
        at = broadcast(indices, shape_of(operand), shape_of(reader))
        place = _place_of(softmax.total, operand, at, axes)
        if place is not None:
            return place if goal is None else _place_in_total(goal, softmax.total, place, axes)
    return None


def _place_in_total(
    goal: torch.fx.Node, total: torch.fx.Node | None, at: Indices, axes: Axes
) -> Indices | None:
    assert total is not None
    for operand in total.all_input_nodes:
        inside = broadcast(at, shape_of(operand), shape_of(total))
        place = _place_of(goal, operand, inside, axes)
        if place is not None:
            return place
    return None


def _place_of(
    goal: torch.fx.Node | None, node: torch.fx.Node, at: Indices, axes: Axes
) -> Indices | None:
    """Return the indices of `goal` behind views and functions of `node`; None if it is not."""
    while node is not goal:
        is_function = operator_of(node).is_elementwise and len(node.args) == 1
        behind = (first_input(node), at) if is_function else source_of(node, at, axes)
        if behind is None:
            return None
        node, at = behind
    return at
