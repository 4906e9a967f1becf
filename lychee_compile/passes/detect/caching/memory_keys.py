"""Bind the keys behind a few others to their cache: learned memory keys, a null key, a soft prompt.

cache = cat((past, new), 2)                         returned
keys = cat((memory.expand(batch, ...), cache), 2)   the keys of the attention
"""

from __future__ import annotations

from dataclasses import replace

from lychee_compile import torch_private
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding, bind_cache
from lychee_compile.passes.detect.caching.token_writes import Writes
from lychee_compile.passes.graph.aliasing import storage_of


def bind_behind(attention: Attention, writes: Writes, most: int) -> CacheBinding | None:
    """Return the cache of all keys but the first; None if it is not recognised.

    At most `most` keys are in front, fewer than behind. There is a fixed number of queries.
    """
    if not attention.parts or attention.form == "flex" or attention.is_causal:
        return None
    front, behind = map(attention.over, attention.parts)
    count, rest = front.kv_len, behind.kv_len
    if not isinstance(attention.query_len, int) or not isinstance(count, int) or count > most:
        return None
    if isinstance(rest, int) and rest <= count:
        return None
    if torch_private.is_parameter(storage_of(behind.key.node)):
        return None
    binding = bind_cache(behind, writes)
    return replace(binding, in_front=count) if isinstance(binding, CacheBinding) else None


def over_cache(attention: Attention, binding: CacheBinding | None) -> Attention:
    """Return the attention over the keys of the cache alone, without mask if others are in front.

    It is `attention` itself if no keys are in front of the cache.
    """
    if binding is None or not binding.is_behind:
        return attention
    return attention.over(attention.parts[1])
