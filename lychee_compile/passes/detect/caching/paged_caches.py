"""Bind a cache of pages to the write of a call: tokens are written where a table says.

    page, slot = table[rows, position // 16], position % 16
    index_put_(cache, [page, slot], new)                        cache [pages, 16, heads, features]
    keys = cache[table].view(batch, tokens, heads, features)    cache[table[b, kv // 16], kv % 16]

The write is at `position` if that in the place of `kv` gives the indices written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch.fx

from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.caching.loads import BATCH, TOKEN, Load, Pages
from lychee_compile.passes.detect.caching.token_writes import TokenWrite, Writes, written_at
from lychee_compile.passes.detect.caching.write_positions import (
    NotBoundError,
    PositionReader,
    axes_over,
    broadcast_shape,
)
from lychee_compile.passes.graph.aliasing import is_given, written_by
from lychee_compile.passes.graph.dataflow import argument, operator_of, shape_of, through_bits
from lychee_compile.passes.graph.operator_facts import WriteKind
from lychee_compile.passes.symbolic.axes import Axes, Axis, with_finer_axes
from lychee_compile.passes.symbolic.views import broadcast


def bind_paged(
    leaf: torch.fx.Node,
    pages: Pages,
    load: Load,
    attention: Attention,
    writes: Writes,
) -> CacheBinding | None:
    """Return the cache of pages that `leaf` shows after the write of this call, else None."""
    write = through_bits(leaf)
    cache = through_bits(write.args[0]) if write.args else write  # type: ignore[arg-type]
    in_place = operator_of(write).write is WriteKind.INDEX_PUT and bool(written_by(write))
    if not in_place or not is_given(cache) or writes.get(cache) != [write]:
        return None
    if argument(write, "accumulate", False) or not write < attention.node:
        return None
    found = _tokens(write, pages, load, PositionReader(attention.node.graph, frozenset(writes)))
    if found is None:
        return None
    return CacheBinding(leaf, pages.slot_dim, "static", cache, None, found.slots, found.tokens)


def _tokens(
    write: torch.fx.Node, pages: Pages, load: Load, reader: PositionReader
) -> TokenWrite | None:
    indices = argument(write, "indices")
    given = [place for place, each in enumerate(indices) if each is not None]
    if given != sorted((pages.page_dim, pages.slot_dim)):
        return None
    wide = broadcast_shape([shape_of(indices[place]) for place in given])

    def match(axes: Axes) -> TokenWrite | None:
        elements = reader.elements(axes, load.names)
        ours = axes_over(axes, wide)
        page, slot = (
            elements.of(indices[dim], broadcast(ours, shape_of(indices[dim]), wide))
            for dim in (pages.page_dim, pages.slot_dim)
        )
        position = _position(slot, pages.size)
        row = None if position is None else _row(page, position, pages, ours)
        if position is None or row is None:
            return None
        rows = {row: 0} if isinstance(row, Axis) else {}
        found = reader.holder(elements, position, indices[pages.slot_dim], rows)
        return written_at(write, found)

    try:
        return with_finer_axes(match)
    except NotBoundError:
        return None


def _position(slot: Any, size: int) -> sympy.Expr | None:
    """Return the position whose remainder by the size of a page is `slot`, else None."""
    if isinstance(slot, sympy.Mod) and slot.args[1] == size:
        return slot.args[0]
    return None


def _row(
    page: Any, position: sympy.Expr, pages: Pages, ours: Sequence[sympy.Expr]
) -> sympy.Expr | None:
    """Return the index of the row that a token is written to, if it is written to `page`."""
    rows = [*ours, sympy.S.Zero] if pages.page.has(BATCH) else [sympy.S.Zero]
    for row in rows:
        if pages.page.xreplace({TOKEN: position, BATCH: row}) == page:
            return row
    return None
