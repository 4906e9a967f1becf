"""Certificates: the share of the softmax that may be unread.

`certify`, grid (rows,):

unread          float32 [rows, bound_tiles, ROWS]   log2 of what programs of `bound_unread` found
longest, list_count                                 see decode/mark_read.py.jinja
partial_top, partial_sum    float32 [rows, splits, GROUP]   what was read, see `combine`
header          int32 [1 + B]                       1 if the index is trusted
missed          float32 [rows, GROUP]               written: upper bounds of the share not read
failing         int32 [rows]                        written: 1 if the row must read all keys
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.decode import load_queries
    from lychee_compile.codegen.triton_lib.names import (
        EPSILON,
        GROUP,
        ROWS,
        SLACK,
        SLOPE,
    )


@triton.jit
def certify(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    unread, longest, list_count, partial_top, partial_sum, header, missed, failing,
    bound_tiles, kv_heads, query_len, splits, SPLITS: tl.constexpr, BOUND_TILES: tl.constexpr,
):
    """Bound the share of the softmax that each head of a row has not read, and compare it.

    The bound is M / (1 + M), rounded up, where M bounds the unread mass relative to the mass read.
    A row of which some head may miss more than EPSILON must read all keys, and then misses nothing.
    """
    head_row = tl.program_id(0)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    queries, _ = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    g, tile, split = tl.arange(0, ROWS), tl.arange(0, BOUND_TILES), tl.arange(0, SPLITS)
    parts = tl.load(
        unread + (head_row.to(tl.int64) * bound_tiles + tile)[:, None] * ROWS + g[None, :],
        mask=(tile < bound_tiles)[:, None], other=-1e30,
    )
    most = tl.max(parts, 0)
    log_unread = most + tl.log2(tl.sum(tl.exp2(parts - most[None, :]), 0))
    mine = head_row.to(tl.int64) * splits + split
    inside = (split < splits)[:, None] & (g < GROUP)[None, :]
    at = mine[:, None] * GROUP + g[None, :]
    tops = tl.load(partial_top + at, mask=inside, other=float("-inf"))
    sums = tl.load(partial_sum + at, mask=inside, other=0.0)
    base = tl.max(tops, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    log_read = base + tl.log2(tl.sum(sums * tl.exp2(tops - base[None, :]), 0))
    squares = tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1)
    reach = tl.sqrt(squares * tl.max(tl.load(longest + mine, mask=split < splits, other=0.0), 0))
    # Scores, and their sums, are rounded: what was read may be less, and what was not more.
    floor = log_read - SLACK * (SLOPE * reach + tl.abs(log_read) + 2.0)
    excess = log_unread + SLACK * tl.abs(log_unread) - floor
    share = (1.0 + SLACK) / (1.0 + tl.exp2(-excess))
    share = tl.where(share == share, tl.minimum(tl.maximum(share, 1.1754944e-38), 1.0), 1.0)
    # A key has just been found changed: what the index says of other keys is not believed either.
    share = tl.where(tl.load(header) == 1, share, 1.0)
    all_read = tl.load(list_count + head_row.to(tl.int64) * splits) < 0
    share = tl.where((most <= -1e29) | all_read, 0.0, share)
    over = tl.max(tl.where((g < GROUP) & (share > EPSILON), 1, 0), 0)
    tl.store(missed + head_row * GROUP + g, tl.where(over > 0, 0.0, share), mask=g < GROUP)
    tl.store(failing + head_row, over)
