"""Codes of sketches: how they are packed, loaded and made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import DIM, HEAD_DIM, IN_REGISTERS, PAGE_STEP


@triton.jit
def words_of(plane):
    """Return a pointer to bytes as one to words of four bytes."""
    return plane.to(tl.pointer_type(tl.int32))


@triton.jit
def dot4(codes, weights, total):
    """Return `total` plus the products of four codes and their weights: int32, of any shape.

    Codes are the bytes of a word without sign, weights those of a word with a sign.
    """
    if IN_REGISTERS:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, weights, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )
    else:
        for byte in tl.static_range(4):
            total += ((codes >> (8 * byte)) & 255) * ((weights << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def load_bytes(plane, number, inside, BYTES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the bytes, uint8 [N, COLUMNS], of the tokens or pages `number` [N] in a plane."""
    byte = tl.arange(0, COLUMNS)[None, :]
    there = inside[:, None] & (byte < BYTES)
    return tl.load(plane + number[:, None] * BYTES + byte, mask=there, other=0)


@triton.jit
def load_weights(weights, FIRST: tl.constexpr, BYTES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the weights of a head from FIRST on, int32 [1 or N, COLUMNS]; 0 for padding."""
    byte = tl.arange(0, COLUMNS)[None, :]
    return tl.load(weights + FIRST + byte, mask=byte < BYTES, other=0).to(tl.int32)


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
