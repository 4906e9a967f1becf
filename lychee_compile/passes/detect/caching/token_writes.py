"""Read an operator that writes tokens to a cache: the cache, the slots, and how many there are.

    index_copy(cache, 2, positions, new)                  slots `positions`
    slice_scatter(cache, new, 2, start, end)              slots [start, end)
    where(arange(slots) == position, new, cache)          slot `position`
    copy_(slice(cache, 2, start, end), new)               slots [start, end)

An operator in place and its twin that gives a new tensor are read alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.caching.write_positions import (
    NotBoundError,
    PositionReader,
    Positions,
)
from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    is_tensor,
    operator_of,
    shape_of,
    static_size,
    through_copies,
)
from lychee_compile.passes.graph.operator_facts import WriteKind

Slot = int | torch.fx.Node
Tokens = int | tuple[torch.fx.Node, int]
"""Number of tokens, or a tensor and its dimension that has as many entries."""
Writes = Mapping[torch.fx.Node, list[torch.fx.Node]]
"""For each tensor, the operators that write to it or to a view of it."""


@dataclass(frozen=True)
class Span:
    """Slots side by side: from `start` to before `stop`, or if that is None `count` of them."""

    start: Slot
    stop: Slot | None = None
    count: Slot | None = None


@dataclass(frozen=True)
class RowSlots:
    """Slots of each row."""

    node: torch.fx.Node
    """Tensor of integers that holds them."""
    row_dim: int
    """Dimension that runs over rows."""
    token_dim: int | None
    """Dimension that runs over tokens; None if there is one only."""


Slots = torch.fx.Node | Span | RowSlots
"""Slots of a cache: a tensor of integers, slots side by side, or slots of each row."""


@dataclass(frozen=True)
class TokenWrite:
    """A write of some tokens to a cache."""

    cache: torch.fx.Node
    """The cache before the write, through copies."""
    slots: Slots
    tokens: Tokens
    rows: int | None = None
    """Dimension of the cache whose entries have slots of their own; None if all share them."""


def token_write(node: torch.fx.Node, token_dim: int, reader: PositionReader) -> TokenWrite | None:
    """Return the write that `node` makes along `token_dim`; None if it writes no tokens.

    Raises `NotBoundError` if it writes to a tensor, but not at slots that all heads share.
    """
    kind = operator_of(node).write
    if kind is not None:
        return _FORMS[kind](node, token_dim, reader)
    blend = reader.blend(node, token_dim)
    if blend is None:
        return None
    return written_at(*blend)


def view_write(
    write: torch.fx.Node, cache: torch.fx.Node, token_dim: int
) -> tuple[Span, Tokens] | None:
    """Return the slots that `copy_` to a view of `cache` writes; None if the view is not a slice.

    Raises `NotBoundError` if the view is a part of another dimension.
    """
    views, node = [], first_input(write)
    while node is not cache:
        if not calls(node, aten.slice.Tensor, aten.select.int, aten.narrow.default):
            return None
        views.append(node)
        node = first_input(node)
    span: Span | None = None
    dim: int | None = token_dim
    for view in reversed(views):
        along = argument(view, "dim", 0) % len(shape_of(first_input(view)))
        shown = _shown(view)
        if along == dim and span is None:
            if shown is None:
                return None
            span = shown
        elif _bounds(view)[0] not in (0, None) or calls(view, aten.select.int):
            raise NotBoundError(reasons.CACHE_OTHER_AXIS())
        if calls(view, aten.select.int):
            dim = None  # a slot alone: no dimension is left that runs over tokens
    if span is None:
        raise NotBoundError(reasons.CACHE_OTHER_AXIS())
    return span, (1 if dim is None else (first_input(write), dim))


def prefix_of(node: torch.fx.Node, token_dim: int | None = None) -> torch.fx.Node | None:
    """Return the tensor of which `node` shows the first entries along a dimension, else None."""
    if not calls(node, aten.slice.Tensor, aten.narrow.default):
        return None
    along = argument(node, "dim", 0) % len(shape_of(node))
    if _bounds(node)[0] not in (0, None) or argument(node, "step", 1) != 1:
        return None
    return first_input(node) if token_dim in (None, along) else None


def _bounds(view: torch.fx.Node) -> tuple[Any, Any, Any]:
    """Return start, stop and count of a slice, as far as it names them."""
    if calls(view, aten.select.int):
        return argument(view, "index"), None, 1
    if calls(view, aten.narrow.default):
        return argument(view, "start"), None, argument(view, "length")
    return argument(view, "start", 0), argument(view, "end"), None


def _shown(view: torch.fx.Node) -> Span | None:
    """Return the slots that a slice shows; None if only a run can tell."""
    start, stop, count = _bounds(view)
    kv_len = shape_of(first_input(view))[argument(view, "dim", 0)]
    if argument(view, "step", 1) != 1:
        return None
    first = _slot(0 if start is None else start, kv_len)
    if first is None:
        return None
    if count is not None:
        return Span(first, count=count)
    last = _slot(stop, kv_len)
    return None if last is None else Span(first, last)


def _slot(bound: Any, kv_len: int | torch.SymInt) -> Slot | None:
    """Return the slot at a bound of a slice, which means the same as in Python.

    None if only a run can tell.
    """
    if isinstance(bound, torch.fx.Node) or (isinstance(bound, int) and bound == 0):
        return bound
    size = static_size(kv_len)
    return None if size is None or bound is None else slice(bound, None).indices(size)[0]


def _single(position: Slot) -> Slots:
    """Return one position, a number or a tensor with one element, as slots."""
    if isinstance(position, torch.fx.Node) and is_tensor(position):
        return position
    return Span(position, count=1)


def _index_copy(node: torch.fx.Node, token_dim: int, _: PositionReader) -> TokenWrite:
    cache, index = first_input(node), argument(node, "index")
    if argument(node, "dim") % len(shape_of(node)) != token_dim:
        raise NotBoundError(reasons.CACHE_OTHER_AXIS())
    tokens: Tokens = (index, 0) if shape_of(index) else 1
    return TokenWrite(through_copies(cache), index, tokens)


def _index_put(node: torch.fx.Node, token_dim: int, reader: PositionReader) -> TokenWrite:
    cache, accumulate = first_input(node), argument(node, "accumulate", False)
    if accumulate:
        raise NotBoundError(reasons.CACHE_NOT_BY_TOKEN())
    found = reader.at_all_rows(argument(node, "indices"), shape_of(cache), token_dim)
    return written_at(cache, found)


def _scatter(node: torch.fx.Node, token_dim: int, reader: PositionReader) -> TokenWrite:
    cache, index, source = first_input(node), argument(node, "index"), argument(node, "src")
    along = argument(node, "dim") % len(shape_of(node)) == token_dim
    if not along or not is_tensor(source) or argument(node, "reduce") is not None:
        raise NotBoundError(reasons.CACHE_NOT_BY_TOKEN())
    found = reader.same_everywhere(index, shape_of(cache), token_dim)
    return written_at(cache, found)


def written_at(cache: torch.fx.Node, found: Positions) -> TokenWrite:
    """Return the write to `cache` at the positions that were found."""
    slots = _single(found.node)
    if found.row_dim is not None:
        assert isinstance(found.node, torch.fx.Node)
        slots = RowSlots(found.node, found.row_dim, found.dim)
    return TokenWrite(through_copies(cache), slots, _count(found), found.rows)


def _count(found: Positions) -> Tokens:
    if found.dim is None or isinstance(found.node, int):
        return 1
    return found.node, found.dim


def _slice_scatter(node: torch.fx.Node, token_dim: int, _: PositionReader) -> TokenWrite:
    source, span = argument(node, "src"), _shown(node)
    if argument(node, "dim", 0) % len(shape_of(node)) != token_dim:
        raise NotBoundError(reasons.CACHE_OTHER_AXIS())
    if span is None:
        raise NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
    return TokenWrite(through_copies(first_input(node)), span, (source, token_dim))


def _select_scatter(node: torch.fx.Node, token_dim: int, _: PositionReader) -> TokenWrite:
    cache = first_input(node)
    if argument(node, "dim") % len(shape_of(node)) != token_dim:
        raise NotBoundError(reasons.CACHE_OTHER_AXIS())
    slot = _slot(argument(node, "index"), shape_of(cache)[token_dim])
    if slot is None:
        raise NotBoundError(reasons.CACHE_WRITE_UNKNOWN())
    return TokenWrite(through_copies(cache), _single(slot), 1)


_FORMS = {
    WriteKind.INDEX_COPY: _index_copy,
    WriteKind.INDEX_PUT: _index_put,
    WriteKind.SCATTER: _scatter,
    WriteKind.SLICE_SCATTER: _slice_scatter,
    WriteKind.SELECT_SCATTER: _select_scatter,
}
"""The function that reads each kind of write in the table of operators."""
