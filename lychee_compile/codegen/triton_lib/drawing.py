"""Luck and weight of keys that are drawn by chance, see `kernels/reference/drawing.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import BINS, LUCKIEST, SLOT_BITS


@triton.jit
def luck_of_number(number):
    """Return how many bins luck raises an item by, int32, for numbers [N] from 0 to 65535."""
    number = tl.maximum(number.to(tl.int32), 1).to(tl.float32).to(tl.int32, bitcast=True)
    raised = 8 * (127 + 15 - (number >> 23))
    raised += ((number & 0x7FFFFF) < 6996167).to(tl.int32)
    raised += ((number & 0x7FFFFF) < 5719293).to(tl.int32)
    raised += ((number & 0x7FFFFF) < 4548395).to(tl.int32)
    raised += ((number & 0x7FFFFF) < 3474676).to(tl.int32)
    raised += ((number & 0x7FFFFF) < 2490071).to(tl.int32)
    raised += ((number & 0x7FFFFF) < 1587185).to(tl.int32)
    raised += ((number & 0x7FFFFF) < 759234).to(tl.int32)
    return tl.minimum(raised, LUCKIEST)


@triton.jit
def luck_of(mixed):
    """Return how many bins luck raises each of the numbers [N], uint32, by: int32."""
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 16)) * 0xC2B2AE35
    return luck_of_number(mixed >> 16)


@triton.jit(do_not_specialize=["bin_room"])
def deal_luck(luck, bin_room, LANES: tl.constexpr, SLOT_BITS: tl.constexpr):
    """Store how many bins luck raises each slot by, uint8 [bin_room]; 0 if no key is drawn."""
    slot = tl.program_id(0) * LANES + tl.arange(0, LANES)
    raised = luck_of(slot.to(tl.uint32))
    if SLOT_BITS >= 31:
        raised = tl.zeros([LANES], tl.int32)
    tl.store(luck + slot, raised.to(tl.uint8), mask=slot < bin_room)


@triton.jit
def lift_of(item, SLOT_BITS: tl.constexpr):
    """Return the slots of listed items [N], and log2 of how many keys each stands for."""
    # Few instructions: every thread does this for all its columns of a product.
    return item & ((1 << SLOT_BITS) - 1), (item >> SLOT_BITS).to(tl.float32) * 0.0625


@triton.jit
def salt_of(step, kv_head):
    """Return the number, uint32, that moves the luck of a KV head in the step at slot `step`."""
    return ((step * 64 + kv_head).to(tl.uint32) * 0x9E3779B1) >> 16


@triton.jit
def luck_at(slot, salt):
    """Return how many bins luck raises the slots [N] by, int32.

    Their numbers modulo 2^16 are mixed one to one, see `kernels/reference/decode_drawing.py`.
    """
    mixed = (slot.to(tl.uint32) + salt) & 65535
    mixed = (mixed ^ (mixed >> 7)) * 0x2993 & 65535
    mixed = (mixed ^ (mixed >> 5)) * 0xE877 & 65535
    mixed = (mixed ^ (mixed >> 9)) * 0x0235 & 65535
    return luck_of_number(mixed ^ (mixed >> 10))


@triton.jit
def deal_table(luck, part, parts):
    """Store one of so many parts of a table of luck without salt, uint8 [65536]."""
    for start in range(part * 128, 65536, parts * 128):
        slot = start + tl.arange(0, 128)
        tl.store(luck + slot, luck_at(slot, 0).to(tl.uint8))


@triton.jit
def priorities(entry, slot, salt, luck, DEALT: tl.constexpr):
    """Return the bins [N] of priorities, by the bins of shares; the first stays what it is.

    If DEALT, `luck` is the table of `deal_table`.
    """
    if DEALT:
        place = ((slot.to(tl.uint32) + salt) & 65535).to(tl.int32)
        raised = entry + tl.load(luck + place).to(tl.int32)
    else:
        raised = entry + luck_at(slot, salt)
    return tl.where(entry > 0, tl.minimum(raised, BINS - 1), 0)


@triton.jit
def drawn_items(item, salt):
    """Return slots [N], with log2 of how many each stands for, in sixteenths, above SLOT_BITS.

    `item` [N] are slots, with the bins that their priorities are above the cut in these bits.
    """
    above = item >> SLOT_BITS
    slot = item - (above << SLOT_BITS)
    depth = luck_at(slot, salt) - above
    return slot + (tl.where(depth < 0, 0, 2 * depth + 1) << SLOT_BITS)
