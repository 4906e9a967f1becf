"""Prefill attention: prefill lychee f16 g3 d80 v64.

score(s) = 30*tanh(s/240)
visible: (length + q - 4096 < kv) & mask[b, 0, q, kv]
"""

import triton
import triton.language as tl

POLICY = "lychee"  # the policy that selects keys; None: all visible keys are read
CAPTURED = ("mask", "length")  # tensors that score and mask read, in the order of a call


GROUP = tl.constexpr(3)  # query heads that share a KV head
HEAD_DIM = tl.constexpr(80)
DIM = tl.constexpr(128)
VALUE_DIM = tl.constexpr(64)
WIDTH = tl.constexpr(64)
AUTOTUNE = False  # if True, the first call measures tile sizes
TILE = tl.constexpr(128)  # query positions that read the same keys
PARTS = tl.constexpr(8)  # parts of a tile, each of which votes with its mean query
PART = tl.constexpr(16)
SAMPLE = tl.constexpr(16)  # one key in so many stands for all in a denominator
SINKS = tl.constexpr(16)  # first tokens, always read
RECENT = tl.constexpr(64)  # last tokens and tokens near the tile's own, always read
BINS = tl.constexpr(256)  # bins of a histogram of shares; 0: not to be chosen, 1: no part sees it
LAST_BIN = tl.constexpr(184)  # a share of 1, in eighths of an octave
LUCKIEST = tl.constexpr(63)  # bins that luck raises a key by, at most
LOG2E = tl.constexpr(1.4426950408889634)  # converts extra logits to bits


@triton.jit
def visible(b, h, q, kv, kv_len, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length):
    """True for slots kv [1, N] that are `inside` and whose keys the heads h [ROWS, 1] see."""
    return inside & ((tl.load(mask + b * mask_stride_0 + q * mask_stride_2 + kv * mask_stride_3, mask=inside, other=0) != 0) & (tl.load(length) + q - 4096 < kv))


@triton.jit
def score(s, b, h, q, kv, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length):
    """Return the scores, in bits, for products s [ROWS, N] of queries and keys."""
    return 43.2808512266689 * (1 - 2 / (tl.exp(s / 120) + 1))


@triton.jit
def seen_range(b, q, kv_len, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length):
    """Return the first slot that query q may see and the one after the last."""
    first = tl.maximum(tl.load(length) + q - 4095, 0)
    end = kv_len
    return first.to(tl.int32), tl.maximum(first, end).to(tl.int32)


@triton.jit
def edges(b, tile, query_len, kv_len, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length, SELF: tl.constexpr):
    """Return first, begin, own, own_end, stop and end of the slots that a tile always reads.

    These are the slots [first, begin), [own, own_end) and [stop, end). If the mask has no holes,
    all queries of the tile see all keys between them. Queries that see no key do not count. With
    SELF, queries and keys are the same tokens.
    """
    q = tile * TILE + tl.arange(0, TILE)
    last = tl.minimum(tile * TILE + TILE, query_len)
    start, stop = seen_range(b, tl.minimum(q, query_len - 1), kv_len, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
    start, stop = start + tl.zeros([TILE], tl.int32), stop + tl.zeros([TILE], tl.int32)
    sighted = stop > start
    first = tl.min(tl.where(sighted, start, kv_len), 0)
    end = tl.max(tl.where(sighted, stop, 0), 0)
    all_from = tl.max(tl.where(sighted, start, first), 0)
    all_to = tl.min(tl.where(sighted, stop, end), 0)
    begin = tl.minimum(all_from + SINKS, end)
    recent = tl.maximum(tl.minimum(all_to - RECENT, end), begin)
    own, own_end = begin, begin
    if SELF:
        own = tl.minimum(tl.maximum(tile * TILE - RECENT, begin), recent)
        own_end = tl.minimum(tl.maximum(last + RECENT, own), recent)
    return first, begin, own, own_end, recent, end


@triton.jit
def load_edges(edge, place):
    """Return what `summarise_queries` has stored of `edges` for one tile."""
    edge += place * 8
    own, own_end = tl.load(edge + 2), tl.load(edge + 3)
    return tl.load(edge), tl.load(edge + 1), own, own_end, tl.load(edge + 4), tl.load(edge + 5)


@triton.jit
def seen_by(b, h, begin, query_len, slot, kv_len, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length):
    """Return the slots `inside` that a part sees, and the slots that are new to it.

    A part starts at query `begin`. It sees a slot if its first, middle or last query does. A slot
    is new if its last query sees it, but not the query before the part. One of slots and parts is
    a row, the other a column.
    """
    before = visible(b, h, tl.minimum(tl.maximum(begin - 1, 0), query_len - 1).to(tl.int64), slot, kv_len, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
    first = visible(b, h, tl.minimum(begin, query_len - 1).to(tl.int64), slot, kv_len, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
    middle = visible(b, h, tl.minimum(begin + PART // 2, query_len - 1).to(tl.int64), slot, kv_len, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
    last = visible(b, h, tl.minimum(begin + PART - 1, query_len - 1).to(tl.int64), slot, kv_len, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
    seen = first | middle | last
    return seen & (begin >= 0), last & (before == 0) & (begin >= 0)


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


@triton.jit(do_not_specialize=["first_row", "tiles", "query_len", "kv_len"])
def summarise_queries(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    centres, totals, edge, first_row, heads, tiles, query_len, kv_len, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length,
    KEYS: tl.constexpr, TILES: tl.constexpr, SELF: tl.constexpr,
):
    """Store the mean query of each part of TILES tiles of one head, and log2 of its denominator.

    A tile after the last query of its head sees nothing.
    """
    place = tl.program_id(0) * TILES
    row = first_row + place
    head, tile = row // tiles, row % tiles
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    part, d = tl.arange(0, TILES * PARTS), tl.arange(0, DIM)
    begin = tile * TILE + part * PART
    query += b.to(tl.int64) * query_stride_b + h.to(tl.int64) * query_stride_h
    total = tl.zeros([TILES * PARTS, DIM], tl.float32)
    for each in range(0, PART):
        t = begin + each
        total += tl.load(
            query + t.to(tl.int64)[:, None] * query_stride_t + d[None, :] * query_stride_d,
            mask=(t < query_len)[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        ).to(tl.float32)
    held = tl.minimum(tl.maximum(query_len - begin, 0), PART)
    centre = (total / tl.maximum(held, 1)[:, None]).to(key.dtype.element_ty)
    source = place.to(tl.int64) * PARTS + part
    tl.store(
        centres + source[:, None] * HEAD_DIM + d[None, :], centre, mask=(d < HEAD_DIM)[None, :]
    )
    edge += place * 8
    for number in range(0, TILES):
        one = tile + number
        first, sinks_end, own, own_end, stop, end = edges(b, one, query_len, kv_len, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length, SELF)
        used = (one * TILE < query_len).to(tl.int32)
        mine = edge + number * 8
        tl.store(mine, first * used)
        tl.store(mine + 1, sinks_end * used)
        tl.store(mine + 2, own * used)
        tl.store(mine + 3, own_end * used)
        tl.store(mine + 4, stop * used)
        tl.store(mine + 5, end * used)
    tl.debug_barrier()
    of_part = edge + part // PARTS * 8
    firsts, ends = tl.load(of_part + 1), tl.load(of_part + 4)
    owns, own_ends = tl.load(of_part + 2), tl.load(of_part + 3)
    least = tl.min(tl.where(ends > firsts, firsts, kv_len), 0)
    most = tl.max(tl.where(ends > firsts, ends, 0), 0)
    q = tl.minimum(begin + PART // 2, query_len - 1).to(tl.int64)
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    top = tl.full([TILES * PARTS], float("-inf"), tl.float32)
    whole = tl.zeros([TILES * PARTS], tl.float32)
    for start in range(least // (SAMPLE * KEYS) * (SAMPLE * KEYS), most, SAMPLE * KEYS):
        slot = start + tl.arange(0, KEYS) * SAMPLE
        inside = (slot >= least) & (slot < most)
        keys = tl.load(
            key + slot.to(tl.int64)[None, :] * key_stride_l + d[:, None] * key_stride_d,
            mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
        )
        s = tl.dot(centre, keys)
        among = (slot[None, :] >= firsts[:, None]) & (slot[None, :] < ends[:, None])
        among = among & ((slot[None, :] < owns[:, None]) | (slot[None, :] >= own_ends[:, None]))
        bits = score(s, b, h, q[:, None], slot[None, :].to(tl.int64), among, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
        seen, _ = seen_by(
            b, h, begin[:, None], query_len, slot[None, :].to(tl.int64), kv_len, among, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length
        )
        bits = tl.where(seen, bits, float("-inf"))
        above = tl.maximum(top, tl.max(bits, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        whole = whole * tl.exp2(top - base) + tl.sum(tl.exp2(bits - base[:, None]), 1)
        top = above
    total = tl.where(whole > 0, tl.log2(whole * SAMPLE) + top, 0.0)
    tl.store(totals + source, tl.where(held > 0, total, float("inf")))


@triton.jit(do_not_specialize=["first_row", "tiles", "query_len", "kv_len", "splits"])
def scan(
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    centres, totals, edge, bins, bin_room, luck,
    first_row, heads, tiles, query_len, kv_len, splits, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length,
    KEYS: tl.constexpr, TILES: tl.constexpr,
):
    """Store bins [TILES, kv_len] of the largest share that any part of a tile gives a key.

    A program reads every splits-th run of KEYS keys, once for TILES tiles of one head. Columns of
    its products are ordered so that one thread has all parts of a tile.
    """
    place, split = tl.program_id(0) * TILES, tl.program_id(1)
    row = first_row + place
    head, tile = row // tiles, row % tiles
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    number, column, d = tl.arange(0, TILES), tl.arange(0, TILES * PARTS), tl.arange(0, DIM)
    rows = place.to(tl.int64) + number
    begins, stops = tl.load(edge + rows * 8 + 1), tl.load(edge + rows * 8 + 4)
    owns, own_ends = tl.load(edge + rows * 8 + 2), tl.load(edge + rows * 8 + 3)
    least = tl.min(tl.where(stops > begins, begins, kv_len), 0)
    most = tl.max(tl.where(stops > begins, stops, 0), 0)
    part = column % TILES * PARTS + column // TILES
    source = place.to(tl.int64) * PARTS + part
    asking = tl.load(
        centres + source[None, :] * HEAD_DIM + d[:, None],
        mask=(d < HEAD_DIM)[:, None], other=0.0,
    )
    total = tl.load(totals + source)
    begin = tile * TILE + part * PART
    q = tl.minimum(begin + PART // 2, query_len - 1).to(tl.int64)
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    bins += rows[None, :] * bin_room
    for start in range(least // KEYS * KEYS + split * KEYS, most, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = slot < most
        keys = tl.load(
            key + slot.to(tl.int64)[:, None] * key_stride_l + d[None, :] * key_stride_d,
            mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        )
        s = tl.dot(keys, asking)
        bits = score(s, b, h, q[None, :], slot[:, None].to(tl.int64), inside[:, None], mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
        seen, new = seen_by(
            b, h, begin[None, :], query_len, slot[:, None].to(tl.int64), kv_len, inside[:, None], mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length
        )
        bits = tl.where(seen, bits - total[None, :], float("-inf"))
        share = tl.max(tl.reshape(bits, [KEYS, PARTS, TILES]), 1)
        near = (slot[:, None] >= owns[None, :]) & (slot[:, None] < own_ends[None, :])
        among = (slot[:, None] >= begins[None, :]) & (slot[:, None] < stops[None, :])
        lucky = tl.load(luck + slot, mask=inside, other=0).to(tl.float32)
        level = tl.minimum(tl.maximum(share * 8 + LAST_BIN, 2.0), LAST_BIN + 7.0)
        level += lucky[:, None]
        level = tl.where(share > float("-inf"), level, 1.0)
        new = tl.max(tl.reshape(new.to(tl.int32), [KEYS, PARTS, TILES]), 1)
        level = tl.where(new > 0, BINS - 1.0, level)
        level = tl.where(near, 0.0, level)
        tl.store(bins + slot[:, None], level.to(tl.uint8), mask=among)


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


@triton.jit(do_not_specialize=["capacity", "most", "shortest"])
def select_keys(
    edge, bins, bin_room, luck, coverage, chosen, counts, capacity, share, most, shortest,
    LANES: tl.constexpr, COVERS: tl.constexpr, SLOT_BITS: tl.constexpr,
):
    """List the keys that a tile reads beside those that it always reads.

    A tile reads a `share` of the keys that it sees, but at most `most`. It reads all if it sees
    fewer than `shortest`. A histogram of all keys takes long. One of a sample, in runs of 16 keys,
    says which bins the budget may end in, and these alone are counted.
    """
    row = tl.program_id(0)
    first, begin, own, own_end, stop, end = load_edges(edge, row)
    bins += row.to(tl.int64) * bin_room
    chosen += row.to(tl.int64) * capacity
    always = begin - first + own_end - own + end - stop
    among = stop - begin - (own_end - own)  # those that may be chosen
    blind = 0  # keys among these that no part sees
    lane, level = tl.arange(0, LANES), tl.arange(0, BINS)
    skip = tl.maximum((stop - begin) // LANES, 1)
    slot = begin // 16 * 16 + lane // 16 * (16 * skip) + lane % 16
    sampled = bins_between(bins, bin_room, slot, begin, stop)
    held = tl.histogram(sampled, BINS)
    held = tl.where(level > 0, held, 0)
    room = room_for(among - tl.sum(tl.where(level == 1, held, 0), 0) * skip, always, share, most, shortest, capacity)
    part = room.to(tl.float32) / tl.maximum(among, 1) * tl.sum(held, 0)
    cut, _ = cut_of(held, level, part)
    low = tl.minimum(tl.maximum(cut - 4, 0), BINS - 9)
    # A byte for each of eight bins from low + 1 on counts 16 keys; the last has all above, too.
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
        near += (all_eight & 65535).to(tl.int32)
        blind += tl.sum((entry == 1).to(tl.int32), 0)
    room = room_for(among - blind, always, share, most, shortest, capacity)
    cut, over = cut_of(near, low + 1 + byte, room)
    found = ((cut > 0) | (low == 0)) & ((cut < low + 8) | (low + 8 == BINS - 1))
    if found == 0:
        cut, over = cut_of(counted(bins, bin_room, begin, stop, LANES), level, room)
    left = tl.where(cut > 0, room - over, 0)
    if COVERS:
        # The highest bin above which shares add up to the coverage, by the sample.
        lucky = tl.load(luck + slot, mask=slot < bin_room, other=0).to(tl.int32)
        unraised = tl.where((sampled > 1) & (sampled < BINS - 1), sampled - lucky, sampled)
        held = tl.histogram(unraised, BINS)
        mass = tl.where(level > 1, held.to(tl.float32) * tl.exp2((level - LAST_BIN + 0.5) * 0.125), 0.0)
        above = tl.cumsum(mass, 0, reverse=True) - mass
        enough = tl.max(tl.where((above >= coverage * tl.sum(mass, 0)) & (level > 1), level, 0), 0)
        left = tl.where((room < among) & (enough > cut), 0, left)
        cut = tl.where(room < among, tl.maximum(cut, enough), cut)
    count = 0
    for start in range(begin // 16 * 16, stop, LANES):
        slot = start + lane
        entry = bins_between(bins, bin_room, slot, begin, stop)
        # One sum counts both: keys above the cut in its high half, keys at the cut in its low
        # half. Keys at the cut are taken until none is left.
        kind = tl.where(entry > cut, 65536, (entry == cut).to(tl.int32))
        order = tl.cumsum(kind, 0)
        ties = tl.minimum(order & 65535, left)
        taken = (entry > cut) | ((entry == cut) & ((order & 65535) <= left))
        place = (order >> 16) + ties
        item = slot
        if SLOT_BITS < 31:
            lucky = tl.load(luck + slot, mask=slot < bin_room, other=0).to(tl.int32)
            depth = cut - entry + lucky
            drawn = (depth >= 0) & (entry > 1) & (entry < BINS - 1)
            item += tl.where(drawn, 2 * depth + 1, 0) << SLOT_BITS
        tl.store(chosen + (count - 1) + place, item, mask=taken)
        last = tl.max(order, 0)
        tied = tl.minimum(last & 65535, left)
        count += (last >> 16) + tied
        left -= tied
    tl.store(counts + row, count)


@triton.jit
def read_listed(
    from_place, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SLOT_BITS: tl.constexpr,
):
    """Do online softmax over the list of chosen keys, from a place on, and what is always read.

    Always read are the three stretches [first, begin), [own, own_end) and [stop, end).
    """
    d, width = tl.arange(0, DIM), tl.arange(0, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    sinks = count + begin - first
    near = sinks + own_end - own
    items = near + end - stop
    for start in range(from_place, items, KEYS):
        place = start + tl.arange(0, KEYS)
        slot = tl.where(place < near, own + place - sinks, stop + place - near)
        slot = tl.where(place < sinks, first + place - count, slot)
        slot = tl.where(
            place < count, tl.load(chosen + place, mask=place < count, other=0), slot
        )
        slot, lift = lift_of(slot, SLOT_BITS)
        inside = (place < items)[None, :]
        seen = visible(b, h, q[:, None], slot[None, :].to(tl.int64), kv_len, inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
        seen = seen & (q >= 0)[:, None]  # a row for each query, even if all see the same
        held = (tl.max(seen.to(tl.int32), 0) > 0)[:, None]  # unseen slots may hold anything
        line = slot.to(tl.int64)[:, None]
        keys = tl.load(
            key + line * key_stride_l + d[None, :] * key_stride_d,
            mask=held & (d < HEAD_DIM)[None, :], other=0.0,
        )
        values = tl.load(
            value + line * value_stride_l + width[None, :] * value_stride_d,
            mask=held & (width < VALUE_DIM)[None, :], other=0.0,
        )
        s = tl.dot(asking, tl.trans(keys))
        bits = score(s, b, h, q[:, None], slot[None, :].to(tl.int64), inside, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length)
        bits += lift[None, :]
        top, total, result = softmax_step(bits, seen, values, top, total, result)
    return top, total, result


@triton.jit
def softmax_step(bits, seen, values, top, total, result):
    """Do one step of online softmax over `values`, by their scores `bits` [ROWS, N] if `seen`."""
    bits = tl.where(seen, bits, float("-inf"))
    most = tl.maximum(top, tl.max(bits, 1))
    base = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.exp2(bits - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weight, 1)
    result = result * fade[:, None] + tl.dot(weight.to(values.dtype), values)
    return most, total, result


@triton.jit(do_not_specialize=["capacity", "first_row", "tiles", "query_len", "kv_len"])
def attend(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    extra, extra_stride_b, extra_stride_h, extra_stride_t,
    output, output_stride_b, output_stride_h, output_stride_t, output_stride_d, log_sums,
    edge, chosen, counts, capacity, first_row, heads, tiles, query_len, kv_len, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SLOT_BITS: tl.constexpr,
):
    """Attend from ROWS queries of a tile to the keys that the tile reads."""
    # The last tiles of a causal sequence take longest: they go first.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    row = first_row + number
    head, tile = row // tiles, row % tiles
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    t = tile * TILE + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    q, d, width = tl.minimum(t, query_len - 1).to(tl.int64), tl.arange(0, DIM), tl.arange(0, WIDTH)
    query += b.to(tl.int64) * query_stride_b + h.to(tl.int64) * query_stride_h
    asking = tl.load(
        query + q.to(tl.int64)[:, None] * query_stride_t + d[None, :] * query_stride_d,
        mask=(d < HEAD_DIM)[None, :], other=0.0,
    )
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    value += b.to(tl.int64) * value_stride_b + (h // GROUP).to(tl.int64) * value_stride_h
    first, begin, own, own_end, stop, end = load_edges(edge, number)
    chosen += number.to(tl.int64) * capacity
    count = tl.load(counts + number)
    top, total, result = read_listed(
        0, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
        key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, mask, mask_stride_0, mask_stride_1, mask_stride_2, mask_stride_3, length,
        ROWS, KEYS, SLOT_BITS,
    )
    logit = tl.load(extra + b * extra_stride_b + h * extra_stride_h + q * extra_stride_t)
    logit = logit.to(tl.float32) * LOG2E
    most = tl.maximum(top, logit)
    fade = tl.where(top == float("-inf"), 0.0, tl.exp2(top - most))
    result, total = result * fade[:, None], total * fade + tl.exp2(logit - most)
    top = most
    # A query that sees nothing gets zeros, as from PyTorch's own attention.
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    output += b.to(tl.int64) * output_stride_b + h.to(tl.int64) * output_stride_h
    tl.store(
        output + t.to(tl.int64)[:, None] * output_stride_t + width[None, :] * output_stride_d,
        result.to(output.dtype.element_ty),
        mask=(t < query_len)[:, None] & (width < VALUE_DIM)[None, :],
    )
    log_sum = (top + tl.log2(tl.where(total > 0, total, 1.0))) / 1.4426950408889634
    tl.store(log_sums + head.to(tl.int64) * query_len + t, log_sum, mask=t < query_len)
