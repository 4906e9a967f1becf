"""The list of the keys that a tile of queries reads, from their bins or from flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import BINS


@triton.jit
def load_edges(edge, place):
    """Return what `summarise_queries` has stored of `edges` for one tile."""
    edge += place * 8
    own, own_end = tl.load(edge + 2), tl.load(edge + 3)
    return tl.load(edge), tl.load(edge + 1), own, own_end, tl.load(edge + 4), tl.load(edge + 5)


@triton.jit
def bins_between(bins, bin_room, slot, begin, stop):
    """Return the bins of the slots [N] that are in [begin, stop), and 0 for others."""
    # Runs of 16 are loaded whole, even bins never written: a mask by slot would load one by one.
    entry = tl.load(bins + slot, mask=slot < bin_room, other=0).to(tl.int32)
    inside = (slot - begin).to(tl.uint32) < (stop - begin).to(tl.uint32)
    return tl.where(inside, entry, 0)


@triton.jit
def room_for(seen, always, share, most, shortest, capacity):
    """Return how many keys may be chosen, if `seen` are seen beside the `always` read."""
    allowed = tl.minimum(tl.ceil((always + seen) * share).to(tl.int32), most)
    allowed = tl.where(always + seen < shortest, 2**30, allowed)
    return tl.minimum(tl.maximum(allowed - always, 0), capacity)


@triton.jit
def cut_of(held, level, room):
    """Return the highest level with more than `room` at or above it, or 0, and the number above."""
    through = tl.cumsum(held, 0, reverse=True)
    cut = tl.max(tl.where(through > room, level, 0), 0)
    return cut, tl.max(tl.where(level > cut, through, 0), 0)


@triton.jit
def counted(bins, bin_room, begin, stop, LANES: tl.constexpr):
    """Count the slots [begin, stop) in each bin but the first: int32 [BINS]."""
    held = tl.zeros([BINS], tl.int32)
    for start in range(begin // 16 * 16, stop, LANES):
        slot = start + tl.arange(0, LANES)
        held += tl.histogram(bins_between(bins, bin_room, slot, begin, stop), BINS)
    return tl.where(tl.arange(0, BINS) > 0, held, 0)


@triton.jit(do_not_specialize=["capacity", "kv_len"])
def list_keys(read, edge, chosen, counts, capacity, kv_len, LANES: tl.constexpr):
    """List the slots that a row reads, uint8 `read` [rows, kv_len], but for those between edges.

    `chosen`, int32 [rows, capacity], gets the slots in their order, `counts`, int32 [rows], their
    number.
    """
    row = tl.program_id(0)
    first, begin, own, own_end, stop, end = load_edges(edge, row)
    read += row.to(tl.int64) * kv_len
    chosen += row.to(tl.int64) * capacity
    count = 0
    for start in range(0, kv_len, LANES):
        slot = start + tl.arange(0, LANES)
        taken = tl.load(read + slot, mask=slot < kv_len, other=0) != 0
        listed = (slot < first) | (slot >= begin)
        listed = listed & ((slot < own) | (slot >= own_end)) & ((slot < stop) | (slot >= end))
        taken = taken & listed
        order = tl.cumsum(taken.to(tl.int32), 0)
        tl.store(chosen + (count - 1) + order, slot, mask=taken)
        count += tl.max(order, 0)
    tl.store(counts + row, count)
