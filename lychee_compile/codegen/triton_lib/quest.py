"""Kernels and functions of Quest's selection of pages.

`rank_boxes`, grid (rows, lots of RANKED pages), has these parameters:

scores          float32 [rows, GROUP, pages]        log2 of the mass of each page
totals          float32 [rows, tiles, ROWS]         log2 of the sums of programs of `scan_boxes`
page_bins       uint8 [rows, lots, RANKED]          written: bins of the pages
ranks           int32 [rows, lots, BINS]            written: pages of a lot in each bin or above
histogram       int32 [rows, 2, BINS]               written: pages of a row in each bin
pages           int                                 pages of the index
tiles           int                                 programs of `scan_boxes` for a row
TILES           constexpr int                       tiles, up to a power of two
EARLY           constexpr bool                      may begin before the kernel before has ended
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.bins import (
        bins_of,
        count_bins,
        denominators,
        written_slots,
    )
    from lychee_compile.codegen.triton_lib.fingerprints import fingerprint
    from lychee_compile.codegen.triton_lib.names import (
        BINS,
        DIM,
        GROUP,
        HEAD_DIM,
        PAGE,
        RANKED,
        ROWS,
    )


@triton.jit
def rank_boxes(
    scores, totals, page_bins, ranks, histogram, pages, tiles,
    TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of RANKED pages, and counts of each bin or above.

    No page that may be chosen is in the first bin.
    """
    head_row, lot = tl.program_id(0), tl.program_id(1)
    g, page = tl.arange(0, ROWS)[:, None], lot * RANKED + tl.arange(0, RANKED)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(
        scores + (head_row.to(tl.int64) * GROUP + g) * pages + page[None, :],
        mask=(g < GROUP) & (page < pages)[None, :], other=float("-inf"),
    )
    possible = tl.max(value, 0) > float("-inf")
    entry = bins_of(value, denominators(totals, head_row, tiles, TILES), possible)
    entry = tl.maximum(entry, possible.to(tl.int32))
    mine = head_row.to(tl.int64) * tl.num_programs(1) + lot
    tl.store(page_bins + mine * RANKED + tl.arange(0, RANKED), entry.to(tl.uint8))
    counts = count_bins(histogram + head_row * (2 * BINS), entry)
    tl.store(ranks + mine * BINS + tl.arange(0, BINS), tl.cumsum(counts, 0, reverse=True))


@triton.jit
def box_new(
    key, stride_b, stride_h, stride_l, stride_d,
    header, fingerprints, least, greatest, positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, kv_len,
):
    """Put a box around the keys of every page whose last slot this step has written.

    All new keys get fingerprints.
    """
    space = (b * kv_heads + kv_head).to(tl.int64)
    d, inner = tl.arange(0, DIM), tl.arange(0, PAGE)
    key += b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    for number in range(written):
        slot = tl.load(positions + b * position_stride_b + number * position_stride_t).to(tl.int32)
        slot = tl.where(slot < 0, slot + kv_len, slot)
        newest = key + slot.to(tl.int64) * stride_l + d * stride_d
        newest = tl.load(newest, mask=d < HEAD_DIM, other=0.0)
        mark = tl.sum(fingerprint(newest[None, :]), 0)
        tl.store(fingerprints + space * slots + slot, mark)
        page = slot // PAGE
        if slot % PAGE == PAGE - 1:
            place = (page * PAGE + inner).to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
            keys = tl.load(key + place, mask=(d < HEAD_DIM)[None, :], other=0.0)
            into = (space * (slots // PAGE) + page) * HEAD_DIM + d
            kind = least.dtype.element_ty
            tl.store(least + into, tl.min(keys, 0).to(kind), mask=d < HEAD_DIM)
            tl.store(greatest + into, tl.max(keys, 0).to(kind), mask=d < HEAD_DIM)
    if (kv_head == 0) & (written > 0):
        last = written_slots(
            positions, position_stride_b, position_stride_t, written, b, kv_len, -1
        )
        tl.store(header + 1 + b, tl.max(last, 0) + 1)
