"""Luck and weight of keys that are drawn by chance, see `kernels/reference/drawing.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import BINS, LUCKIEST, SLOT_BITS


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


@triton.jit
def salt_of(step, kv_head):
    """Return the number that the luck of a KV head depends on in the step that writes slot `step`."""
    return (step * 64 + kv_head).to(tl.uint32) * 0x9E3779B1


@triton.jit
def luck_of(slot, salt):
    """Return how many bins luck raises each slot by, int32 from 0 to LUCKIEST."""
    mixed = slot.to(tl.uint32) + salt
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 16)) * 0xC2B2AE35
    number = tl.maximum((mixed >> 16).to(tl.int32), 1).to(tl.float32)
    return tl.minimum(1143 - (number.to(tl.int32, bitcast=True) >> 20), LUCKIEST)


@triton.jit
def priorities(entry, slot, salt):
    """Return the bins [N] of priorities, by the bins of shares; the first stays what it is."""
    return tl.where(entry > 0, tl.minimum(entry + luck_of(slot, salt), BINS - 1), 0)


@triton.jit
def drawn_items(slot, entry, cut, salt):
    """Return slots [N], with how far the bin of each share is below the cut above SLOT_BITS.

    `entry` [N] are the bins of priorities. Bits of 0 mean that the slot stands for itself.
    """
    depth = cut - (entry - luck_of(slot, salt))
    return slot + (tl.maximum(depth + 1, 0) << SLOT_BITS)
