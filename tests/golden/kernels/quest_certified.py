"""Decode attention: decode quest bf16 g4 d128 b1024 e0 1.

score(s) = 0.0883883476483184*s
visible: length + q >= kv
"""

import triton
import triton.language as tl

POLICY = "quest"  # the policy that selects keys; None: all visible keys are read
CAPTURED = ("length",)  # tensors that score and mask read, in the order of a call


GROUP = tl.constexpr(4)  # query heads that share a KV head
ROWS = tl.constexpr(16)
HEAD_DIM = tl.constexpr(128)
DIM = tl.constexpr(128)
VALUE_DIM = tl.constexpr(128)
WIDTH = tl.constexpr(128)
AUTOTUNE = False  # if True, the first call measures tile sizes


@triton.jit
def visible(b, h, q, kv, kv_len, inside, length):
    """True for slots kv [1, N] that are `inside` and whose keys the heads h [ROWS, 1] see."""
    return inside & (tl.load(length) + q >= kv)


@triton.jit
def score(s, b, h, q, kv, inside, length):
    """Return the scores, in bits, for products s [ROWS, N] of queries and keys."""
    return 0.12751743082459868 * s


@triton.jit
def seen_range(b, q, kv_len, length):
    """Return the first slot that query q sees and the one after the last; it sees all between."""
    first = tl.full([], 0, tl.int32)
    end = tl.minimum(kv_len, tl.load(length) + q + 1)
    return first.to(tl.int32), tl.maximum(first, end).to(tl.int32)


@triton.jit
def load_queries(query, b, kv_head, t, stride_b, stride_h, stride_t, stride_d):
    """Return the queries [ROWS, DIM] of a group at position t, and their heads, padded."""
    h = kv_head * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1)
    d = tl.arange(0, DIM)
    place = query + b.to(tl.int64) * stride_b + t * stride_t
    place = place + h[:, None] * stride_h + d[None, :] * stride_d
    return tl.load(place, mask=d[None, :] < HEAD_DIM, other=0.0), h


@triton.jit
def attend_to(
    slot, inside, queries, heads, top, total, result, b, t, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length,
):
    """Do one step of online softmax over the keys in the slots [N] that are `inside`."""
    seen = visible(b, heads[:, None], t, slot[None, :], kv_len, inside[None, :], length)
    d, width = tl.arange(0, DIM), tl.arange(0, WIDTH)
    place = slot.to(tl.int64)[:, None]
    keys = tl.load(
        key + place * key_stride_l + d[None, :] * key_stride_d,
        mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
    )
    values = tl.load(
        value + place * value_stride_l + width[None, :] * value_stride_d,
        mask=inside[:, None] & (width < VALUE_DIM)[None, :], other=0.0,
    )
    s = tl.dot(queries, tl.trans(keys))
    bits = score(s, b, heads[:, None], t, slot[None, :], inside[None, :], length)
    bits = tl.where(seen, bits, float("-inf"))
    most = tl.maximum(top, tl.max(bits, 1))
    base = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.exp2(bits - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weight, 1)
    result = result * fade[:, None] + tl.dot(weight.to(values.dtype), values)
    return most, total, result


@triton.jit
def store_part(top, total, result, head_row, split, splits, partial, partial_top, partial_sum):
    """Store one program's part of a group's attention for `combine`."""
    g, width = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    row = (head_row.to(tl.int64) * splits + split) * GROUP + g
    tl.store(partial_top + row, top, mask=g < GROUP)
    tl.store(partial_sum + row, total, mask=g < GROUP)
    tl.store(
        partial + row[:, None] * VALUE_DIM + width[None, :], result,
        mask=(g < GROUP)[:, None] & (width < VALUE_DIM)[None, :],
    )


@triton.jit
def combine(
    partial, partial_top, partial_sum, extra, extra_stride_b, extra_stride_h, extra_stride_t,
    output, output_stride_b, output_stride_h, output_stride_t, output_stride_d,
    kv_heads, query_len, splits, SPLITS: tl.constexpr, EARLY: tl.constexpr,
):
    """Sum up the parts of one query head at one position."""
    head_row, g = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    part, width = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    source = (head_row.to(tl.int64) * splits + part) * GROUP + g
    inside = part < splits
    h = kv_head * GROUP + g
    if EARLY:
        tl.extra.cuda.gdc_wait()
    tops = tl.load(partial_top + source, mask=inside, other=float("-inf"))
    totals = tl.load(partial_sum + source, mask=inside, other=0.0)
    parts = tl.load(
        partial + source[:, None] * VALUE_DIM + width[None, :],
        mask=inside[:, None] & (width < VALUE_DIM)[None, :], other=0.0,
    )
    most = tl.max(tops, 0)
    most = tl.where(most == float("-inf"), 0.0, most)
    fade = tl.exp2(tops - most)
    whole = tl.sum(totals * fade, 0)
    mean = tl.sum(parts * fade[:, None], 0)
    # A query that sees nothing gets zeros, as from PyTorch's own attention.
    mean = mean / tl.where(whole > 0, whole, 1.0)
    place = output + b.to(tl.int64) * output_stride_b + h * output_stride_h
    place = place + t * output_stride_t + width * output_stride_d
    tl.store(place, mean.to(output.dtype.element_ty), mask=width < VALUE_DIM)


@triton.jit
def read_all(
    queries, heads, top, total, result, b, t, kv_len, split, splits,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length,
    KEYS: tl.constexpr,
):
    """Attend to every splits-th run of KEYS keys; a run of hidden keys is not read."""
    first, end = seen_range(b, t, kv_len, length)
    for start in range(first // KEYS * KEYS + split * KEYS, end, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = (slot >= first) & (slot < end)
        top, total, result = attend_to(
            slot, inside, queries, heads, top, total, result, b, t, kv_len,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length,
        )
    return top, total, result


@triton.jit
def attend_all(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits, length,
    KEYS: tl.constexpr, EARLY: tl.constexpr,
):
    """Attend from the heads of one group at one position to all visible keys."""
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    key += b.to(tl.int64) * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    value += b.to(tl.int64) * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    top, total, result = read_all(
        queries, heads, top, total, result, b, t, kv_len, split, splits,
        key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length,
        KEYS,
    )
    store_part(
        top, total, result, head_row, split, splits, partial, partial_top, partial_sum
    )


BUDGET = tl.constexpr(1024)  # tokens read per KV head and query position
SINKS = tl.constexpr(0)  # first tokens, always read
RECENT = tl.constexpr(1)  # last tokens, always read
PAGE = tl.constexpr(16)  # slots of the groups that are read whole
SAMPLED = tl.constexpr(32)  # keys that each KV head compares with fingerprints
NEWEST = tl.constexpr(8)  # those among them that are the newest
RANKED = tl.constexpr(512)  # groups that a program ranks
BINS = tl.constexpr(256)  # bins of a histogram of shares; the first is for what cannot be chosen
LAST_BIN = tl.constexpr(1112)  # a share of 2^12, in eighths of an octave
HEADS = tl.constexpr(4)  # query heads of a group, up to a power of two
SIZE_0 = tl.constexpr(16)  # slots of a group of level 0
SCANNED_0 = tl.constexpr(64)  # groups of level 0 scored at a time


@triton.jit
def shares_of(value, total):
    """Return the sum over a group's heads of each item's share [N], by scores [ROWS, N] in bits."""
    real = (tl.arange(0, ROWS) < GROUP)[:, None]
    share = tl.sum(tl.where(real, tl.exp2(value - total[:, None]), 0.0), 0)
    # After a product, eight threads have the same items; `gather` gives each thread its own.
    return tl.gather(share, tl.arange(0, value.shape[1]), 0)


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
def bins_of_shares(share, possible):
    """Return the bin of each item's share [N].

    There are eight bins to a factor of two: a float's exponent and the first bits of its mantissa.
    An item that is not `possible` [N] is in the first bin.
    """
    place = (share.to(tl.int32, bitcast=True) >> 20) - (LAST_BIN - BINS + 1)
    return tl.where(possible & (share > 0), tl.minimum(tl.maximum(place, 1), BINS - 1), 0)


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
def fresh_seen(
    positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
):
    """Return the first slot that this step has written and the query sees, else `fresh_from`."""
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    if written > 1:
        slot = written_slots(
            positions, position_stride_b, position_stride_t, written, b, kv_len, 2**30
        )
        inside = slot < kv_len
        seen = visible(b, kv_head * GROUP, t, slot, kv_len, inside, length)
        own = tl.min(tl.where(seen, slot, 2**30), 0)
        fresh = tl.where(own < 2**30, own, fresh)
    return fresh


@triton.jit
def due(left, own, at_cut):
    """Return how many of our `own` items at the cut are chosen, if `left` of all `at_cut` are."""
    return (left * own // tl.maximum(at_cut, 1)).to(tl.int32)


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


@triton.jit
def always_read(
    tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES: tl.constexpr
):
    """Return the bounds of the slots [first, sinks_end) and [recent_start, end), always read."""
    first, end = seen_range(b, t, kv_len, length)
    sinks_end = tl.minimum(first + SINKS, end)
    recent_start = tl.maximum(tl.minimum(end - RECENT, fresh // PAGE * PAGE), sinks_end)
    return first, sinks_end, recent_start, end


@triton.jit
def lose_row(header, b):
    """Distrust the index of a row: attention reads all its keys until it is built anew."""
    end = tl.load(header + 1 + b)
    tl.store(header + 1 + b, tl.minimum(end, -1 - end))


@triton.jit
def move_end(header, b, end):
    """Note where a row ends. A row that is not trusted stays so."""
    lost = tl.load(header + 1 + b) < 0
    tl.store(header + 1 + b, tl.where(lost, -1 - end, end))


@triton.jit
def fingerprint(keys):
    """Return a hash, int32 [N], of the bits of each of the keys [N, DIM].

    It is a sum of bit patterns with odd weights, modulo 2^32: exact in any order of summation. High
    bits are folded down first, so that differences in sign bits alone do not cancel.
    """
    if keys.dtype.primitive_bitwidth == 32:
        bits = keys.to(tl.uint32, bitcast=True)
        bits = bits ^ (bits >> 16)
    else:
        bits = keys.to(tl.uint16, bitcast=True).to(tl.uint32)
    bits = bits ^ (bits >> 8)
    weight = (tl.arange(0, DIM).to(tl.uint32) + 1) * 0x9E3779B1
    weight = (weight ^ (weight >> 15)) * 0x85EBCA77
    weight = (weight ^ (weight >> 13)) | 1
    return tl.sum((bits * weight[None, :]).to(tl.int32, bitcast=True), 1).to(tl.int32)


@triton.jit
def changed_keys(keys, slot, inside, fingerprints):
    """Return 1 for each of the keys [N, DIM] that is not the one that was indexed, int32 [N].

    `slot` [N] are their slots. Those that are not `inside` [N] are not compared.
    """
    known = tl.load(fingerprints + slot, mask=inside, other=0)
    return (inside & (known != fingerprint(keys))).to(tl.int32)


@triton.jit
def check_sample(
    key, stride_b, stride_h, stride_l, stride_d,
    header, fingerprints, positions, position_stride_b, position_stride_t, written, fresh,
    b, kv_head, slots, kv_heads, kv_len,
):
    """Distrust the index of a row if one of SAMPLED keys is not as indexed, or keys are missing.

    Keys are missing if the row goes on behind its end, as one that was given to another request.
    If a key of the last step was not as indexed, the index is distrusted as a whole.

    The sample has the NEWEST keys, which whoever appends has written, and others at equal
    distances, which each step and each KV head begins elsewhere. All are before `fresh`, and none
    was written by this step. This step already reads all keys.
    """
    fresh = tl.minimum(fresh, kv_len)
    trust, held = tl.load(header), tl.load(header + 1 + b)
    if trust > 1:
        tl.store(header, 0)
    elif (trust == 1) & (held >= 0) & (fresh > 0):
        number, d = tl.arange(0, SAMPLED), tl.arange(0, DIM)
        turn = fresh.to(tl.int64) * 40503 + kv_head * (65536 // kv_heads)  # the golden ratio's part
        begin = (turn & 65535) * fresh >> 16
        others = SAMPLED - NEWEST
        slot = ((number - NEWEST).to(tl.int64) * fresh + begin) // others
        slot = tl.where(number < NEWEST, tl.maximum(fresh - 1 - number, 0), slot).to(tl.int64)
        place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
        place = place + slot[:, None] * stride_l + d[None, :] * stride_d
        keys = tl.load(place, mask=(d < HEAD_DIM)[None, :], other=0.0)
        fingerprints += (b * kv_heads + kv_head).to(tl.int64) * slots
        inside = slot < fresh
        if written > 1:
            new = written_slots(
                positions, position_stride_b, position_stride_t, written, b, kv_len, -1
            )
            inside &= tl.max((slot[:, None] == new[None, :]).to(tl.int32), 1) == 0
        goes_on = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
        if (goes_on > held) | (tl.max(changed_keys(keys, slot, inside, fingerprints), 0) > 0):
            lose_row(header, b)


@triton.jit(do_not_specialize=["end"])
def record_fingerprints(
    key, stride_b, stride_h, stride_l, stride_d, fingerprints, end, slots, kv_heads
):
    """Hash the keys in the slots [0, end), 64 a program."""
    space, slot = tl.program_id(1), tl.program_id(0) * 64 + tl.arange(0, 64)
    b, kv_head, d = space // kv_heads, space % kv_heads, tl.arange(0, DIM)
    place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    place = place + slot.to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
    keys = tl.load(place, mask=(slot < end)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    tl.store(
        fingerprints + space.to(tl.int64) * slots + slot, fingerprint(keys), mask=slot < end
    )


@triton.jit
def estimate_0(
    queries, summary_least, summary_greatest, group, held,
):
    """Estimate q.k for the groups [N] of level 0 that are held, bool [N]: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_least = tl.load(summary_least + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_greatest = tl.load(summary_greatest + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    return (tl.dot(tl.maximum(0.0, queries.to(tl.float32)).to(queries.dtype), tl.trans(field_greatest)) + tl.dot(tl.minimum(0.0, queries.to(tl.float32)).to(queries.dtype), tl.trans(field_least)))


@triton.jit
def scan_0(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d, fingerprints, slots,
    groups,
    summary_least, summary_greatest, scores, totals, counts, counts_stride,
    histogram,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, scan_tiles, tiles, length,
    STEPS: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store log2 of the estimated mass of groups of level 0 for each head, and of its sum.

    A group's score stands for every indexed token of it that some head sees. Counters of later
    kernels are cleared here. One more program looks if the index is stale.
    """
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    space = (b * kv_heads + kv_head).to(tl.int64)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    if tile == scan_tiles:
        if (t == 0) | (fresh > fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)):
            check_sample(
                key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
                header, fingerprints, positions, position_stride_b, position_stride_t, written, fresh,
                b, kv_head, slots, kv_heads, kv_len,
            )
        return
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    first, end = seen_range(b, t, kv_len, length)
    known = tl.minimum(end, fresh)
    g = tl.arange(0, ROWS)
    scores += (head_row.to(tl.int64) * GROUP + g)[:, None] * items
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    for number in range(STEPS):
        item = (tile * STEPS + number) * SCANNED_0 + tl.arange(0, SCANNED_0)
        there, group = item < items, item
        shown = tl.minimum(group * SIZE_0 + SIZE_0, known) - tl.maximum(group * SIZE_0, first)
        shown = tl.where(there, shown, 0)
        summarised = group * SIZE_0 + SIZE_0 <= fresh
        held = summarised & (shown > 0)
        s = estimate_0(
            queries, summary_least + space * groups * HEAD_DIM, summary_greatest + space * groups * HEAD_DIM, group, held,
        )
        mass = score(s, b, heads[:, None], t, (group * SIZE_0)[None, :], held[None, :], length)
        mass += tl.log2(tl.maximum(shown, 1).to(tl.float32))[None, :]
        mass = tl.where(held[None, :], mass, float("-inf"))
        most = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp2(top - most) + tl.sum(tl.exp2(mass - most[:, None]), 1)
        top = most
        mass = tl.where(((shown > 0) & (summarised == 0))[None, :], float("inf"), mass)
        tl.store(scores + item[None, :], mass, mask=(g < GROUP)[:, None] & there[None, :])
    whole = tl.where(total > 0, top + tl.log2(total), -1e30)
    tl.store(totals + (head_row.to(tl.int64) * scan_tiles + tile) * ROWS + g, whole)
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32))
        tl.store(counts + head_row * counts_stride + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def rank_0(
    scores, totals, scan_tiles,
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, length,
    TILES: tl.constexpr, SCAN_TILES: tl.constexpr, LOTS: tl.constexpr, LISTS: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of RANKED groups, and count what is in each bin.

    No group that may be chosen is in the first bin. One without a summary is in the last.
    """
    head_row, lot = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    space = (b * kv_heads + kv_head).to(tl.int64)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
    )
    g, item = tl.arange(0, ROWS)[:, None], lot * RANKED + tl.arange(0, RANKED)
    there, group = item < items, item
    value = tl.load(
        scores + (head_row.to(tl.int64) * GROUP + g) * items + item[None, :],
        mask=(g < GROUP) & there[None, :], other=float("-inf"),
    )
    slot = group * SIZE_0
    possible = (tl.max(value, 0) > float("-inf")) & (slot < stop) & (slot + SIZE_0 > begin)
    share = shares_of(value, denominators(totals, head_row, scan_tiles, SCAN_TILES))
    entry = tl.maximum(bins_of_shares(share, possible), possible.to(tl.int32))
    mine = head_row.to(tl.int64) * tl.num_programs(1) + lot
    tl.store(group_bins + mine * RANKED + tl.arange(0, RANKED), entry.to(tl.uint8))
    found = count_bins(counts + head_row * counts_stride, entry)
    tl.store(ranks + mine * BINS + tl.arange(0, BINS), tl.cumsum(found, 0, reverse=True))
    if LISTS:
        tl.debug_barrier()
        list_0(
            group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
            positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
            kv_len, items, kv_heads, query_len, tiles, length,
            TILES, LOTS, False,
        )


@triton.jit
def list_0(
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, length,
    TILES: tl.constexpr, LOTS: tl.constexpr, EARLY: tl.constexpr,
):
    """List the slots of the best of RANKED groups, as candidates that `attend` reads for certain.

    As many groups are chosen as fit into the budget whole: `attend` has no token to leave out.
    """
    head_row, lot = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    space = (b * kv_heads + kv_head).to(tl.int64)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
    )
    room = tl.maximum(BUDGET - (end - stop) - (begin - first), 0)
    room = tl.where(stop - begin <= room, candidate_room // SIZE_0, room // SIZE_0)
    lots, item = tl.num_programs(1), lot * RANKED + tl.arange(0, RANKED)
    mine = head_row.to(tl.int64) * lots + lot
    there, group = item < items, item
    entry = tl.load(group_bins + mine * RANKED + tl.arange(0, RANKED)).to(tl.int32)
    cut, left, at_cut = threshold(counts + head_row * counts_stride, room)
    candidates += head_row.to(tl.int64) * candidate_room
    bins += head_row.to(tl.int64) * candidate_room
    of_lot = chosen_of_tiles(ranks + (mine - lot) * BINS, cut, left, at_cut, lots, LOTS)
    before = tl.sum(tl.where(tl.arange(0, LOTS) < lot, of_lot, 0), 0)
    chosen, place, _ = choose_by_bin(entry, cut, left, at_cut)
    for low in range(0, 16, 16):
        inner = low + tl.arange(0, 16)[None, :]
        child = (group * 16)[:, None] + inner
        into = ((before + place) * 16)[:, None] + inner
        tl.store(candidates + into, child, mask=chosen[:, None])
        within = (child >= begin) & (child < stop)
        tl.store(bins + into, tl.where(within, BINS - 1, 0).to(tl.uint8), mask=chosen[:, None])
    if lot == 0:
        tl.store(candidate_count + head_row, tl.sum(of_lot, 0) * 16)


@triton.jit
def index_new(
    key, stride_b, stride_h, stride_l, stride_d,
    header, fingerprints, summary_least, summary_greatest, positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, kv_len,
):
    """Summarise every group whose last slot this step has written.

    All new keys get fingerprints.
    """
    space = (b * kv_heads + kv_head).to(tl.int64)
    d = tl.arange(0, DIM)
    inside = d < HEAD_DIM
    key += b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    for number in range(written):
        slot = tl.load(positions + b * position_stride_b + number * position_stride_t).to(tl.int32)
        slot = tl.where(slot < 0, slot + kv_len, slot)
        newest = tl.load(key + slot.to(tl.int64) * stride_l + d * stride_d, mask=inside, other=0.0)
        mark = tl.sum(fingerprint(newest[None, :]), 0)
        tl.store(fingerprints + space * slots + slot, mark)
        group = slot // SIZE_0
        if slot % SIZE_0 == SIZE_0 - 1:
            over_0_0 = tl.full([DIM], float("inf"), tl.float32)
            over_0_1 = tl.full([DIM], float("-inf"), tl.float32)
            for low in range(0, SIZE_0, 16):
                place = (group * SIZE_0 + low + tl.arange(0, 16)).to(tl.int64)
                keys = tl.load(
                    key + place[:, None] * stride_l + d[None, :] * stride_d, mask=inside[None, :], other=0.0
                ).to(tl.float32)
                over_0_0 = tl.minimum(over_0_0, tl.min(keys, 0))
                over_0_1 = tl.maximum(over_0_1, tl.max(keys, 0))
            at = space * (slots // SIZE_0) + group
            field_least = over_0_0
            tl.store(summary_least + at * HEAD_DIM + d, field_least.to(summary_least.dtype.element_ty), mask=inside)
            field_greatest = over_0_1
            tl.store(summary_greatest + at * HEAD_DIM + d, field_greatest.to(summary_greatest.dtype.element_ty), mask=inside)
    if (kv_head == 0) & (written > 0):
        last = written_slots(
            positions, position_stride_b, position_stride_t, written, b, kv_len, -1
        )
        move_end(header, b, tl.max(last, 0) + 1)


@triton.jit
def choose(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits,
    header, fingerprints, summary_least, summary_greatest, slots,
    tile_first, tile_end, tiles, positions, position_stride_b, position_stride_t, written,
    histogram, bins, bin_room, candidates, candidate_count, chosen_list, list_count, capacity, length,
    KEYS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, PAGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """List the selected keys. Every program finds the threshold itself, and the tokens above it."""
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    mine = head_row.to(tl.int64) * splits + split
    chosen_list += mine * capacity
    # A kernel before this one may have just revoked trust: what caches hold is too old.
    whole_index, row_end = tl.load(header, cache_modifier=".cg"), tl.load(header + 1 + b, cache_modifier=".cg")
    trusted = (whole_index != 0) & (row_end >= 0)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
    )
    sinks = begin - first
    always = sinks + end - stop
    count = tl.full([], -1, tl.int32)
    if trusted & (end > 0) & (always <= capacity):
        # The programs examine candidates, or all slots between those that are always read.
        # They take sixteen at a time, in turn.
        sixteen = (tl.arange(0, LANES // 16)[:, None] * splits + split) * 16
        item = sixteen + tl.arange(0, 16)[None, :]
        origin, items = begin // 16 * 16, stop - begin // 16 * 16
        bins += head_row.to(tl.int64) * bin_room
        candidates += head_row.to(tl.int64) * bin_room
        if PAGED:
            origin, items = origin * 0, tl.load(candidate_count + head_row)
        # A mask that is the same for sixteen lets these be loaded at once.
        entry = tl.load(bins + origin + item, mask=sixteen < (bin_room if PAGED else items), other=0)
        room = tl.maximum(-(always - BUDGET), 0)
        cut, left, at_cut = threshold(histogram + head_row * (2 * BINS) + PAGED * BINS, room)
        count = tl.maximum(always - split + splits - 1, 0) // splits
        for start in range(0, count, 32):
            own = start + tl.arange(0, 32)
            which = split + own * splits
            slot = tl.where(which < sinks, first + which, stop + which - sinks)
            tl.store(chosen_list + own, slot, mask=own < count)
        for start in range(0, items, splits * LANES):
            slot = origin + item
            inside = item < items
            item += splits * LANES
            sixteen += splits * LANES
            following = tl.load(bins + origin + item, mask=sixteen < items, other=0)
            if not PAGED:
                inside &= slot >= begin
            entry = tl.where(inside, entry, 0)
            chosen, place, more = choose_of_sixteens(entry.to(tl.int32), cut, left, at_cut)
            if PAGED:
                slot = tl.load(candidates + slot, mask=chosen, other=0)
            tl.store(chosen_list + count + place, slot, mask=chosen)
            count += more
            entry = following
    tl.store(list_count + mine, count)


@triton.jit
def attend(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits,
    header, fingerprints, summary_least, summary_greatest, slots,
    tile_first, tile_end, tiles, positions, position_stride_b, position_stride_t, written,
    histogram, bins, bin_room, candidates, candidate_count, chosen_list, list_count, capacity, length,
    KEYS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, PAGED: tl.constexpr,
    LISTED: tl.constexpr, EARLY: tl.constexpr,
):
    """Attend from the heads of one group at one position to the selected keys.

    Unless they are listed, every program finds the threshold itself, and the tokens above it in its
    share of the slots. One more program adds the newest keys to the index: nothing selects from
    these yet.
    """
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if split == splits:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if t == 0:
            index_new(
                key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
                header, fingerprints, summary_least, summary_greatest, positions, position_stride_b, position_stride_t, written,
                b, kv_head, slots, kv_heads, kv_len,
            )
        return
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    key += b.to(tl.int64) * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    value += b.to(tl.int64) * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    mine = head_row.to(tl.int64) * splits + split
    chosen_list += mine * capacity
    if LISTED:
        count = tl.load(list_count + mine)
    else:
        # A kernel before this one may have just revoked trust: what caches hold is too old.
        whole_index, row_end = tl.load(header, cache_modifier=".cg"), tl.load(header + 1 + b, cache_modifier=".cg")
        trusted = (whole_index != 0) & (row_end >= 0)
        first, begin, stop, end = always_read(
            tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
        )
        sinks = begin - first
        always = sinks + end - stop
        count = tl.full([], -1, tl.int32)
        if trusted & (end > 0) & (always <= capacity):
            # The programs examine candidates, or all slots between those that are always read.
            # They take sixteen at a time, in turn.
            sixteen = (tl.arange(0, LANES // 16)[:, None] * splits + split) * 16
            item = sixteen + tl.arange(0, 16)[None, :]
            origin, items = begin // 16 * 16, stop - begin // 16 * 16
            bins += head_row.to(tl.int64) * bin_room
            candidates += head_row.to(tl.int64) * bin_room
            if PAGED:
                origin, items = origin * 0, tl.load(candidate_count + head_row)
            # A mask that is the same for sixteen lets these be loaded at once.
            entry = tl.load(bins + origin + item, mask=sixteen < (bin_room if PAGED else items), other=0)
            room = tl.maximum(-(always - BUDGET), 0)
            cut, left, at_cut = threshold(histogram + head_row * (2 * BINS) + PAGED * BINS, room)
            count = tl.maximum(always - split + splits - 1, 0) // splits
            for start in range(0, count, 32):
                own = start + tl.arange(0, 32)
                which = split + own * splits
                slot = tl.where(which < sinks, first + which, stop + which - sinks)
                tl.store(chosen_list + own, slot, mask=own < count)
            for start in range(0, items, splits * LANES):
                slot = origin + item
                inside = item < items
                item += splits * LANES
                sixteen += splits * LANES
                following = tl.load(bins + origin + item, mask=sixteen < items, other=0)
                if not PAGED:
                    inside &= slot >= begin
                entry = tl.where(inside, entry, 0)
                chosen, place, more = choose_of_sixteens(entry.to(tl.int32), cut, left, at_cut)
                if PAGED:
                    slot = tl.load(candidates + slot, mask=chosen, other=0)
                tl.store(chosen_list + count + place, slot, mask=chosen)
                count += more
                entry = following
        tl.store(list_count + mine, count)
        tl.debug_barrier()
    if count >= 0:
        for start in range(0, count, KEYS):
            number = start + tl.arange(0, KEYS)
            slot = tl.load(chosen_list + number, mask=number < count, other=0)
            top, total, result = attend_to(
                slot, number < count, queries, heads, top, total, result, b, t, kv_len,
                key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length,
            )
        if fresh % splits == split:
            turns = (count + SAMPLED - 1) // SAMPLED
            number = fresh // splits % tl.maximum(turns, 1) * SAMPLED + tl.arange(0, SAMPLED)
            slot = tl.load(chosen_list + number, mask=number < count, other=0)
            compared = (number < count) & (slot < fresh)
            d = tl.arange(0, DIM)
            keys = tl.load(
                key + slot.to(tl.int64)[:, None] * key_stride_l + d[None, :] * key_stride_d,
                mask=compared[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
            )
            fingerprints += (b * kv_heads + kv_head).to(tl.int64) * slots
            if tl.max(changed_keys(keys, slot, compared, fingerprints), 0) > 0:
                tl.store(header, 2)
    else:
        top, total, result = read_all(
            queries, heads, top, total, result, b, t, kv_len, split, splits,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length,
            KEYS,
        )
    store_part(
        top, total, result, head_row, split, splits, partial, partial_top, partial_sum
    )


EPSILON = tl.constexpr(0.09999999403953552)  # share of the softmax that may be unread; 1: certificates alone
SLACK = tl.constexpr(6.4849853515625e-05)  # relative error of a sum of products, at most
SLOPE = tl.constexpr(0.12751743082459868)  # what a score grows by, in bits, when q.k grows by 1, at most
BOUNDED = 512  # slots whose bounds a program computes at a time


@triton.jit
def mark_read(
    chosen_list, list_count, capacity, marks, longest, slots,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    kv_heads, query_len, splits, KEYS: tl.constexpr,
):
    """Mark the slots that one program has read, and store the largest squared length of keys."""
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, b = head_row % kv_heads, head_row // kv_heads // query_len
    d, mine = tl.arange(0, DIM), head_row.to(tl.int64) * splits + split
    key += b.to(tl.int64) * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    marks += head_row.to(tl.int64) * slots
    count, most = tl.load(list_count + mine), tl.full([], 0.0, tl.float32)
    for start in range(0, count, KEYS):
        number = start + tl.arange(0, KEYS)
        slot = tl.load(chosen_list + mine * capacity + number, mask=number < count, other=0)
        tl.store(marks + slot, tl.full([KEYS], 1, tl.uint8), mask=number < count)
        keys = tl.load(
            key + slot.to(tl.int64)[:, None] * key_stride_l + d[None, :] * key_stride_d,
            mask=(number < count)[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        ).to(tl.float32)
        squares = tl.sum(keys * keys, 1)
        most = tl.maximum(most, tl.max(tl.where(squares == squares, squares, float("inf")), 0))
    tl.store(longest + mine, most)


@triton.jit
def bound_of_groups(queries, summary_least, summary_greatest, group, held):
    """Return an upper bound of q.k over the keys of the groups [N] that are held: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_least = tl.load(summary_least + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_greatest = tl.load(summary_greatest + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    bound = (tl.dot(tl.maximum(0.0, queries.to(tl.float32)).to(queries.dtype), tl.trans(field_greatest)) + tl.dot(tl.minimum(0.0, queries.to(tl.float32)).to(queries.dtype), tl.trans(field_least)))
    terms = (tl.dot(tl.abs(tl.maximum(0.0, queries.to(tl.float32)).to(queries.dtype).to(tl.float32)).to(queries.dtype), tl.trans(tl.abs(field_greatest.to(tl.float32)).to(queries.dtype))) + tl.dot(tl.abs(tl.minimum(0.0, queries.to(tl.float32)).to(queries.dtype).to(tl.float32)).to(queries.dtype), tl.trans(tl.abs(field_least.to(tl.float32)).to(queries.dtype))))
    return bound + SLACK * terms


@triton.jit
def bound_unread(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    summary_least, summary_greatest,
    marks, list_count, unread, positions, position_stride_b, position_stride_t, written, header,
    kv_len, slots, kv_heads, query_len, splits, bound_tiles, length,
    STEPS: tl.constexpr,
):
    """Store log2 of the sum of bounds of exp(score) over visible keys that were not read, by head.

    A key without a bound may have any score.
    """
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    g = tl.arange(0, ROWS)
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    if tl.load(list_count + head_row.to(tl.int64) * splits) >= 0:
        queries, heads = load_queries(
            query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
        )
        fresh = fresh_seen(
            positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
        )
        space = (b * kv_heads + kv_head).to(tl.int64)
        marks += head_row.to(tl.int64) * slots
        for number in range(STEPS):
            group = (tile * STEPS + number) * 32 + tl.arange(0, 32)
            low, high = group * 16, group * 16 + 16
            known = high <= fresh
            slot = low[None, :] + tl.arange(0, 16)[:, None]
            inside = slot < kv_len
            inside &= tl.load(marks + slot, mask=inside, other=1) == 0
            seen = visible(b, kv_head * GROUP, t, slot, kv_len, inside, length)
            left = tl.sum(seen.to(tl.int32), 0)
            if tl.max(left, 0) > 0:
                held = (left > 0) & known
                s = bound_of_groups(
                    queries, summary_least + space * (slots // 16) * HEAD_DIM, summary_greatest + space * (slots // 16) * HEAD_DIM, group, held,
                )
                s = tl.where(held[None, :] & (s == s), tl.minimum(s, 1e30), 1e30)
                at, there = low[None, :], (left > 0)[None, :]
                bits = score(s, b, heads[:, None], t, at, there, length)
                bits = tl.where(bits == bits, tl.minimum(bits, 1e30), 1e30)
                bits += tl.log2(tl.maximum(left, 1).to(tl.float32))[None, :]
                bits = tl.where(there, bits, float("-inf"))
                most = tl.maximum(top, tl.max(bits, 1))
                total = total * tl.exp2(top - most) + tl.sum(tl.exp2(bits - most[:, None]), 1)
                top = most
    whole = tl.where(total > 0, top + tl.log2(total), -1e30)
    tl.store(unread + (head_row.to(tl.int64) * bound_tiles + tile) * ROWS + g, whole)


@triton.jit
def certify(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    unread, longest, list_count, partial_top, partial_sum, header, missed, failing,
    bound_tiles, kv_heads, query_len, splits, SPLITS: tl.constexpr, BOUND_TILES: tl.constexpr,
):
    """Bound the share of the softmax that each head of a row has not read, and compare it.

    The bound is M / (1 + M), rounded up, where M bounds the unread mass relative to the mass read.
    A row of which some head may miss more than EPSILON must read all keys, and then misses nothing.
    """
    head_row = tl.program_id(0)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    queries, _ = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    g, tile, split = tl.arange(0, ROWS), tl.arange(0, BOUND_TILES), tl.arange(0, SPLITS)
    parts = tl.load(
        unread + (head_row.to(tl.int64) * bound_tiles + tile)[:, None] * ROWS + g[None, :],
        mask=(tile < bound_tiles)[:, None], other=-1e30,
    )
    most = tl.max(parts, 0)
    log_unread = most + tl.log2(tl.sum(tl.exp2(parts - most[None, :]), 0))
    mine = head_row.to(tl.int64) * splits + split
    inside = (split < splits)[:, None] & (g < GROUP)[None, :]
    at = mine[:, None] * GROUP + g[None, :]
    tops = tl.load(partial_top + at, mask=inside, other=float("-inf"))
    sums = tl.load(partial_sum + at, mask=inside, other=0.0)
    base = tl.max(tops, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    log_read = base + tl.log2(tl.sum(sums * tl.exp2(tops - base[None, :]), 0))
    squares = tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1)
    reach = tl.sqrt(squares * tl.max(tl.load(longest + mine, mask=split < splits, other=0.0), 0))
    # Scores, and their sums, are rounded: what was read may be less, and what was not more.
    floor = log_read - SLACK * (SLOPE * reach + tl.abs(log_read) + 2.0)
    excess = log_unread + SLACK * tl.abs(log_unread) - floor
    share = (1.0 + SLACK) / (1.0 + tl.exp2(-excess))
    share = tl.where(share == share, tl.minimum(tl.maximum(share, 1.1754944e-38), 1.0), 1.0)
    # A key has just been found changed: what the index says of other keys is not believed either.
    share = tl.where(tl.load(header) == 1, share, 1.0)
    all_read = tl.load(list_count + head_row.to(tl.int64) * splits) < 0
    share = tl.where((most <= -1e29) | all_read, 0.0, share)
    over = tl.max(tl.where((g < GROUP) & (share > EPSILON), 1, 0), 0)
    tl.store(missed + head_row * GROUP + g, tl.where(over > 0, 0.0, share), mask=g < GROUP)
    tl.store(failing + head_row, over)


@triton.jit
def read_uncertified(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits, failing, chosen_list, list_count, capacity, length,
    KEYS: tl.constexpr,
):
    """Attend to all visible keys if too much of the softmax may be unread; else do nothing."""
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if tl.load(failing + head_row) > 0:
        queries, heads = load_queries(
            query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
        )
        key += b.to(tl.int64) * key_stride_b + kv_head.to(tl.int64) * key_stride_h
        value += b.to(tl.int64) * value_stride_b + kv_head.to(tl.int64) * value_stride_h
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        result = tl.zeros([ROWS, WIDTH], tl.float32)
        top, total, result = read_all(
            queries, heads, top, total, result, b, t, kv_len, split, splits,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length,
            KEYS,
        )
        store_part(
            top, total, result, head_row, split, splits, partial, partial_top, partial_sum
        )
        mine = head_row.to(tl.int64) * splits + split
        count = tl.load(list_count + mine)
        for start in range(0, count, 64):
            number = start + tl.arange(0, 64)
            tl.store(chosen_list + mine * capacity + number, tl.full([64], -1, tl.int32), mask=number < count)
