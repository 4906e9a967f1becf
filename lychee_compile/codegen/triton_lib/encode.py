"""Kernels and functions that bring sketches up to date with the keys.

`encode`, grid (B * Hkv, programs of 64 slots), has these parameters:

key, strides    [B, Hkv, L, D]
fingerprints    int32 [B, Hkv, slots]               written: hashes of the keys
fine, coarse    uint8 [B, Hkv, slots, bytes]        written: 4-bit and 2-bit codes of the keys
pages           uint8 [B, Hkv, slots / PAGE, bytes] written: codes of the means of pages
axes            half [B, Hkv, blocks, KEPT, D]      principal axes of each block
centre          float32 [B, Hkv, blocks, D]         mean key of each block
step            float32 [B, Hkv, blocks, KEPT]      quantisation steps
begin, end      int                                 slots to sketch; begin is a multiple of 64
slots, blocks   int                                 slots and blocks of the index
kv_heads        int                                 Hkv
BLOCK           constexpr int                       slots of a block
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.bins import written_slots
    from lychee_compile.codegen.triton_lib.fingerprints import fingerprint
    from lychee_compile.codegen.triton_lib.names import (
        COARSE_BYTES,
        COARSE_COLUMNS,
        DIM,
        FINE_BYTES,
        FINE_COLUMNS,
        HEAD_DIM,
        KEPT,
        KEPT_COLUMNS,
        KEPT_FINE,
        PAGE,
        encode_keys,
    )
    from lychee_compile.codegen.triton_lib.sketch import page_code


@triton.jit(do_not_specialize=["begin", "end"])
def encode(
    key, stride_b, stride_h, stride_l, stride_d,
    fingerprints, fine, coarse, pages, axes, centre, step,
    begin, end, slots, kv_heads, blocks, BLOCK: tl.constexpr,
):
    """Sketch the keys in the slots [begin, end), 64 a program; begin is a multiple of 64."""
    space = tl.program_id(0)
    slot = begin + tl.program_id(1) * 64 + tl.arange(0, 64)
    b, kv_head = space // kv_heads, space % kv_heads
    d = tl.arange(0, DIM)
    place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    place = place + slot.to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
    inside = (slot < end)[:, None]
    keys = tl.load(place, mask=inside & (d < HEAD_DIM)[None, :], other=0.0)
    mark = fingerprint(keys)
    keys = keys.to(tl.float32)
    block = space.to(tl.int64) * blocks + (begin + tl.program_id(1) * 64) // BLOCK
    axes, centre = axes + block * KEPT * HEAD_DIM, centre + block * HEAD_DIM
    packed, packed_coarse = encode_keys(keys, axes, centre, step + block * KEPT)
    space = space.to(tl.int64) * slots
    tl.store(fingerprints + space + slot, mark, mask=slot < end)
    byte, column = tl.arange(0, FINE_COLUMNS), tl.arange(0, COARSE_COLUMNS)
    tl.store(
        fine + (space + slot)[:, None] * FINE_BYTES + byte[None, :],
        packed, mask=inside & (byte < FINE_BYTES)[None, :],
    )
    tl.store(
        coarse + (space + slot)[:, None] * COARSE_BYTES + column[None, :],
        packed_coarse, mask=inside & (column < COARSE_BYTES)[None, :],
    )
    held = tl.sum(tl.reshape((slot < end).to(tl.float32), [64 // PAGE, PAGE]), 1)
    number = tl.maximum(held, 1.0)[:, None]
    each = tl.reshape(tl.where(inside, packed, 0), [64 // PAGE, PAGE, FINE_COLUMNS]).to(tl.int32)
    low = page_code(tl.sum(each & 15, 1).to(tl.float32) / number)
    high = page_code(tl.sum(each >> 4, 1).to(tl.float32) / number)
    page = (begin + tl.program_id(1) * 64) // PAGE + tl.arange(0, 64 // PAGE)
    tl.store(
        pages + (space // PAGE + page)[:, None] * FINE_BYTES + byte[None, :],
        (low | (high << 4)).to(tl.uint8),
        mask=(held > 0)[:, None] & (byte < FINE_BYTES)[None, :],
    )


@triton.jit
def encode_new(
    key, stride_b, stride_h, stride_l, stride_d,
    header, fingerprints, fine, coarse, pages, axes, centre, step, spread,
    positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, blocks, BLOCK: tl.constexpr, kv_len,
):
    """Sketch the keys that this step has written, and sum up their pages anew.

    A block that begins takes over the axes of the block before it.
    """
    space = (b * kv_heads + kv_head).to(tl.int64)
    kept, d, row = tl.arange(0, KEPT_COLUMNS), tl.arange(0, DIM), tl.arange(0, PAGE)
    byte, column = tl.arange(0, FINE_COLUMNS), tl.arange(0, COARSE_COLUMNS)
    is_fine = kept < KEPT_FINE
    number_coarse = kept - KEPT_FINE
    whole = (kept < KEPT)[:, None] & (d < HEAD_DIM)[None, :]
    for number in range(written):
        slot = tl.load(positions + b * position_stride_b + number * position_stride_t).to(tl.int32)
        slot = tl.where(slot < 0, slot + kv_len, slot)
        block = space * blocks + slot // BLOCK
        source = tl.where((slot % BLOCK == 0) & (slot > 0), block - 1, block)
        place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
        place += slot.to(tl.int64) * stride_l
        newest = tl.load(place + d * stride_d, mask=d < HEAD_DIM, other=0.0)
        mark = tl.sum(fingerprint(newest[None, :]), 0)
        newest = newest.to(tl.float32)
        middle = tl.load(centre + source * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        matrix = source * (KEPT * HEAD_DIM) + kept[:, None] * HEAD_DIM + d[None, :]
        axis = tl.load(axes + matrix, mask=whole, other=0.0)
        steps = tl.load(step + source * KEPT + kept, mask=kept < KEPT, other=0.0)
        page = slot // PAGE
        older = tl.load(
            fine + (space * slots + page * PAGE + row)[:, None] * FINE_BYTES + byte[None, :],
            mask=(page * PAGE + row < slot)[:, None] & (byte < FINE_BYTES)[None, :], other=0,
        ).to(tl.int32)
        if source != block:
            spreads = tl.load(spread + source * KEPT_FINE + kept, mask=is_fine, other=0.0)
            moved = (block - source) * (KEPT * HEAD_DIM)
            tl.store(axes + matrix + moved, axis, mask=whole)
            tl.store(centre + block * HEAD_DIM + d, middle, mask=d < HEAD_DIM)
            tl.store(step + block * KEPT + kept, steps, mask=kept < KEPT)
            tl.store(spread + block * KEPT_FINE + kept, spreads, mask=is_fine)
        level = tl.sum((newest - middle)[None, :] * axis.to(tl.float32), 1)
        level = level / tl.maximum(steps, 1e-30)
        level = tl.where((steps > 0) & (level == level), level, 0.0)  # a NaN counts as 0
        half = tl.where(is_fine, 8.0, 2.0)
        code = tl.floor(tl.minimum(tl.maximum(level, -half), half)) + half
        code = tl.minimum(code, 2 * half - 1).to(tl.int32)
        into = (kept % FINE_BYTES)[:, None] == byte[None, :]
        moved_code = code << (kept // FINE_BYTES * 4)
        packed = tl.sum(tl.where(into & is_fine[:, None], moved_code[:, None], 0), 0)
        into = (number_coarse % COARSE_BYTES)[:, None] == column[None, :]
        into = into & ((kept >= KEPT_FINE) & (kept < KEPT))[:, None]
        moved_code = code << (tl.maximum(number_coarse, 0) // COARSE_BYTES * 2)
        packed_coarse = tl.sum(tl.where(into, moved_code[:, None], 0), 0)
        at = space * slots + slot
        tl.store(fingerprints + at, mark)
        tl.store(fine + at * FINE_BYTES + byte, packed.to(tl.uint8), mask=byte < FINE_BYTES)
        tl.store(
            coarse + at * COARSE_BYTES + column, packed_coarse.to(tl.uint8),
            mask=column < COARSE_BYTES,
        )
        count = (slot % PAGE + 1).to(tl.float32)
        low = page_code((tl.sum(older & 15, 0) + (packed & 15)).to(tl.float32) / count)
        high = page_code((tl.sum(older >> 4, 0) + (packed >> 4)).to(tl.float32) / count)
        tl.store(
            pages + (space * (slots // PAGE) + page) * FINE_BYTES + byte,
            (low | (high << 4)).to(tl.uint8), mask=byte < FINE_BYTES,
        )
        tl.debug_barrier()
    if (kv_head == 0) & (written > 0):
        last = written_slots(
            positions, position_stride_b, position_stride_t, written, b, kv_len, -1
        )
        tl.store(header + 1 + b, tl.max(last, 0) + 1)
