"""Bind the keys behind a prefix that all rows of a batch share, and the prefix, to their caches.

    own.index_copy_(2, positions, new)                    [B, H, slots, D]
    keys = cat((prefix.expand(B, -1, -1, -1), own), 2)    [1, H, n, D] in front

The prefix is not written by the graph. Rows share it if its tensor has no dimension over rows, or
if that has the stride 0.
"""

from __future__ import annotations

from dataclasses import replace

from lychee_compile import torch_private
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding, bind_cache
from lychee_compile.passes.detect.caching.token_writes import Writes
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.graph.aliasing import storage_of
from lychee_compile.passes.graph.dataflow import value_of


def bind_behind_shared(attention: Attention, writes: Writes) -> CacheBinding | None:
    """Return the cache of the keys behind a shared prefix, which `shared` binds.

    None if that is not recognised. There is a fixed number of queries.
    """
    if not attention.parts or attention.form == "flex" or attention.is_causal:
        return None
    front, behind = map(attention.over, attention.parts)
    if not isinstance(attention.query_len, int):
        return None
    if not (_is_shared(front.key, attention) and _is_shared(front.value, attention)):
        return None
    if any(torch_private.is_parameter(storage_of(each.key.node)) for each in (front, behind)):
        return None
    prefix, own = (bind_cache(each, writes) for each in (front, behind))
    if not (isinstance(prefix, CacheBinding) and isinstance(own, CacheBinding)):
        return None
    return replace(own, shared=prefix) if prefix.reads_only else None


def _is_shared(operand: Operand, attention: Attention) -> bool:
    """True if an operand has the same memory for all rows of the batch."""
    batch = set(attention.roles.batch)
    strides = value_of(operand.node).stride()
    return all(
        not batch & set(axes) or (set(axes) <= batch and stride == 0)
        for axes, stride in zip(operand.layout, strides, strict=True)
    )
