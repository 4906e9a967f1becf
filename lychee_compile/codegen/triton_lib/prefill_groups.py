"""The keys that tiles of a prefill read: the last ones, or groups that come first in a ranking.

A row is a tile of one query head, or of `SHARING` query heads that read the same keys. What tiles
always read, `edge` int32 [tiles of all heads, 8], is of single query heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.prefill import load_edges, room_for


@triton.jit(do_not_specialize=["capacity", "most", "shortest"])
def list_last(edge, chosen, counts, capacity, share, most, shortest, LANES: tl.constexpr):
    """List the last keys that a tile sees, of those that it does not always read.

    `chosen`, int32 [rows, capacity], gets the slots in their order, `counts`, int32 [rows], their
    number.
    """
    row = tl.program_id(0)
    first, begin, own, own_end, stop, end = load_edges(edge, row)
    always = begin - first + own_end - own + end - stop
    late, among = stop - own_end, stop - begin - (own_end - own)
    room = tl.minimum(room_for(among, always, share, most, shortest, capacity), among)
    after = tl.minimum(room, late)
    before = room - after
    chosen += row.to(tl.int64) * capacity
    for start in range(0, room, LANES):
        place = start + tl.arange(0, LANES)
        slot = tl.where(place < before, own + place - before, stop + place - room)
        tl.store(chosen + place, slot, mask=place < room)
    tl.store(counts + row, room)


@triton.jit
def candidates_before(slot, begin, own, own_end, stop):
    """Return how many keys of [begin, own) and [own_end, stop) are before each slot."""
    early = tl.minimum(tl.maximum(slot, begin), own) - begin
    return early + tl.minimum(tl.maximum(slot, own_end), stop) - own_end


@triton.jit
def candidates_of(bounds, group, beyond, begin, own, own_end, stop):
    """Return how many keys that may be chosen each group has; 0 for groups from `beyond` on."""
    inside = group < beyond
    low = tl.load(bounds + group, mask=inside, other=0)
    high = tl.load(bounds + group + 1, mask=inside, other=0)
    count = candidates_before(high, begin, own, own_end, stop)
    return count - candidates_before(low, begin, own, own_end, stop)


@triton.jit
def level_of(rank, LEVELS: tl.constexpr):
    """Return the level of each rank, float16 from -1 to 1; a higher rank has no lower level.

    A level is 1/32 of the power of two below a rank wide, on both sides of 0.
    """
    bits = rank.to(tl.int16, bitcast=True).to(tl.int32)
    distance = tl.minimum((bits & 32767) >> 5, LEVELS // 2 - 1)
    return tl.where(bits < 0, LEVELS // 2 - distance, LEVELS // 2 + distance)


@triton.jit
def groups_of(label, begin, stop):
    """Return the first group of the slots [begin, stop), and the first after the last."""
    some = stop > begin
    first = tl.load(label + begin, mask=some, other=0)
    return first, tl.load(label + stop - 1, mask=some, other=-1) + 1


@triton.jit(do_not_specialize=["groups", "tiles", "kv_len"])
def count_levels(
    rank, label, bounds, edge, at_levels, askers, groups, rankers, tiles, kv_len,
    SHARING: tl.constexpr, ASKERS: tl.constexpr, LEVELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Count the keys that may be chosen at each level of each ranking of a row.

    `rank`, float16 [rows, askers, groups], ranks groups of keys. `label`, int32 [B, kv_len], is the
    group of each key; `bounds`, int32 [B, groups + 1], the first key of each group. `at_levels`,
    int32 [rows, askers, LEVELS], is 0 before. A tile of a row of the batch has `rankers` rows.
    """
    row = tl.program_id(0)
    b = (row // tiles // rankers).to(tl.int64)
    edge_row = row // tiles * (SHARING * tiles) + row % tiles
    _, begin, own, own_end, stop, _ = load_edges(edge, edge_row)
    bounds += b * (groups + 1)
    lowest, beyond = groups_of(label + b * kv_len, begin, stop)
    asker = tl.arange(0, ASKERS)
    line, there = row.to(tl.int64) * askers + asker, asker < askers
    for start in range(lowest, beyond, LANES):
        group = start + tl.arange(0, LANES)
        count = candidates_of(bounds, group, beyond, begin, own, own_end, stop)
        some = there[:, None] & (count > 0)[None, :]
        ranked = tl.load(rank + line[:, None] * groups + group[None, :], mask=some, other=0.0)
        at = at_levels + line[:, None] * LEVELS + level_of(ranked, LEVELS)
        counts = count[None, :] + tl.zeros([ASKERS, LANES], tl.int32)
        tl.atomic_add(at, counts, mask=some, sem="relaxed")


@triton.jit(do_not_specialize=["groups", "tiles", "kv_len", "capacity", "most", "shortest"])
def list_groups(
    rank, silent, label, bounds, edge, at_levels, places, chosen, counts,
    askers, groups, rankers, longest, tiles, kv_len, capacity, share, most, shortest,
    SHARING: tl.constexpr, ASKERS: tl.constexpr, LEVELS: tl.constexpr, LANES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """List the keys of the groups that come first in any ranking, as many as there is room for.

    Parameters as in `count_levels`, whose counts are overwritten. `silent`, uint8 [rows, askers],
    marks rankings that do not count. `places` is int32 [rows, groups], scratch. A group has at most
    `longest` keys. Its place is how many keys have its level or a higher one, less as many as one
    group may have, in the ranking where these are fewest. Groups of equal place are read in their
    order. The list of a row is written for each of its heads, as in `list_last`.
    """
    row = tl.program_id(0)
    b = (row // tiles // rankers).to(tl.int64)
    row_of_head = row // tiles * (SHARING * tiles) + row % tiles
    first, begin, own, own_end, stop, end = load_edges(edge, row_of_head)
    always = begin - first + own_end - own + end - stop
    among = stop - begin - (own_end - own)
    room = room_for(among, always, share, most, shortest, capacity)
    bounds += b * (groups + 1)
    label += b * kv_len
    lowest, beyond = groups_of(label, begin, stop)
    level, asker = tl.arange(0, LEVELS), tl.arange(0, ASKERS)
    line, there = row.to(tl.int64) * askers + asker, asker < askers
    for one in range(askers):
        at = at_levels + (row.to(tl.int64) * askers + one) * LEVELS + level
        there_are = tl.load(at)
        through = tl.cumsum(there_are, 0, reverse=True)
        ahead = through - tl.minimum(there_are, longest)
        none = tl.load(silent + row.to(tl.int64) * askers + one) != 0
        tl.store(at, tl.where(none, among, ahead))
    tl.debug_barrier()
    places += row.to(tl.int64) * groups
    for start in range(lowest, beyond, LANES):
        group = start + tl.arange(0, LANES)
        some = there[:, None] & (group < beyond)[None, :]
        ranked = tl.load(rank + line[:, None] * groups + group[None, :], mask=some, other=0.0)
        at = at_levels + line[:, None] * LEVELS + level_of(ranked, LEVELS)
        ahead = tl.min(tl.load(at, mask=some, other=2**30), 0)
        tl.store(places + group, ahead, mask=group < beyond)
    tl.debug_barrier()
    # The highest cut with no more keys before it than there is room for.
    cut, above, over = tl.where(room >= among, among + 1, 0), among + 1, 0
    while above - cut > 1:
        middle, total = (cut + above) // 2, 0
        for start in range(lowest, beyond, KEYS):
            group = start + tl.arange(0, KEYS)
            count = candidates_of(bounds, group, beyond, begin, own, own_end, stop)
            place = tl.load(places + group, mask=group < beyond, other=2**30)
            total += tl.sum(tl.where(place < middle, count, 0), 0)
        fits = total <= room
        over, cut = tl.where(fits, total, over), tl.where(fits, middle, cut)
        above = tl.where(fits, above, middle)
    left, count = room - over, 0
    for start in range(begin // 16 * 16, stop, KEYS):
        slot = start + tl.arange(0, KEYS)
        may = ((slot >= begin) & (slot < own)) | ((slot >= own_end) & (slot < stop))
        place = tl.load(places + tl.load(label + slot, mask=may, other=0), mask=may, other=2**30)
        # One sum counts both, as in `select_keys`: keys before the cut, and keys at it.
        kind = tl.where(place < cut, 65536, (place == cut).to(tl.int32))
        order = tl.cumsum(tl.where(may, kind, 0), 0)
        ties = tl.minimum(order & 65535, left)
        taken = may & ((place < cut) | ((place == cut) & ((order & 65535) <= left)))
        for head in range(SHARING):
            at = chosen + (row_of_head + head * tiles).to(tl.int64) * capacity
            tl.store(at + (count - 1) + (order >> 16) + ties, slot, mask=taken)
        last = tl.max(order, 0)
        tied = tl.minimum(last & 65535, left)
        count += (last >> 16) + tied
        left -= tied
    for head in range(SHARING):
        tl.store(counts + row_of_head + head * tiles, count)
