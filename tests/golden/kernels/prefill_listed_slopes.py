"""Prefill attention: prefill mine bf16 g4 d128.

score(s) = 0.0883883476483184*s + (kv - q)*slopes[h]
visible: kv <= q
"""

import triton
import triton.language as tl

POLICY = "mine"  # the policy that selects keys; None: all visible keys are read
CAPTURED = ("slopes",)  # tensors that score and mask read, in the order of a call


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
def visible(b, h, q, kv, kv_len, inside, slopes, slopes_stride_0):
    """True for slots kv [1, N] that are `inside` and whose keys the heads h [ROWS, 1] see."""
    return inside & (kv <= q)


@triton.jit
def score(s, b, h, q, kv, inside, slopes, slopes_stride_0):
    """Return the scores, in bits, for products s [ROWS, N] of queries and keys."""
    return 0.12751743082459868 * s + 1.4426950408889634 * tl.load(slopes + h * slopes_stride_0) * (kv - q)


@triton.jit
def seen_range(b, q, kv_len, slopes, slopes_stride_0):
    """Return the first slot that query q sees and the one after the last; it sees all between."""
    first = tl.full([], 0, tl.int32)
    end = tl.minimum(kv_len, q + 1)
    return first.to(tl.int32), tl.maximum(first, end).to(tl.int32)


SCALE = 0.08838834764831843  # factor of the product of query and key
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


@triton.jit(do_not_specialize=["first_tile", "tiles", "query_len", "kv_len"])
def see_tiles(
    held, mean_bias, sighted, edge, first_tile, tiles, seen_heads, query_len, kv_len, slopes, slopes_stride_0,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SELF: tl.constexpr,
):
    """Count the queries of a tile that see each of KEYS keys, and note which of them see any."""
    row, split = tl.program_id(0), tl.program_id(1)
    head, tile = row // tiles, first_tile + row % tiles
    b, h = (head // seen_heads), (head % seen_heads)
    if split == 0:
        first, begin, own, own_end, stop, end = edges(b, tile, query_len, kv_len, slopes, slopes_stride_0, SELF)
        tl.store(edge + row * 8, first)
        tl.store(edge + row * 8 + 1, begin)
        tl.store(edge + row * 8 + 2, own)
        tl.store(edge + row * 8 + 3, own_end)
        tl.store(edge + row * 8 + 4, stop)
        tl.store(edge + row * 8 + 5, end)
    slot = split * KEYS + tl.arange(0, KEYS)
    inside = (slot < kv_len)[None, :]
    line = row.to(tl.int64) * kv_len + slot
    count = tl.zeros([KEYS], tl.int32)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, TILE, QUERIES):
        t = tile * TILE + start + tl.arange(0, QUERIES)
        q = tl.minimum(t, query_len - 1)[:, None]
        seen = visible(b, h, q, slot[None, :], kv_len, inside, slopes, slopes_stride_0)
        seen = seen & (t < query_len)[:, None]
        count += tl.sum(seen.to(tl.int32), 0)
        sees = tl.max(seen.to(tl.int32), 1) > 0
        tl.store(sighted + head.to(tl.int64) * query_len + t, 1, mask=sees)
        none = tl.zeros([QUERIES, KEYS], tl.float32)
        bits = score(none, b, h, q, slot[None, :], inside, slopes, slopes_stride_0)
        total += tl.sum(tl.where(seen, bits, 0.0), 0)
    tl.store(held + line, count.to(tl.uint8), mask=slot < kv_len)
    mean = total / tl.maximum(count, 1) / 1.4426950408889634
    tl.store(mean_bias + line, mean, mask=slot < kv_len)


@triton.jit
def load_edges(edge, place):
    """Return what `summarise_queries` has stored of `edges` for one tile."""
    edge += place * 8
    own, own_end = tl.load(edge + 2), tl.load(edge + 3)
    return tl.load(edge), tl.load(edge + 1), own, own_end, tl.load(edge + 4), tl.load(edge + 5)


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


MOST = tl.constexpr(2.0**100)  # largest sum of a query's weights: far from overflow


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
    keys = tl.load(key + line * key_stride_l + d[None, :] * key_stride_d)
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
