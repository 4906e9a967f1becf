"""Operands brought from any layout of axes to any other, against the same done by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tracing import Traced

from lychee_compile.passes.detect.operands import Layout, Operand
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import aten
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.rearrange import Rearranger
from lychee_compile.passes.symbolic.axes import Axes

SIZES = {"b": 2, "h": 3, "g": 2, "t": 4, "d": 5}


def by_hand(tensor: Tensor, layout: Any, wanted: Any, *, whole: bool) -> Tensor:
    """Rearrange by writing every axis out: [b, h, g, t, d], those that are missing of size one."""
    present = [axis for dimension in layout for axis in dimension]
    apart = tensor.reshape([SIZES[axis] for axis in present])
    order = sorted(present, key=list(SIZES).index)
    apart = apart.permute([present.index(axis) for axis in order])
    for place, axis in enumerate(SIZES):
        apart = apart if axis in present else apart.unsqueeze(place)
    shown = []
    for dimension in wanted:
        some = whole or any(axis in present for axis in dimension)
        shown.append([axis for axis in dimension if some])
    flat = [axis for dimension in shown for axis in dimension]
    spread = apart.expand([SIZES[a] if a in flat else -1 for a in SIZES])
    turned = spread.permute([list(SIZES).index(a) for a in [*flat, *(set(SIZES) - set(flat))]])
    return turned.reshape([math.prod(SIZES[axis] for axis in dimension) for dimension in shown])


@st.composite
def layouts(draw, axes: list[str]) -> list[tuple[str, ...]]:
    """Draw axes in any order, neighbours together in one dimension, some dimensions of size one."""
    axes, layout = list(draw(st.permutations(axes))), []
    while axes:
        taken = draw(st.integers(1, min(3, len(axes))))
        layout.append(tuple(axes[:taken]))
        axes = axes[taken:]
    for _ in range(draw(st.integers(0, 2))):
        layout.insert(draw(st.integers(0, len(layout))), ())
    return layout


def rearranged(
    tensor: Tensor, layout: Any, wanted: Any, *, whole: bool, dynamic: tuple[int, ...] = (),
    unknown: bool = False,
) -> Tensor:  # fmt: skip
    """Return the value of the nodes that rearrange `tensor`."""
    traced = Traced(lambda x: x + 0, tensor, dynamic=dynamic)
    (node,) = traced.outputs
    axes = Axes()
    symbols: dict[str, Any] = {name: axes.index(name, size) for name, size in SIZES.items()}
    symbolic = [dim for dim in dynamic if dim < len(layout) and layout[dim]]
    for dim in symbolic:  # the outermost axis of a dimension is the one whose size is not known
        inner = math.prod(SIZES[axis] for axis in layout[dim][1:])
        axes.sizes[symbols[layout[dim][0]]] = axes.size(node.meta["val"].shape[dim]) / inner

    def named(each: Any) -> Layout:
        return tuple(tuple(symbols[axis] for axis in dimension) for dimension in each)

    def size_node(axis: Any) -> int | None:
        size = axes.sizes[axis]
        return int(size) if size.is_Integer and not unknown else None

    output = next(each for each in traced.gm.graph.nodes if each.op == "output")
    with traced.gm.graph.inserting_before(output):
        rearrange = Rearranger(Emitter(traced.gm.graph, traced.mode), axes, size_node)
        made = rearrange(Operand(node, named(layout)), named(wanted), whole=whole)
    output.args = (made,)
    traced.gm.graph.lint()
    traced.gm.recompile()
    result = traced.gm(tensor)
    assert len(made.meta["val"].shape) == result.dim()
    return result


def tensor_of(layout: Any) -> Tensor:
    sizes = [math.prod(SIZES[axis] for axis in dimension) for dimension in layout]
    return torch.arange(math.prod(sizes)).view(sizes)


@settings(max_examples=25)
@given(st.data(), st.sets(st.sampled_from(sorted(SIZES)), min_size=1), st.booleans())
def test_any_layout_becomes_any_other(data, present: set[str], whole: bool) -> None:
    layout = data.draw(layouts(sorted(present)))
    others = {axis for axis in SIZES if axis not in present and data.draw(st.booleans())}
    wanted = data.draw(layouts(sorted(present | others)))
    tensor = tensor_of(layout)
    got = rearranged(tensor, layout, wanted, whole=whole)
    expected = by_hand(tensor, layout, wanted, whole=whole)
    if not whole:  # what stays as it is may be broadcast
        expected = expected.expand(torch.broadcast_shapes(expected.shape, got.shape))
    assert torch.equal(got, expected)


@settings(max_examples=20)
@given(st.data(), st.sets(st.sampled_from(sorted(SIZES)), min_size=1))
def test_sizes_that_are_not_known_when_compiling(data, present: set[str]) -> None:
    layout = data.draw(layouts(sorted(present)))
    wanted = data.draw(layouts(sorted(present)))
    dynamic = tuple(dim for dim, held in enumerate(layout) if held and data.draw(st.booleans()))
    tensor = tensor_of(layout)
    got = rearranged(tensor, layout, wanted, whole=True, dynamic=dynamic)
    assert torch.equal(got, by_hand(tensor, layout, wanted, whole=True))


def test_a_tensor_that_fits_is_not_touched() -> None:
    traced = Traced(lambda x: x + 0, torch.zeros(2, 1, 4))
    (node,) = traced.outputs
    axes = Axes()
    b, h, t = (axes.index(name, SIZES[name]) for name in "bht")
    before = len(traced.gm.graph.nodes)
    rearrange = Rearranger(Emitter(traced.gm.graph, traced.mode), axes, lambda axis: None)
    operand = Operand(node, ((b,), (), (t,)))
    assert rearrange(operand, ((b,), (h,), (t,)), whole=False) is node
    assert len(traced.gm.graph.nodes) == before


def test_an_axis_of_unknown_size_cannot_be_added() -> None:
    layout, wanted = [("b",), ("t",)], [("b",), ("h",), ("t",)]
    with pytest.raises(RewriteError, match="no tensor tells how often"):
        rearranged(tensor_of(layout), layout, wanted, whole=True, unknown=True)


def test_an_axis_that_is_not_wanted_is_refused() -> None:
    layout, wanted = [("b",), ("t",)], [("b",), ("h",)]
    with pytest.raises(RewriteError, match="more axes than its operand"):
        rearranged(tensor_of(layout), layout, wanted, whole=True)


def test_two_unknown_sizes_in_one_dimension_are_refused() -> None:
    traced = Traced(lambda x, y: (x[:, None] * y).flatten(), *torch.ones(2, 3), dynamic=(0,))
    axes = Axes()
    sizes = [node.meta["val"].shape[0] for node in traced.inputs]
    rows, columns = (axes.index(name, size) for name, size in zip("xy", sizes, strict=True))
    operand = Operand(traced.outputs[0], ((rows, columns),))
    rearrange = Rearranger(Emitter(traced.gm.graph, traced.mode), axes, lambda axis: None)
    with pytest.raises(RewriteError, match="several axes of symbolic size"):
        rearrange(operand, ((columns,), (rows,)), whole=True)
    assert aten.flatten.using_ints == traced.outputs[0].target
