"""The kernel that lists the keys a tile of a whole sequence reads, from their bins."""

from __future__ import annotations

from lychee_compile.codegen.parts.terms import sees_range
from lychee_compile.codegen.specification import AttentionSpec


def emit_choose(spec: AttentionSpec) -> str:
    """`choose`: which keys each tile reads."""
    seen, guessed, unseen, count_unseen = "among", "among", "", ""
    if not sees_range(spec):
        seen, unseen = "among - blind", "\n    blind = 0  # of these no part sees"
        count_unseen = "\n        blind += tl.sum((entry == 1).to(tl.int32), 0)"
        guessed = "among - tl.sum(tl.where(level == 1, held, 0), 0) * skip"
    return f'''
@triton.jit
def bins_between(bins, bin_room, slot, begin, stop):
    """The bins of the slots [N] that are in [begin, stop); of others 0."""
    # Whole runs of 16 are loaded, also what was never written: masks by slot would take one by one.
    entry = tl.load(bins + slot, mask=slot < bin_room, other=0).to(tl.int32)
    inside = (slot - begin).to(tl.uint32) < (stop - begin).to(tl.uint32)
    return tl.where(inside, entry, 0)


@triton.jit
def room_for(seen, always, share, most, shortest, capacity):
    """How many keys may be chosen, where so many are seen beside those that are always read."""
    allowed = tl.minimum(tl.ceil((always + seen) * share).to(tl.int32), most)
    allowed = tl.where(always + seen < shortest, 2**30, allowed)
    return tl.minimum(tl.maximum(allowed - always, 0), capacity)


@triton.jit
def cut_of(held, level, room):
    """The highest level at or above which are more than `room`, or 0, and how many are above it."""
    through = tl.cumsum(held, 0, reverse=True)
    cut = tl.max(tl.where(through > room, level, 0), 0)
    return cut, tl.max(tl.where(level > cut, through, 0), 0)


@triton.jit
def counted(bins, bin_room, begin, stop, LANES: tl.constexpr):
    """How many of the slots [begin, stop) are in each bin: [BINS]."""
    held = tl.zeros([BINS], tl.int32)
    for start in range(begin // 16 * 16, stop, LANES):
        slot = start + tl.arange(0, LANES)
        held += tl.histogram(bins_between(bins, bin_room, slot, begin, stop), BINS)
    return tl.where(tl.arange(0, BINS) > 0, held, 0)


@triton.jit(do_not_specialize=["capacity", "most", "shortest"])
def choose(
    edge, bins, bin_room, chosen, counts, capacity, share, most, shortest,
    LANES: tl.constexpr,
):
    """The list of the keys that a tile reads, beside those it reads in any case.

    Of those it sees the given share, or at most so many where that is less; all of them where they
    are fewer than `shortest`. A histogram takes long: one of a sample of runs of 16 keys says which
    bins the budget may end in, and these alone are counted.
    """
    row = tl.program_id(0)
    first, begin, own, own_end, stop, end = stretches(edge, row)
    bins += row.to(tl.int64) * bin_room
    chosen += row.to(tl.int64) * capacity
    always = begin - first + own_end - own + end - stop
    among = stop - begin - (own_end - own)  # those that may be chosen{unseen}
    lane, level = tl.arange(0, LANES), tl.arange(0, BINS)
    skip = tl.maximum((stop - begin) // LANES, 1)
    slot = begin // 16 * 16 + lane // 16 * (16 * skip) + lane % 16
    held = tl.histogram(bins_between(bins, bin_room, slot, begin, stop), BINS)
    held = tl.where(level > 0, held, 0)
    room = room_for({guessed}, always, share, most, shortest, capacity)
    sampled = room.to(tl.float32) / tl.maximum(among, 1) * tl.sum(held, 0)
    cut, _ = cut_of(held, level, sampled)
    low = tl.minimum(tl.maximum(cut - 4, 0), BINS - 9)
    # A byte for each of the eight bins above: how many of 16 keys are in it; in the last or above.
    byte, near = tl.arange(0, 8), tl.zeros([8], tl.int32)
    for start in range(begin // 16 * 16, stop, LANES):
        entry = bins_between(bins, bin_room, start + lane, begin, stop)
        above = tl.minimum(entry - low, 8)
        shift = (8 * tl.maximum(above, 1) - 8).to(tl.int64)
        word = tl.where(above > 0, tl.full([LANES], 1, tl.int64) << shift, 0)
        word = tl.sum(tl.reshape(word, [LANES // 16, 16]), 1)
        even = tl.sum(word & 0x00FF00FF00FF00FF, 0)
        odd = tl.sum((word >> 8) & 0x00FF00FF00FF00FF, 0)
        all_eight = tl.where(byte % 2 == 0, even, odd) >> (byte // 2 * 16).to(tl.int64)
        near += (all_eight & 65535).to(tl.int32){count_unseen}
    room = room_for({seen}, always, share, most, shortest, capacity)
    cut, over = cut_of(near, low + 1 + byte, room)
    found = ((cut > 0) | (low == 0)) & ((cut < low + 8) | (low + 8 == BINS - 1))
    if found == 0:
        cut, over = cut_of(counted(bins, bin_room, begin, stop, LANES), level, room)
    left = tl.where(cut > 0, room - over, 0)
    count = 0
    for start in range(begin // 16 * 16, stop, LANES):
        slot = start + lane
        entry = bins_between(bins, bin_room, slot, begin, stop)
        # In one sum, those above the cut in the high half and those at it, which come until none
        # is left to take, in the low.
        kind = tl.where(entry > cut, 65536, (entry == cut).to(tl.int32))
        order = tl.cumsum(kind, 0)
        ties = tl.minimum(order & 65535, left)
        taken = (entry > cut) | ((entry == cut) & ((order & 65535) <= left))
        place = (order >> 16) + ties
        tl.store(chosen + (count - 1) + place, slot, mask=taken)
        last = tl.max(order, 0)
        tied = tl.minimum(last & 65535, left)
        count += (last >> 16) + tied
        left -= tied
    tl.store(counts + row, count)
'''
