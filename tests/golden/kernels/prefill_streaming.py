"""Prefill attention: prefill streaming bf16 g4 d128.

score(s) = 0.0883883476483184*s
visible: kv <= q
"""

import triton
import triton.language as tl

POLICY = "streaming"  # the policy that selects keys; None: all visible keys are read
CAPTURED = ()  # tensors that score and mask read, in the order of a call


GROUP = tl.constexpr(4)  # query heads that share a KV head
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)
VALUE_DIM = tl.constexpr(128)
WIDTH = tl.constexpr(128)
AUTOTUNE = False  # if True, the first call measures tile sizes
TILE = tl.constexpr(128)  # query positions that read the same keys
SINKS = tl.constexpr(16)  # first tokens, always read
RECENT = tl.constexpr(64)  # last tokens and tokens near the tile's own, always read


@triton.jit
def visible(b, h, q, kv, kv_len, inside):
    """True for slots kv [1, N] that are `inside` and whose keys the heads h [ROWS, 1] see."""
    return inside & (kv <= q)


@triton.jit
def score(s, b, h, q, kv, inside):
    """Return the scores, in bits, for products s [ROWS, N] of queries and keys."""
    return 0.12751743082459868 * s


@triton.jit
def seen_range(b, q, kv_len):
    """Return the first slot that query q sees and the one after the last; it sees all between."""
    first = tl.full([], 0, tl.int32)
    end = tl.minimum(kv_len, q + 1)
    return first.to(tl.int32), tl.maximum(first, end).to(tl.int32)


@triton.jit
def edges(b, tile, query_len, kv_len, SELF: tl.constexpr):
    """Return first, begin, own, own_end, stop and end of the slots that a tile always reads.

    These are the slots [first, begin), [own, own_end) and [stop, end). If the mask has no holes,
    all queries of the tile see all keys between them. Queries that see no key do not count. With
    SELF, queries and keys are the same tokens.
    """
    q = tile * TILE + tl.arange(0, TILE)
    last = tl.minimum(tile * TILE + TILE, query_len)
    start, stop = seen_range(b, tl.minimum(q, query_len - 1), kv_len)
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
def store_edges(edge, tiles, query_len, kv_len, SELF: tl.constexpr):
    """Store what a tile always reads, the same for all heads."""
    row = tl.program_id(0)
    b = (row // tiles)
    first, begin, own, own_end, stop, end = edges(b, row % tiles, query_len, kv_len, SELF)
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


MOST = tl.constexpr(2.0**100)  # largest sum of a query's weights: far from overflow


@triton.jit
def attend_unmasked(
    slot, base, asking, total, result, b, h, q,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d,
):
    """Do one step of softmax over the keys in the slots [N], all of which all queries see.

    Weights are relative to `base` [ROWS], the largest scores of the keys read first, sinks and near
    keys. So no larger score has to be looked for, and no sum is scaled again.
    """
    d, width, line = tl.arange(0, DIM), tl.arange(0, WIDTH), slot.to(tl.int64)[:, None]
    keys = tl.load(key + line * key_stride_l + d[None, :] * key_stride_d)
    s = tl.dot(asking, tl.trans(keys))
    bits = score(s, b, h, q[:, None], slot[None, :], (slot >= 0)[None, :])
    weight = tl.exp2(bits - base[:, None])
    total += tl.sum(weight, 1)
    values = tl.load(value + line * value_stride_l + width[None, :] * value_stride_d)
    return total, tl.dot(weight.to(values.dtype), values, result)


@triton.jit
def read_listed(
    from_place, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d,
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
        seen = visible(b, h, q[:, None], slot[None, :], kv_len, inside)
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
        bits = score(s, b, h, q[:, None], slot[None, :], inside)
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
    edge, chosen, counts, capacity, first_tile, heads, tiles, query_len, kv_len,
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
        key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d,
        ROWS, KEYS,
    )
    base = tl.where(top == float("-inf"), 0.0, top)
    for start in range(0, full, KEYS):
        slot = tl.load(chosen + start + tl.arange(0, KEYS))
        total, result = attend_unmasked(
            slot, base, asking, total, result, b, h, q,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d,
        )
    from_slot, to_slot = seen_range(b, q, kv_len)
    sighted = to_slot - from_slot + tl.zeros([ROWS], tl.int32) > 0
    lost = sighted & ((top == float("-inf")) | ((total < MOST) == 0))
    if tl.max(lost.to(tl.int32), 0) > 0:
        top, total, result = read_listed(
            0, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d,
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
