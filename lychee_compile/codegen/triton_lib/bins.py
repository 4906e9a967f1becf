"""Shares of the softmax as bins of a histogram, and choices by these bins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import BINS, GROUP, HEADS, LAST_BIN, ROWS, due


@triton.jit
def written_slots(positions, stride_b, stride_t, written, b, kv_len, nothing):
    """Return the slots that this step has written, int32 [16], filled up with `nothing`."""
    number = tl.arange(0, 16)
    slot = tl.load(positions + b * stride_b + number * stride_t, mask=number < written, other=0)
    slot = tl.where(slot < 0, slot + kv_len, slot).to(tl.int32)
    return tl.where(number < written, slot, nothing)


@triton.jit
def fresh_from(positions, stride_b, stride_t, written, header, b, kv_len):
    """Return the first slot that this step has written: no index knows it or later ones yet."""
    fresh = tl.maximum(tl.load(header + 1 + b), 0)
    if written > 0:
        fresh = tl.min(written_slots(positions, stride_b, stride_t, written, b, kv_len, 2**30), 0)
    return fresh


@triton.jit
def denominators(totals, head_row, blocks, BLOCKS: tl.constexpr):
    """Return log2 of the softmax's denominators [ROWS] of a group, as its blocks estimate it."""
    block, g = tl.arange(0, BLOCKS), tl.arange(0, HEADS)
    parts = tl.load(
        totals + (head_row.to(tl.int64) * blocks + block)[:, None] * ROWS + g[None, :],
        mask=(block < blocks)[:, None], other=-1e30,
    )
    most = tl.max(parts, 0)
    total = most + tl.log2(tl.sum(tl.exp2(parts - most[None, :]), 0))
    return tl.gather(total, tl.minimum(tl.arange(0, ROWS), HEADS - 1), 0)


@triton.jit
def shares_of(value, total):
    """Return the sum over a group's heads of each item's share [N], by scores [ROWS, N] in bits."""
    real = (tl.arange(0, ROWS) < GROUP)[:, None]
    share = tl.sum(tl.where(real, tl.exp2(value - total[:, None]), 0.0), 0)
    # After a product, eight threads have the same items; `gather` gives each thread its own.
    return tl.gather(share, tl.arange(0, value.shape[1]), 0)


@triton.jit
def bins_of_shares(share, possible):
    """Return the bin of each item's share [N].

    There are eight bins to a factor of two: a float's exponent and the first bits of its mantissa.
    An item that is not `possible` [N] is in the first bin.
    """
    place = (share.to(tl.int32, bitcast=True) >> 20) - (LAST_BIN - BINS + 1)
    return tl.where(possible & (share > 0), tl.minimum(tl.maximum(place, 1), BINS - 1), 0)


@triton.jit
def bins_of(value, total, possible):
    """Return the bin of each item's share [N], by scores [ROWS, N] of a group's heads, in bits."""
    return bins_of_shares(shares_of(value, total), possible)


@triton.jit
def count_bins(histogram, entry):
    """Add the number of items in each bin but the first to a histogram, and return it.

    `entry` [N] are the bins of the items.
    """
    counts = tl.histogram(entry, BINS)
    place = tl.arange(0, BINS)
    counts = tl.where(place > 0, counts, 0)
    tl.atomic_add(histogram + place, counts, mask=counts > 0, sem="relaxed")
    return counts


@triton.jit
def threshold(histogram, room, read=0):
    """Return the bin that `room` items end in, the room left for it, and how many are in it.

    `read` items of each bin do not count.
    """
    place = tl.arange(0, BINS)
    counts = tl.load(histogram + place) - read
    through = tl.cumsum(counts, 0, reverse=True)
    # One search finds all three: the bin, the number of items above it, and of those in it.
    all_three = (place.to(tl.int64) << 27 | through - counts) << 27 | counts
    found = tl.max(tl.where(through > room, all_three, 0), 0)
    above = (found >> 27 & 0x7FFFFFF).to(tl.int32)
    return (found >> 54).to(tl.int32), -(above - room), (found & 0x7FFFFFF).to(tl.int32)


@triton.jit
def choose_by_bin(entry, cut, left, at_cut):
    """Return which items are chosen, the place of each in a list of them, and their number.

    Chosen are all items in bins above the cut, and the first of those at the cut: as many as are
    due to us.
    """
    kind = tl.where(entry > cut, 65536, tl.where((entry == cut) & (cut > 0), 1, 0))
    through = tl.cumsum(kind, 0)
    total = tl.max(through, 0)
    ours = due(left, total & 65535, at_cut)
    chosen = (kind > 1) | ((kind == 1) & ((through & 65535) <= ours))
    return chosen, (through >> 16) + tl.minimum(through & 65535, ours) - 1, (total >> 16) + ours


@triton.jit
def choose_of_sixteens(entry, cut, left, at_cut):
    """Do what `choose_by_bin` does for bins [N, 16], in the order of rows.

    A thread has whole rows and adds them up alone, before threads add up what each has.
    """
    kind = tl.where(entry > cut, 65536, tl.where((entry == cut) & (cut > 0), 1, 0))
    own = tl.sum(kind, 1)
    after = tl.cumsum(own, 0)
    total = tl.max(after, 0)
    through = (after - own)[:, None] + tl.cumsum(kind, 1)
    ours = due(left, total & 65535, at_cut)
    chosen = (kind > 1) | ((kind == 1) & ((through & 65535) <= ours))
    return chosen, (through >> 16) + tl.minimum(through & 65535, ours) - 1, (total >> 16) + ours


@triton.jit
def chosen_of_tiles(ranks, cut, left, at_cut, tiles, TILES: tl.constexpr):
    """Return how many pages of each tile are chosen: int32 [TILES].

    `ranks` has, for each tile, the number of its pages in each bin or above.
    """
    tile = tl.arange(0, TILES)
    ranks += tile * BINS + cut
    above = tl.load(ranks + 1, mask=tile < tl.where(cut < BINS - 1, tiles, 0), other=0)
    through = tl.load(ranks, mask=tile < tl.where(cut > 0, tiles, 0), other=0)
    return above + due(left, tl.maximum(through - above, 0), at_cut)
