"""Prefill attention: prefill dhsa f16 g3 d80 v64.

score(s) = 0.111803398874989*s + (kv - q)*slopes[h]
visible: kv <= q
"""

import triton
import triton.language as tl

POLICY = "dhsa"  # the policy that selects keys; None: all visible keys are read
CAPTURED = ("slopes",)  # tensors that score and mask read, in the order of a call


GROUP = tl.constexpr(3)  # query heads that share a KV head
HEAD_DIM = tl.constexpr(80)
DIM = tl.constexpr(128)
VALUE_DIM = tl.constexpr(64)
WIDTH = tl.constexpr(64)
AUTOTUNE = False  # if True, the first call measures tile sizes
TILE = tl.constexpr(128)  # query positions that read the same keys
SINKS = tl.constexpr(16)  # first tokens, always read
RECENT = tl.constexpr(64)  # last tokens and tokens near the tile's own, always read


@triton.jit
def visible(b, h, q, kv, kv_len, inside, slopes, slopes_stride_0):
    """True for slots kv [1, N] that are `inside` and whose keys the heads h [ROWS, 1] see."""
    return inside & (kv <= q)


@triton.jit
def score(s, b, h, q, kv, inside, slopes, slopes_stride_0):
    """Return the scores, in bits, for products s [ROWS, N] of queries and keys."""
    return 0.16129820911147805 * s + 1.4426950408889634 * tl.load(slopes + h * slopes_stride_0) * (kv - q)


@triton.jit
def seen_range(b, q, kv_len, slopes, slopes_stride_0):
    """Return the first slot that query q sees and the one after the last; it sees all between."""
    first = tl.full([], 0, tl.int32)
    end = tl.minimum(kv_len, q + 1)
    return first.to(tl.int32), tl.maximum(first, end).to(tl.int32)


SCALE = 0.11180339887498948  # factor of the product of query and key
SOFTCAP = None  # bound that scores are bent to; None: no bound
BIASED = True  # if True, something is added to scores
BY_HEAD = True  # if True, heads see different keys, or differ in what is added


@triton.jit
def edges(b, tile, query_len, kv_len, slopes, slopes_stride_0, SELF: tl.constexpr):
    """Return first, begin, own, own_end, stop and end of the slots that a tile always reads.

    These are the slots [first, begin), [own, own_end) and [stop, end). If the mask has no holes,
    all queries of the tile see all keys between them. Queries that see no key do not count. With
    SELF, queries and keys are the same tokens.
    """
    q = tile * TILE + tl.arange(0, TILE)
    last = tl.minimum(tile * TILE + TILE, query_len)
    start, stop = seen_range(b, tl.minimum(q, query_len - 1), kv_len, slopes, slopes_stride_0)
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


@triton.jit(do_not_specialize=["tiles", "query_len", "kv_len"])
def store_edges(edge, tiles, query_len, kv_len, slopes, slopes_stride_0, SELF: tl.constexpr):
    """Store what a tile always reads, the same for all heads."""
    row = tl.program_id(0)
    b = (row // tiles)
    first, begin, own, own_end, stop, end = edges(b, row % tiles, query_len, kv_len, slopes, slopes_stride_0, SELF)
    edge += row * 8
    tl.store(edge, first)
    tl.store(edge + 1, begin)
    tl.store(edge + 2, own)
    tl.store(edge + 3, own_end)
    tl.store(edge + 4, stop)
    tl.store(edge + 5, end)


@triton.jit
def load_edges(edge, place):
    """Return what `summarise_queries` has stored of `edges` for one tile."""
    edge += place * 8
    own, own_end = tl.load(edge + 2), tl.load(edge + 3)
    return tl.load(edge), tl.load(edge + 1), own, own_end, tl.load(edge + 4), tl.load(edge + 5)


@triton.jit
def room_for(seen, always, share, most, shortest, capacity):
    """Return how many keys may be chosen, if `seen` are seen beside the `always` read."""
    allowed = tl.minimum(tl.ceil((always + seen) * share).to(tl.int32), most)
    allowed = tl.where(always + seen < shortest, 2**30, allowed)
    return tl.minimum(tl.maximum(allowed - always, 0), capacity)


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


MOST = tl.constexpr(2.0**15)  # largest sum of a query's weights: far from overflow


@triton.jit
def attend_unmasked(
    slot, base, asking, total, result, b, h, q,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, slopes, slopes_stride_0,
):
    """Do one step of softmax over the keys in the slots [N], all of which all queries see.

    Weights are relative to `base` [ROWS], the largest scores of the keys read first, sinks and near
    keys. So no larger score has to be looked for, and no sum is scaled again.
    """
    d, width, line = tl.arange(0, DIM), tl.arange(0, WIDTH), slot.to(tl.int64)[:, None]
    keys = tl.load(key + line * key_stride_l + d[None, :] * key_stride_d, mask=(d < HEAD_DIM)[None, :], other=0.0)
    s = tl.dot(asking, tl.trans(keys))
    bits = score(s, b, h, q[:, None], slot[None, :], (slot >= 0)[None, :], slopes, slopes_stride_0)
    weight = tl.exp2(bits - base[:, None])
    total += tl.sum(weight, 1)
    values = tl.load(value + line * value_stride_l + width[None, :] * value_stride_d)
    return total, tl.dot(weight.to(values.dtype), values, result)


@triton.jit
def read_listed(
    from_place, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, slopes, slopes_stride_0,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
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
        inside = (place < items)[None, :]
        seen = visible(b, h, q[:, None], slot[None, :], kv_len, inside, slopes, slopes_stride_0)
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
        bits = score(s, b, h, q[:, None], slot[None, :], inside, slopes, slopes_stride_0)
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


@triton.jit(do_not_specialize=["capacity", "first_tile", "tiles", "query_len", "kv_len"])
def attend(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    extra, extra_stride_b, extra_stride_h, extra_stride_t,
    output, output_stride_b, output_stride_h, output_stride_t, output_stride_d, log_sums,
    edge, chosen, counts, capacity, first_tile, heads, tiles, query_len, kv_len, slopes, slopes_stride_0,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Attend from ROWS queries of a tile to the keys that the tile reads."""
    # The last tiles of a causal sequence take longest: they go first.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    row = number
    head, tile = row // tiles, row % tiles
    b, h = (head // heads), (head % heads)
    tile += first_tile
    t = tile * TILE + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    q, d, width = tl.minimum(t, query_len - 1), tl.arange(0, DIM), tl.arange(0, WIDTH)
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
    full = count // KEYS * KEYS
    top, total, result = read_listed(
        full, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
        key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, slopes, slopes_stride_0,
        ROWS, KEYS,
    )
    base = tl.where(top == float("-inf"), 0.0, top)
    for start in range(0, full, KEYS):
        slot = tl.load(chosen + start + tl.arange(0, KEYS))
        total, result = attend_unmasked(
            slot, base, asking, total, result, b, h, q,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, slopes, slopes_stride_0,
        )
    from_slot, to_slot = seen_range(b, q, kv_len, slopes, slopes_stride_0)
    sighted = to_slot - from_slot + tl.zeros([ROWS], tl.int32) > 0
    lost = sighted & ((top == float("-inf")) | ((total < MOST) == 0))
    if tl.max(lost.to(tl.int32), 0) > 0:
        top, total, result = read_listed(
            0, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, slopes, slopes_stride_0,
            ROWS, KEYS,
        )
    result, total = tl.where(sighted[:, None], result, 0.0), tl.where(sighted, total, 0.0)
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
