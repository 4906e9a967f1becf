"""Residuals of sketches: how far a key is from its sketch, within the axes and out of them.

A key is k = centre + A^T x + e with the axes A as rows, coordinates x of its sketch, and a rest e.
For any c and f with e = A^T c + f, and for any query, q.e = (A q).(c + A f) + (q - A^T A q).f: this
holds for axes that are not orthonormal too. Cauchy and Schwarz bound both terms by lengths.

`measure` and `measure_new`, templates of the folder lychee, store them for keys:

residual        float32 [B, Hkv, slots, 2]          lengths of c + A f and of f, rounded up

`weigh_blocks`, grid (rows, blocks):

bound_weights   float32 [rows, blocks, ROWS, KEPT_COLUMNS]  written: A q times quantisation steps
bound_reach     float32 [rows, blocks, 4, ROWS]     written: q.centre, the lengths of A q and of
                                                    q - A^T A q, and what rounding may hide
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.decode import load_queries
    from lychee_compile.codegen.triton_lib.names import (
        COARSE_BYTES,
        DIM,
        FINE_BYTES,
        HEAD_DIM,
        KEPT,
        KEPT_COLUMNS,
        KEPT_FINE,
        ROWS,
        SLACK,
    )


@triton.jit
def sketch_levels(fine, coarse, slot, inside, kept):
    """Return the coordinates `kept` [K] of sketches in the slots [N], in steps: float32 [K, N]."""
    other = tl.maximum(kept - KEPT_FINE, 0)
    is_fine, there = (kept < KEPT_FINE)[:, None], inside[None, :]
    packed = tl.load(
        fine + slot[None, :] * FINE_BYTES + (kept % FINE_BYTES)[:, None],
        mask=is_fine & there, other=0,
    ).to(tl.int32)
    packed_coarse = tl.load(
        coarse + slot[None, :] * COARSE_BYTES + (other % COARSE_BYTES)[:, None],
        mask=((kept >= KEPT_FINE) & (kept < KEPT))[:, None] & there, other=0,
    ).to(tl.int32)
    of_fine = (packed >> (kept // FINE_BYTES * 4 & 31)[:, None]) & 15
    of_coarse = (packed_coarse >> (other // COARSE_BYTES * 2 & 31)[:, None]) & 3
    level = tl.where(is_fine, of_fine.to(tl.float32) - 7.5, of_coarse.to(tl.float32) - 1.5)
    return tl.where((kept < KEPT)[:, None], level, 0.0)


@triton.jit
def load_axes(axes, step, block, kept):
    """Return the axes `kept` [K] of a block, float32 [K, DIM], and their quantisation steps [K]."""
    d = tl.arange(0, DIM)
    axis = tl.load(
        axes + (block * KEPT + kept)[:, None] * HEAD_DIM + d[None, :],
        mask=(kept < KEPT)[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
    ).to(tl.float32)
    return axis, tl.load(step + block * KEPT + kept, mask=kept < KEPT, other=0.0)


@triton.jit
def store_residuals(keys, fine, coarse, axes, centre, step, block, residual, at, inside):
    """Store the residuals of the keys [N, DIM] of a block, whose sketches are at `at` [N]."""
    d = tl.arange(0, DIM)
    middle = tl.load(centre + block * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    keys = keys.to(tl.float32)
    centred = keys - middle[None, :]
    rest, far = centred, tl.sqrt(tl.sum(middle * middle, 0))
    for first in range(0, KEPT_COLUMNS, 16):  # few axes at a time: shared memory is small
        axis, steps = load_axes(axes, step, block, first + tl.arange(0, 16))
        within = tl.dot(centred, tl.trans(axis), input_precision="ieee")
        rest -= tl.dot(within, axis, input_precision="ieee")
        far += tl.sum(steps, 0) * 16.0
    squares = tl.sum(keys * 0.0, 1)
    for first in range(0, KEPT_COLUMNS, 16):
        axis, steps = load_axes(axes, step, block, first + tl.arange(0, 16))
        level = sketch_levels(fine, coarse, at, inside, first + tl.arange(0, 16))
        off = tl.dot(centred + rest, tl.trans(axis), input_precision="ieee")
        off -= tl.trans(level) * steps[None, :]
        squares += tl.sum(off * off, 1)
    lost = (tl.sqrt(tl.sum(keys * keys, 1)) + far) * SLACK  # rounding may hide so much
    coarser = tl.sqrt(squares) * (1.0 + SLACK) + lost
    outside = tl.sqrt(tl.sum(rest * rest, 1)) * (1.0 + SLACK) + lost
    coarser = tl.where(coarser == coarser, coarser, float("inf"))
    outside = tl.where(outside == outside, outside, float("inf"))
    tl.store(residual + at * 2, coarser, mask=inside)
    tl.store(residual + at * 2 + 1, outside, mask=inside)


@triton.jit
def weigh_blocks(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    axes, centre, step, bound_weights, bound_reach, blocks, kv_heads, query_len,
):
    """Store what bounds of q.k need of a block: weights of coordinates, and lengths of the query.

    Nothing is rounded to less than float32.
    """
    head_row, number = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    d, g = tl.arange(0, DIM), tl.arange(0, ROWS)
    block = (b * kv_heads + kv_head).to(tl.int64) * blocks + number
    queries, _ = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    queries = queries.to(tl.float32)
    middle = tl.load(centre + block * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    mine = head_row.to(tl.int64) * blocks + number
    rest, far = queries, tl.sqrt(tl.sum(middle * middle, 0))
    squares = tl.zeros([ROWS], tl.float32)
    for first in range(0, KEPT_COLUMNS, 16):
        kept = first + tl.arange(0, 16)
        axis, steps = load_axes(axes, step, block, kept)
        within = tl.dot(queries, tl.trans(axis), input_precision="ieee")
        rest -= tl.dot(within, axis, input_precision="ieee")
        squares += tl.sum(within * within, 1)
        far += tl.sum(steps, 0) * 16.0
        into = bound_weights + (mine * ROWS + g[:, None]) * KEPT_COLUMNS + kept[None, :]
        tl.store(into, within * steps[None, :])
    length = tl.sqrt(tl.sum(queries * queries, 1))
    into = bound_reach + mine * (4 * ROWS) + g
    tl.store(into, tl.sum(queries * middle[None, :], 1))
    tl.store(into + ROWS, tl.sqrt(squares) + length * (4.0 * SLACK))
    tl.store(into + 2 * ROWS, tl.sqrt(tl.sum(rest * rest, 1)) + length * (4.0 * SLACK))
    tl.store(into + 3 * ROWS, length * far * SLACK)
