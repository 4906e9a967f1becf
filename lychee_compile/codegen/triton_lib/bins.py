"""Shares of the softmax as bins of a histogram, and choices by these bins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import BINS, GROUP, HEADS, LAST_BIN, ROWS, due


@triton.jit
def fresh_from(positions, stride_b, stride_t, written, header, b, kv_len):
    """First slot that this step has written: it and what follows have no sketch yet."""
    fresh = tl.load(header + 1 + b)
    if written > 0:
        number = tl.arange(0, 16)
        slot = tl.load(
            positions + b * stride_b + number * stride_t, mask=number < written, other=2**30
        ).to(tl.int32)
        fresh = tl.min(tl.where(slot < 0, slot + kv_len, slot), 0)
    return fresh


@triton.jit
def denominators(totals, head_row, blocks, BLOCKS: tl.constexpr):
    """log2 of the softmax's denominator for the heads of a group, as blocks estimate it: [ROWS]."""
    block, g = tl.arange(0, BLOCKS), tl.arange(0, HEADS)
    parts = tl.load(
        totals + (head_row.to(tl.int64) * blocks + block)[:, None] * ROWS + g[None, :],
        mask=(block < blocks)[:, None], other=-1e30,
    )
    most = tl.max(parts, 0)
    total = most + tl.log2(tl.sum(tl.exp2(parts - most[None, :]), 0))
    return tl.gather(total, tl.minimum(tl.arange(0, ROWS), HEADS - 1), 0)


@triton.jit
def bins_of(value, total, possible):
    """The bin of each item's share [N], from the scores [ROWS, N] of a group's heads, in bits.

    Eight bins to a factor of two: a float's exponent and the first bits of its mantissa; the first
    bin where an item is not `possible` [N].
    """
    real = (tl.arange(0, ROWS) < GROUP)[:, None]
    share = tl.sum(tl.where(real, tl.exp2(value - total[:, None]), 0.0), 0)
    # Out of a product, eight threads have the same; gathered, every thread has items of its own.
    share = tl.gather(share, tl.arange(0, value.shape[1]), 0)
    place = (share.to(tl.int32, bitcast=True) >> 20) - (LAST_BIN - BINS + 1)
    return tl.where(possible & (share > 0), tl.minimum(tl.maximum(place, 1), BINS - 1), 0)


@triton.jit
def count_bins(histogram, entry):
    """Count the bins `entry` [N], but for the first, in a histogram, and return the counts."""
    counts = tl.histogram(entry, BINS)
    place = tl.arange(0, BINS)
    counts = tl.where(place > 0, counts, 0)
    tl.atomic_add(histogram + place, counts, mask=counts > 0, sem="relaxed")
    return counts


@triton.jit
def threshold(histogram, room, read=0):
    """The bin that `room` items end in, what is left for that bin, and how many are in it.

    `read` of those in each bin do not count.
    """
    place = tl.arange(0, BINS)
    counts = tl.load(histogram + place) - read
    through = tl.cumsum(counts, 0, reverse=True)
    # One search for all three: the bin, how many are in bins above it, and in itself.
    all_three = (place.to(tl.int64) << 24 | through - counts) << 24 | counts
    found = tl.max(tl.where(through > room, all_three, 0), 0)
    above = (found >> 24 & 0xFFFFFF).to(tl.int32)
    return (found >> 48).to(tl.int32), -(above - room), (found & 0xFFFFFF).to(tl.int32)


@triton.jit
def choose(entry, cut, left, at_cut):
    """Which items are chosen, where each goes in a list of them, and how many there are.

    Those in bins above the cut, and of those at the cut the first, as many as are due to us.
    """
    kind = tl.where(entry > cut, 65536, tl.where((entry == cut) & (cut > 0), 1, 0))
    through = tl.cumsum(kind, 0)
    total = tl.max(through, 0)
    ours = due(left, total & 65535, at_cut)
    chosen = (kind > 1) | ((kind == 1) & ((through & 65535) <= ours))
    return chosen, (through >> 16) + tl.minimum(through & 65535, ours) - 1, (total >> 16) + ours


@triton.jit
def chosen_of_tiles(ranks, cut, left, at_cut, tiles, TILES: tl.constexpr):
    """How many pages are chosen of each tile: [TILES].

    `ranks` has, for each tile, how many of its pages are in each bin or above.
    """
    tile = tl.arange(0, TILES)
    ranks += tile * BINS + cut
    above = tl.load(ranks + 1, mask=tile < tl.where(cut < BINS - 1, tiles, 0), other=0)
    through = tl.load(ranks, mask=tile < tl.where(cut > 0, tiles, 0), other=0)
    return above + due(left, tl.maximum(through - above, 0), at_cut)
