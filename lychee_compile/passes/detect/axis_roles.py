"""Tell which axes of an attention are batch, heads, queries and keys.

A product treats batch and heads alike, and a group of heads like query positions. The projection
that queries come from tells them apart: heads are a part of its features. If no projection is in
sight, the usual order of dimensions decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from lychee_compile.passes.detect.operands import Layout, Operand
from lychee_compile.passes.symbolic.axes import Axis


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


@dataclass(frozen=True)
class AxisFacts:
    """Axes of an attention and their roles, as far as the dataflow tells them."""

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
    hinted: frozenset[Axis]
    """Axes of queries and keys that are likely to be features."""

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
            return shared & (self.features | self.hinted), alone & self.features
        inside = self.keys | self.head_dim | set(self.value_dim)
        outer = [axes for axes in self.key.layout if not inside & set(axes)]
        heads = shared - set(outer[0]) if len(outer) > 1 else frozenset()
        heads = shared & self.hinted or heads
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
