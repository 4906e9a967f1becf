"""Luck and weight of keys that are drawn by chance, see `kernels/reference/drawing.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import LUCKIEST


@triton.jit(do_not_specialize=["bin_room"])
def deal_luck(luck, bin_room, LANES: tl.constexpr, SLOT_BITS: tl.constexpr):
    """Store how many bins luck raises each slot by, uint8 [bin_room]; 0 if no key is drawn."""
    slot = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mixed = slot.to(tl.uint32)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 16)) * 0xC2B2AE35
    number = tl.maximum((mixed >> 16).to(tl.int32), 1).to(tl.float32)
    raised = tl.minimum(1143 - (number.to(tl.int32, bitcast=True) >> 20), LUCKIEST)
    if SLOT_BITS >= 31:
        raised = tl.zeros([LANES], tl.int32)
    tl.store(luck + slot, raised.to(tl.uint8), mask=slot < bin_room)


@triton.jit
def lift_of(item, SLOT_BITS: tl.constexpr):
    """Return the slots of listed items [N], and log2 of how many keys each stands for."""
    depth = (item >> SLOT_BITS) - 1
    octaves, eighths = depth >> 3, (depth & 7).to(tl.float32)
    lift = octaves.to(tl.float32) - tl.log2(1 - (eighths + 0.5) * 0.0625)
    return item & ((1 << SLOT_BITS) - 1), tl.where(depth < 0, 0.0, lift)
