"""Codes of sketches: how they are packed, loaded and made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import (
        COARSE_BYTES,
        COARSE_COLUMNS,
        DIM,
        FINE_BYTES,
        FINE_COLUMNS,
        HEAD_DIM,
        IN_REGISTERS,
        KEPT_COLUMNS,
        PAGE_STEP,
        ROWS,
    )


@triton.jit
def load_weights(weights, mine, FIRST: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the weights [ROWS, COLUMNS] of the coordinates from FIRST on."""
    column, g = tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    place = weights + (mine * ROWS + g[:, None]) * KEPT_COLUMNS + FIRST + column[None, :]
    return tl.load(place, mask=(column < WIDE)[None, :], other=0.0)


@triton.jit
def codes(packed, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Return the codes at SHIFT in the bytes `packed`, plus 128, as bfloat16.

    They are put into the mantissa of 128.0, two at a time: no code has to be converted.
    """
    if IN_REGISTERS:
        made = tl.inline_asm_elementwise(
            f"""{{
            .reg .b32 moved, low, high;
            shr.b32 moved, $2, {SHIFT};
            prmt.b32 low, moved, 0, 0x4140;
            prmt.b32 high, moved, 0, 0x4342;
            lop3.b32 $0, low, {MASK * 0x10001}, 0x43004300, 0xEA;
            lop3.b32 $1, high, {MASK * 0x10001}, 0x43004300, 0xEA;
            }}""",
            "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4,
        )
    else:
        made = (((packed.to(tl.int16) >> SHIFT) & MASK) | 0x4300).to(tl.bfloat16, bitcast=True)
    return made


@triton.jit
def load_codes(fine, coarse, slot, inside):
    """Return packed codes, uint8 [FINE_COLUMNS, N] and [COARSE_COLUMNS, N], of the slots [N]."""
    byte, column = tl.arange(0, FINE_COLUMNS), tl.arange(0, COARSE_COLUMNS)
    packed = tl.load(
        fine + slot[None, :] * FINE_BYTES + byte[:, None],
        mask=inside[None, :] & (byte < FINE_BYTES)[:, None], other=0,
    )
    packed_coarse = tl.load(
        coarse + slot[None, :] * COARSE_BYTES + column[:, None],
        mask=inside[None, :] & (column < COARSE_BYTES)[:, None], other=0,
    )
    return packed, packed_coarse


@triton.jit
def field_codes(
    centred, axes, step,
    FIRST: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):
    """Return the codes, int32 [N, COLUMNS], of the coordinates from FIRST on."""
    column, d = tl.arange(0, COLUMNS), tl.arange(0, DIM)
    inside = (column < WIDE)[None, :] & (d < HEAD_DIM)[:, None]
    axis = tl.load(axes + (FIRST + column)[None, :] * HEAD_DIM + d[:, None], mask=inside, other=0.0)
    steps = tl.load(step + FIRST + column, mask=column < WIDE, other=0.0)[None, :]
    level = tl.dot(centred.to(axis.dtype), axis) / tl.maximum(steps, 1e-30)
    level = tl.where((steps > 0) & (level == level), level, 0.0)  # a NaN counts as 0
    code = tl.floor(tl.minimum(tl.maximum(level, -1.0 * (LEVELS // 2)), 1.0 * LEVELS)) + LEVELS // 2
    code = tl.minimum(code, LEVELS - 1).to(tl.int32)
    return tl.where((column < WIDE)[None, :], code, 0)


@triton.jit
def page_code(mean):
    """Return the 4-bit code, int32, of a page's mean code, float32."""
    code = tl.floor((mean - 7.5) / PAGE_STEP + 8.0)
    return tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)
