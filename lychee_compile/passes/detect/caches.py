"""Bind the keys of an attention to their cache, and to the write of this call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.aliasing import storage_of, written_by
from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    is_operator,
    operator_of,
    same,
    shape_of,
    static_size,
    through_copies,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import Family
from lychee_compile.passes.reasons import Reason, ReasonedError

Slot = int | torch.fx.Node


@dataclass(frozen=True)
class CacheBinding:
    """A key cache as one graph sees it; sites that read the same keys have equal bindings."""

    key: torch.fx.Node
    """The tensor that holds the keys after this call's write."""
    token_dim: int
    """Dimension of `key` that runs over tokens."""
    kind: str
    """"static": an input written in place; "dynamic": grown by concatenation, an output."""
    source: torch.fx.Node | None
    """The input that holds the cache before the call; None if a dynamic cache begins."""
    output: int | None
    """Position of the grown cache among the outputs of the graph; None for a static cache."""
    positions: torch.fx.Node | None = None
    """Slots written, int [T]; if None, `span` tells, or they are the last of a dynamic cache."""
    span: tuple[Slot, Slot] | None = None
    """Slots [start, end) written, if the graph names them as a slice."""
    written: tuple[torch.fx.Node, int] | None = None
    """A tensor, and its dimension that has as many entries as tokens are written."""

    @property
    def reads_only(self) -> bool:
        """True if the graph only reads the cache."""
        return self.written is None


@dataclass(frozen=True)
class Unbound:
    """Keys whose cache was not recognised."""

    kind: str
    """"none", or "sliding": a cache that keeps a window of keys only."""
    reason: Reason


class _NotBoundError(ReasonedError):
    def __init__(self, reason: Reason, kind: str = "none") -> None:
        super().__init__(reason)
        self.unbound = Unbound(kind, reason)


Writes = Mapping[torch.fx.Node, list[torch.fx.Node]]
"""For each tensor, the operators that write to it or to a view of it."""


def find_writes(graph: torch.fx.Graph) -> Writes:
    """Return all writes of a graph, in order."""
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        for target in written_by(node):
            found.setdefault(storage_of(target), []).append(node)
    return found


def bind_cache(
    attention: Attention, graph: torch.fx.Graph, writes: Writes
) -> CacheBinding | Unbound:
    """Return the cache that the keys of `attention` are read from, or why none was recognised."""
    met = []
    for key in reversed(attention.key_forms):
        places = [
            dim for dim, axes in enumerate(key.layout) if set(axes) & set(attention.roles.key)
        ]
        if len(places) != 1 or key.layout[places[0]] != attention.roles.key:
            continue
        try:
            return _Binder(key.node, attention.node, graph, writes, places[0]).bind()
        except _NotBoundError as error:
            met.append(error.unbound)
    nearer = [each for each in met if each.reason.code != reasons.NO_CACHE.code]
    return next(iter(nearer), Unbound("none", reasons.NO_CACHE()))


class _Binder:
    def __init__(
        self,
        key: torch.fx.Node,
        reader: torch.fx.Node,
        graph: torch.fx.Graph,
        writes: Writes,
        token_dim: int,
    ) -> None:
        self._key, self._reader, self._graph, self._dim = key, reader, graph, token_dim
        self._writes = writes

    def bind(self) -> CacheBinding:
        holder = self._behind_prefixes(self._key)
        if is_operator(holder, "cat"):
            return self._grown(holder)
        if _writes_tokens(holder):
            return self._written(holder)
        if holder.op == "placeholder":
            return self._read(holder)
        rewritten = calls(holder, aten.copy_.default) and first_input(holder).op == "placeholder"
        rolled = any(is_operator(each, "roll") for each in (holder, *holder.args[:1]))
        if rewritten or rolled:
            raise _NotBoundError(reasons.CACHE_ROLLS(), "sliding")
        if calls(holder, aten.slice.Tensor):
            raise _NotBoundError(reasons.CACHE_SLICED(), "sliding")
        output = self._output_index(holder)
        if output is None:
            raise _NotBoundError(reasons.NO_CACHE())
        return CacheBinding(
            self._key, self._dim, "dynamic", None, output, written=(holder, self._dim)
        )

    def _behind_prefixes(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the node behind slices that take the first entries of a dimension."""
        node = through_copies(node)
        while calls(node, aten.slice.Tensor):
            from_start = argument(node, "start", 0) in (0, None) and argument(node, "step", 1) == 1
            source = node.args[0]
            assert isinstance(source, torch.fx.Node)
            if not from_start or not _holds_cache(source):
                break
            node = through_copies(source)
        return node

    def _written(self, write: torch.fx.Node) -> CacheBinding:
        """Return the binding of a cache to which this call writes tokens at positions."""
        positions = self._positions(write)
        cache = through_copies(write.args[0])  # type: ignore[arg-type]
        if is_operator(cache, "roll"):
            raise _NotBoundError(reasons.CACHE_ROLLS(), "sliding")
        if positions is None:
            raise _NotBoundError(reasons.CACHE_NOT_BY_TOKEN())
        if cache.op != "placeholder" or self._writes.get(cache) != [write]:
            raise _NotBoundError(reasons.CACHE_NOT_INPUT())
        return CacheBinding(
            self._key, self._dim, "static", cache, None, positions, written=(positions, 0)
        )

    def _positions(self, write: torch.fx.Node) -> torch.fx.Node | None:
        """Return the token slots, int [T], that an indexed write fills; None for others."""
        rank = len(shape_of(write))
        if calls(write, aten.index_copy_.default):
            along = argument(write, "dim") % rank == self._dim
            return argument(write, "index") if along else None
        indices = argument(write, "indices")
        places = [place for place, index in enumerate(indices) if index is not None]
        if places != [self._dim] or argument(write, "accumulate", False):
            return None
        index = indices[self._dim]
        return index if len(shape_of(index)) == 1 and value_of(index).dtype != torch.bool else None

    def _read(self, cache: torch.fx.Node) -> CacheBinding:
        """Return the binding of a cache that is written through a view of it, or not at all."""
        writes = self._writes.get(cache, [])
        if not writes:
            return CacheBinding(self._key, self._dim, "static", cache, None)
        (write, *more) = writes
        target, fresh = first_input(write), write.args[1]
        whole = target is cache and isinstance(fresh, torch.fx.Node)
        if whole and calls(write, aten.copy_.default):
            raise _NotBoundError(reasons.CACHE_ROLLS(), "sliding")
        if more or not calls(write, aten.copy_.default):
            raise _NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
        if self._reader < write:
            raise _NotBoundError(reasons.CACHE_WRITTEN_LATE())
        span = self._span(target, cache)
        return CacheBinding(
            self._key, self._dim, "static", cache, None, span=span, written=(target, self._dim)
        )

    def _span(self, target: torch.fx.Node, cache: torch.fx.Node) -> tuple[Slot, Slot]:
        """Return the slots of `cache` that its view `target` shows."""
        span: tuple[Slot, Slot] | None = None
        node = target
        while node is not cache:
            dim = argument(node, "dim", 0) % len(shape_of(node.args[0]))  # type: ignore[arg-type]
            if not calls(node, aten.slice.Tensor) or argument(node, "step", 1) != 1:
                raise _NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
            start, end = argument(node, "start", 0), argument(node, "end")
            if dim == self._dim and span is None:
                kv_len = shape_of(cache)[dim]
                first, last = _slot(start, kv_len), _slot(end, kv_len)
                if first is None or last is None:
                    raise _NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
                span = (first, last)
            elif start not in (0, None):
                raise _NotBoundError(reasons.CACHE_OTHER_AXIS())
            node = node.args[0]  # type: ignore[assignment]
        if span is None:
            raise _NotBoundError(reasons.CACHE_OTHER_AXIS())
        return span

    def _grown(self, key: torch.fx.Node) -> CacheBinding:
        parts = argument(key, "tensors")
        if argument(key, "dim", 0) % len(shape_of(key)) != self._dim:
            raise _NotBoundError(reasons.NO_CACHE())
        output = self._output_index(key)
        if output is None:
            raise _NotBoundError(reasons.CACHE_KEEPS_PART(), "sliding")
        if len(parts) != 2:
            raise _NotBoundError(reasons.CACHE_GROWS_IN_PIECES())
        past = through_copies(parts[0])
        written = (parts[1], self._dim)
        if past.op == "placeholder":
            return CacheBinding(self._key, self._dim, "dynamic", past, output, written=written)
        empty = shape_of(past)
        if same(empty[0], 0) or (len(empty) == len(shape_of(key)) and same(empty[self._dim], 0)):
            return CacheBinding(self._key, self._dim, "dynamic", None, output, written=written)
        raise _NotBoundError(reasons.CACHE_PAST_NOT_INPUT())

    def _output_index(self, key: torch.fx.Node) -> int | None:
        outputs = next(node for node in reversed(self._graph.nodes) if node.op == "output").args[0]
        if not isinstance(outputs, (tuple, list)):
            outputs = (outputs,)
        for place, node in enumerate(outputs):
            if isinstance(node, torch.fx.Node) and through_copies(node) is key:
                return place
        return None


def _holds_cache(node: torch.fx.Node) -> bool:
    node = through_copies(node)
    if calls(node, aten.slice.Tensor):
        return _holds_cache(node.args[0])  # type: ignore[arg-type]
    return node.op == "placeholder" or _writes_tokens(node)


def _writes_tokens(node: torch.fx.Node) -> bool:
    return operator_of(node).family is Family.TOKEN_WRITE


def _slot(bound: Any, kv_len: int | torch.SymInt) -> Slot | None:
    """Return the slot at a bound of a slice, which means the same as in Python.

    None if only a run can tell.
    """
    size = static_size(kv_len)
    if isinstance(bound, torch.fx.Node):
        return bound
    return None if size is None or bound is None else slice(bound, None).indices(size)[0]
