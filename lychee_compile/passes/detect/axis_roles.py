"""Tell which axes of an attention are batch, heads, queries and keys.

A product treats batch and heads alike, and a group of heads like query positions. The projection
that queries come from tells them apart: heads are a part of its features. If no projection is in
sight, the usual order of dimensions decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch.fx

from lychee_compile.passes.detect.operands import Layout, Operand
from lychee_compile.passes.graph.dataflow import is_operator, operator_of, shape_of
from lychee_compile.passes.graph.operator_facts import Family, ProductKind
from lychee_compile.passes.symbolic.axes import Axes, Axis, Indices, free_axes
from lychee_compile.passes.symbolic.views import broadcast, source_of

FARTHEST = 80
"""Largest number of operators between a projection and its attention."""


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
        """Return the axes of a query [B, Hq, Tq, D]."""
        return (self.batch, self.kv_heads + self.group, self.query, self.head_dim)

    def key_layout(self) -> Layout:
        """Return the axes of a key [B, Hkv, L, D]."""
        return (self.batch, self.kv_heads, self.key, self.head_dim)

    def value_layout(self) -> Layout:
        """Return the axes of a value [B, Hkv, L, Dv]."""
        return (self.batch, self.kv_heads, self.key, self.value_dim)

    def score_layout(self) -> Layout:
        """Return the axes of scores [B, Hq, Tq, L]."""
        return (self.batch, self.kv_heads + self.group, self.query, self.key)

    def output_layout(self) -> Layout:
        """Return the axes of an output [B, Hq, Tq, Dv]."""
        return (self.batch, self.kv_heads + self.group, self.query, self.value_dim)


def features_of(
    node: torch.fx.Node,
    indices: Indices,
    axes: Axes,
    head_dim: frozenset[Axis],
    is_parameter: Callable[[torch.fx.Node], bool],
) -> frozenset[Axis] | None:
    """Return the axes that are features of the projection behind `node`.

    If no projection is in sight, these are the axes that share a dimension with `head_dim` in some
    tensor on the way; None if there are no such axes.
    """
    merged: frozenset[Axis] = frozenset()
    for _ in range(FARTHEST):
        is_call = node.op == "call_function"
        projected = _projected(node, indices, is_parameter) if is_call else None
        if projected is not None:
            return free_axes(projected)
        for index in indices:
            merged_here = free_axes([index])
            if merged_here & head_dim and merged_here - head_dim:
                merged |= merged_here
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
    """Return the indices along the features that a projection makes; None for other operators."""
    described = operator_of(node)
    if described.family is Family.CONVOLUTION:
        return indices[1:2]
    is_layer = is_operator(node, "linear") or is_operator(node, "addmm")
    if described.product is ProductKind.MATMUL and len(indices) > 1:
        is_layer = is_parameter(node.args[1])  # type: ignore[arg-type]
    return indices[-1:] if is_layer else None


def _first_operand(node: torch.fx.Node, indices: Indices) -> tuple[torch.fx.Node, Indices] | None:
    """Return an operand with about the axes of the output, so that they can be named by it."""
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


@dataclass(frozen=True)
class AxisFacts:
    """Facts that the dataflow of an attention tells about its axes."""

    query: Operand
    key: Operand
    value: Operand
    rows: frozenset[Axis]
    """Axes of the scores, without those of the keys."""
    keys: frozenset[Axis]
    head_dim: frozenset[Axis]
    value_dim: tuple[Axis, ...]
    score_dims: tuple[tuple[Axis, ...], ...]
    """Axes of each dimension of the scores, without that of the keys."""
    masked: frozenset[Axis]
    """Axes that a mask depends on: the position of a query and not its head, as a rule."""
    features: frozenset[Axis] | None
    """Axes of the features that a projection makes; None if no projection is in sight."""

    @property
    def shared(self) -> frozenset[Axis]:
        """Rows that keys or values have too: batch and KV heads."""
        return (self.key.axes | self.value.axes) & self.rows

    @property
    def query_alone(self) -> frozenset[Axis]:
        """Rows that only queries have: query positions, and query heads that share a KV head."""
        return self.rows - self.shared

    def heads_and_group(self) -> tuple[frozenset[Axis], frozenset[Axis]]:
        """Return the axes of the KV heads, and those of the query heads that share one."""
        shared, alone = self.shared, self.query_alone
        if self.features is not None:
            return shared & self.features, alone & self.features
        inside = self.keys | self.head_dim | set(self.value_dim)
        outer = [axes for axes in self.key.layout if not inside & set(axes)]
        heads = shared - set(outer[0]) if len(outer) > 1 else frozenset()
        dims = [axes for axes in self.score_dims if not shared & set(axes)]
        positions = alone & self.masked
        if not positions or positions == alone:
            positions = frozenset(dims[-1] if dims else ())
        return heads, alone - positions


def assign(facts: AxisFacts) -> Roles:
    """Sort the axes of an attention by role."""
    layouts = (facts.key.layout, facts.value.layout, facts.query.layout)
    ordered = dict.fromkeys(axis for layout in layouts for dim in layout for axis in dim)
    heads, group = facts.heads_and_group()

    def pick(wanted: frozenset[Axis]) -> tuple[Axis, ...]:
        return tuple(axis for axis in ordered if axis in wanted)

    return Roles(
        batch=pick(facts.shared - heads),
        kv_heads=pick(heads),
        group=pick(group),
        query=pick(facts.query_alone - group),
        key=pick(facts.keys),
        head_dim=pick(facts.head_dim),
        value_dim=facts.value_dim,
    )
