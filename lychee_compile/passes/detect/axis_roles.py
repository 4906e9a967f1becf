"""Which axes of an attention are batch, heads, queries and keys.

A product cannot tell heads from batch, nor a group of heads from queries: to it they are alike. The
projection that queries come from can: heads are a part of its features. Where no projection is in
sight the order of dimensions decides, as people write them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch.fx

from lychee_compile.passes.detect.operands import Layout, Operand, free_axes
from lychee_compile.passes.graph.dataflow import is_operator, operator_of, shape_of
from lychee_compile.passes.graph.operator_facts import Family, ProductKind
from lychee_compile.passes.symbolic.axes import Axes, Axis, Indices
from lychee_compile.passes.symbolic.views import broadcast, source_of

FARTHEST = 80
"""Operators between a projection and its attention, at most."""


@dataclass(frozen=True)
class Roles:
    """The axes of each role, outermost first."""

    batch: tuple[Axis, ...]
    kv_heads: tuple[Axis, ...]
    group: tuple[Axis, ...]
    """Query heads that share a KV head."""
    query: tuple[Axis, ...]
    key: tuple[Axis, ...]
    head_dim: tuple[Axis, ...]
    value_dim: tuple[Axis, ...]

    def query_layout(self) -> Layout:
        """[B, Hq, Tq, D]."""
        return (self.batch, self.kv_heads + self.group, self.query, self.head_dim)

    def key_layout(self) -> Layout:
        """[B, Hkv, L, D]."""
        return (self.batch, self.kv_heads, self.key, self.head_dim)

    def value_layout(self) -> Layout:
        """[B, Hkv, L, Dv]."""
        return (self.batch, self.kv_heads, self.key, self.value_dim)

    def score_layout(self) -> Layout:
        """[B, Hq, Tq, L]."""
        return (self.batch, self.kv_heads + self.group, self.query, self.key)

    def output_layout(self) -> Layout:
        """[B, Hq, Tq, Dv]."""
        return (self.batch, self.kv_heads + self.group, self.query, self.value_dim)


def features_of(
    node: torch.fx.Node,
    indices: Indices,
    axes: Axes,
    head_dim: frozenset[Axis],
    is_parameter: Callable[[torch.fx.Node], bool],
) -> frozenset[Axis] | None:
    """The axes that are features of the projection behind `node`.

    Where no projection is in sight, those that share a dimension with `head_dim` at any place on
    the way; None where there are none either.
    """
    merged: frozenset[Axis] = frozenset()
    for _ in range(FARTHEST):
        found = _projected(node, indices, is_parameter) if node.op == "call_function" else None
        if found is not None:
            return free_axes(found)
        for index in indices:
            held = free_axes([index])
            merged |= held if held & head_dim and held - head_dim else frozenset()
        if node.op != "call_function":
            break
        behind = source_of(node, indices, axes) or _first_operand(node, indices)
        if behind is None:
            break
        node, indices = behind
    return merged or None


def _projected(
    node: torch.fx.Node, indices: Indices, is_parameter: Callable[[torch.fx.Node], bool]
) -> Indices | None:
    """Indices along the features that a projection makes."""
    described = operator_of(node)
    if described.family is Family.CONVOLUTION:
        return indices[1:2]
    is_layer = is_operator(node, "linear") or is_operator(node, "addmm")
    if described.product is ProductKind.MATMUL and len(indices) > 1:
        is_layer = is_parameter(node.args[1])  # type: ignore[arg-type]
    return indices[-1:] if is_layer else None


def _first_operand(node: torch.fx.Node, indices: Indices) -> tuple[torch.fx.Node, Indices] | None:
    """An operand that has the axes of the output, roughly: good enough to name them by."""
    for operand in node.all_input_nodes:
        sizes, wide = shape_of(operand), shape_of(node)
        if is_operator(node, "cat"):
            return operand, indices[: len(sizes)]
        if is_operator(node, "stack"):
            return operand, indices[:-1]
        if is_operator(node, "view_as_complex") and len(indices) + 1 == len(sizes):
            return operand, (*indices, sympy.S.Zero)
        if is_operator(node, "view_as_real") and len(indices) == len(sizes) + 1:
            return operand, indices[:-1]
        if len(sizes) == len(wide) == len(indices) and len(sizes) > 1:
            return operand, broadcast(indices, sizes, wide)
    return None


def assign(
    shared: frozenset[Axis],
    rows: frozenset[Axis],
    features: frozenset[Axis] | None,
    key: Operand,
    value: Operand,
    query: Operand,
    score_dims: Sequence[tuple[Axis, ...]],
    keys: frozenset[Axis],
    head_dim: frozenset[Axis],
    value_dim: Sequence[Axis],
    masked: frozenset[Axis],
) -> Roles:
    """Sort the axes: `shared` by queries and keys, `rows` of queries alone, and so on.

    `score_dims` are the axes of each dimension of the scores, but for that of the keys; `masked`
    those that a mask depends on, as it does on the position of a query and not on its head.
    """
    ordered = _in_order(key.layout, value.layout, query.layout)
    inside = keys | head_dim | set(value_dim)
    if features is not None:
        heads = shared & features
        group = rows & features
    else:
        outer = [each for each in key.layout if not inside & set(each)]
        heads = shared - set(outer[0]) if len(outer) > 1 else frozenset()
        alone = [each for each in score_dims if not shared & set(each)]
        last = alone[-1] if alone else ()
        by_mask = rows & masked
        group = rows - (by_mask if by_mask and by_mask != rows else set(last))

    def pick(wanted: frozenset[Axis]) -> tuple[Axis, ...]:
        return tuple(axis for axis in ordered if axis in wanted)

    return Roles(
        batch=pick(shared - heads),
        kv_heads=pick(heads),
        group=pick(group),
        query=pick(rows - group),
        key=pick(keys),
        head_dim=pick(head_dim),
        value_dim=tuple(value_dim),
    )


def _in_order(*layouts: Layout) -> list[Axis]:
    return list(
        dict.fromkeys(axis for layout in layouts for dimension in layout for axis in dimension)
    )
