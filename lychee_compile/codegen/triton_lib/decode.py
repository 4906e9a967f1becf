"""The queries of a row, and the part of its attention that one program computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import DIM, GROUP, HEAD_DIM, ROWS, VALUE_DIM, WIDTH


@triton.jit
def load_queries(query, b, kv_head, t, stride_b, stride_h, stride_t, stride_d):
    """Return the queries [ROWS, DIM] of a group at position t, and their heads, padded."""
    h = kv_head * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1)
    d = tl.arange(0, DIM)
    place = query + b.to(tl.int64) * stride_b + t * stride_t
    place = place + h[:, None] * stride_h + d[None, :] * stride_d
    return tl.load(place, mask=d[None, :] < HEAD_DIM, other=0.0), h


@triton.jit
def store_part(top, total, result, head_row, split, splits, partial, partial_top, partial_sum):
    """Store one program's part of a group's attention for `combine`."""
    g, width = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row = (head_row.to(tl.int64) * splits + split) * GROUP + g
    tl.store(partial_top + row, top, mask=g < GROUP)
    tl.store(partial_sum + row, total, mask=g < GROUP)
    tl.store(
        partial + row[:, None] * VALUE_DIM + width[None, :], result,
        mask=(g < GROUP)[:, None] & (width < VALUE_DIM)[None, :],
    )
