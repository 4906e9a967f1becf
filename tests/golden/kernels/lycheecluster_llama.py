"""Decode attention: decode lycheecluster bf16 g4 d128 b1024.

score(s) = 0.0883883476483184*s
visible: length + q >= kv
"""

import triton
import triton.language as tl

POLICY = "lycheecluster"  # the policy that selects keys; None: all visible keys are read
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


SETTINGS = ((8, 16), True, 4, 64, 0, 16)  # how groups are made: the arguments of `GroupSettings`
BUDGET = tl.constexpr(1024)  # tokens read per KV head and query position
SINKS = tl.constexpr(16)  # first tokens, always read
RECENT = tl.constexpr(64)  # last tokens, always read
SHORTEST = tl.constexpr(8)  # slots of the shortest chunk
LONGEST = tl.constexpr(16)  # slots of the longest chunk
LOOK = tl.constexpr(4)  # numbers of chunks among which the last one of a row is
MEMBERS = tl.constexpr(16)  # LONGEST, up to a power of two
SAMPLED = tl.constexpr(32)  # keys that each KV head compares with fingerprints
NEWEST = tl.constexpr(8)  # those among them that are the newest
RANKED = tl.constexpr(512)  # groups that a program ranks
BINS = tl.constexpr(256)  # bins of a histogram of shares; the first is for what cannot be chosen
LAST_BIN = tl.constexpr(1112)  # a share of 2^12, in eighths of an octave
HEADS = tl.constexpr(4)  # query heads of a group, up to a power of two
SCANNED_0 = tl.constexpr(128)  # groups of level 0 scored at a time
KEPT_0 = tl.constexpr(16384)  # tokens in the groups of level 0 that are looked into
FEW_0 = tl.constexpr(64)  # clusters of level 0, up to a power of two
LISTED_0 = tl.constexpr(128)  # groups in them that a program lists at a time
SCANNED_1 = tl.constexpr(128)  # groups of level 1 scored at a time
KEPT_1 = tl.constexpr(4096)  # tokens in the groups of level 1 that are looked into
SCANNED_2 = tl.constexpr(128)  # groups of level 2 scored at a time


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
def span_bounds(spans, number, inside):
    """Return first slot, and slot after the last, of each of the chunks `number`, int32 [N].

    `spans` points to theirs. Equal: there is no such chunk, or it is not `inside`, bool [N].
    """
    span = tl.load(spans, mask=inside, other=0)
    low = number * SHORTEST + (span >> 16)
    return low, low + (span & 65535)


@triton.jit
def unread_slot(span, fresh):
    """Return the first slot that is in no chunk which the keys before the slot `fresh` decided.

    `span` points to the chunks of a row. The last one decided begins less than twice the longest
    length before `fresh`.
    """
    number = tl.maximum(fresh - 2 * LONGEST, 0) // SHORTEST + tl.arange(0, LOOK)
    low, high = span_bounds(span + number, number, number * SHORTEST < fresh)
    return tl.max(tl.where((high > low) & (low + LONGEST < fresh), high, 0), 0)


@triton.jit
def weigh_bins(histogram, entry, weight):
    """Add the weights in each bin but the first to a histogram, and return them.

    `entry` and `weight` [N] are the bins and weights of the items. Eight bits of the weights are
    summed up at a time, as a product of matrices that tell upper and lower halves of bins.
    """
    place, half = tl.arange(0, BINS), tl.arange(0, 16)
    upper = entry[:, None] // 16 == half[None, :]
    lower = (entry[:, None] % 16 == half[None, :]).to(tl.float32).to(tl.bfloat16)
    total = tl.zeros([BINS], tl.int32)
    shift = tl.full([], 0, tl.int32)
    rest = tl.where(entry > 0, weight, 0)
    while tl.max(rest, 0) > 0:
        digit = tl.where(upper, rest[:, None] & 255, 0).to(tl.float32).to(tl.bfloat16)  # exact
        sums = tl.dot(tl.trans(digit), lower)
        total += tl.reshape(sums, [BINS]).to(tl.int32) << shift
        rest = rest >> 8
        shift += 8
    total = tl.where(place > 0, total, 0)
    tl.atomic_add(histogram + place, total, mask=total > 0, sem="relaxed")
    return total


@triton.jit
def weights_before(ranks, cut, lot, LOTS: tl.constexpr):
    """Return the weights above the cut, and at the cut, in the lots before ours.

    `ranks` has, for each lot, the weights in each bin or above.
    """
    other = tl.arange(0, LOTS)
    ranks += other * BINS + cut
    above = tl.load(ranks + 1, mask=other < tl.where(cut < BINS - 1, lot, 0), other=0)
    through = tl.load(ranks, mask=other < tl.where(cut > 0, lot, 0), other=0)
    return tl.sum(above, 0), tl.sum(tl.maximum(through - above, 0), 0)


@triton.jit
def weights_above(counts, cut):
    """Return the weights in all bins above the cut, of a histogram of these."""
    place = tl.arange(0, BINS)
    return tl.sum(tl.where(place > cut, tl.load(counts + place), 0), 0)


@triton.jit
def always_read(
    tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES: tl.constexpr
):
    """Return the bounds of the slots [first, sinks_end) and [recent_start, end), always read."""
    first, end = seen_range(b, t, kv_len, length)
    sinks_end = tl.minimum(first + SINKS, end)
    recent_start = tl.maximum(tl.minimum(end - RECENT, unread), sinks_end)
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
    queries, summary_unit_mean, summary_unit_radius, group, held,
):
    """Estimate q.k for the groups [N] of level 0 that are held, bool [N]: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_unit_mean = tl.load(summary_unit_mean + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_unit_radius = tl.load(summary_unit_radius + group, mask=held, other=0.0)
    return ((field_unit_radius[None, :] * tl.sqrt(tl.sum((queries.to(tl.float32) * queries.to(tl.float32)), 1))[:, None]) + tl.dot(queries, tl.trans(field_unit_mean)))


@triton.jit
def scan_0(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d, fingerprints, slots,
    span, numbers, tokens_0, first_0, end_0, groups,
    summary_unit_mean, summary_unit_radius, scores, totals, counts, counts_stride,
    histogram,
    child_counts, candidate_count,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, scan_tiles, tiles, length,
    STEPS: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store log2 of the estimated mass of groups of level 0 for each head, and of its sum.

    A group's score stands for one of its tokens, whatever their number. Counters of later
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
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    known = tl.minimum(end, fresh)
    g = tl.arange(0, ROWS)
    scores += (head_row.to(tl.int64) * GROUP + g)[:, None] * items
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    for number in range(STEPS):
        item = (tile * STEPS + number) * SCANNED_0 + tl.arange(0, SCANNED_0)
        there, group = item < items, item
        at = space * groups + group
        size = tl.load(tokens_0 + at, mask=there, other=0)
        low = tl.load(first_0 + at, mask=there, other=0)
        high = tl.load(end_0 + at, mask=there, other=0)
        used = size > 0
        held = used & (tl.minimum(high, known) > tl.maximum(low, first))
        s = estimate_0(
            queries, summary_unit_mean + space * groups * HEAD_DIM, summary_unit_radius + space * groups, group, held,
        )
        mass = tl.full([ROWS, SCANNED_0], float("-inf"), tl.float32)
        bits = score(s, b, heads[:, None], t, low[None, :], held[None, :], length)
        mass = tl.where(held[None, :], bits, mass)
        most = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp2(top - most) + tl.sum(tl.exp2(mass - most[:, None]), 1)
        top = most
        tl.store(scores + item[None, :], mass, mask=(g < GROUP)[:, None] & there[None, :])
    whole = tl.where(total > 0, top + tl.log2(total), -1e30)
    tl.store(totals + (head_row.to(tl.int64) * scan_tiles + tile) * ROWS + g, whole)
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32))
        tl.store(counts + head_row * counts_stride + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(child_counts + head_row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(candidate_count + head_row, 0)


@triton.jit
def rank_0(
    scores, totals, scan_tiles,
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    span, numbers, tokens_0, first_0, end_0, groups,
    children_0, begin_0, order_1, child_groups,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, SCAN_TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of RANKED groups, and count what is in each bin.

    No group that may be chosen is in the first bin.
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
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    g, item = tl.arange(0, ROWS)[:, None], lot * RANKED + tl.arange(0, RANKED)
    there, group = item < items, item
    value = tl.load(
        scores + (head_row.to(tl.int64) * GROUP + g) * items + item[None, :],
        mask=(g < GROUP) & there[None, :], other=float("-inf"),
    )
    at = space * groups + group
    size = tl.load(tokens_0 + at, mask=there, other=0)
    low = tl.load(first_0 + at, mask=there, other=0)
    high = tl.load(end_0 + at, mask=there, other=0)
    used = size > 0
    possible = used & (tl.max(value, 0) > float("-inf")) & (low < stop) & (high > begin)
    share = shares_of(value, denominators(totals, head_row, scan_tiles, SCAN_TILES))
    entry = tl.maximum(bins_of_shares(share, possible), possible.to(tl.int32))
    mine = head_row.to(tl.int64) * tl.num_programs(1) + lot
    tl.store(group_bins + mine * RANKED + tl.arange(0, RANKED), entry.to(tl.uint8))
    found = weigh_bins(counts + head_row * counts_stride, entry, size)
    tl.store(ranks + mine * BINS + tl.arange(0, BINS), tl.cumsum(found, 0, reverse=True))


@triton.jit
def list_0(
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    span, numbers, tokens_0, first_0, end_0, groups,
    children_0, begin_0, order_1, child_groups,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """List what is in the best of RANKED clusters, until all listed ones have KEPT_0 tokens."""
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
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    room = tl.maximum(BUDGET - (end - stop) - (begin - first), 0)
    room = tl.where(stop - begin <= room, 2**26, KEPT_0)
    unit = tl.arange(0, FEW_0)
    there, group = unit < items, unit
    entry = tl.load(group_bins + head_row.to(tl.int64) * (lots * RANKED) + unit).to(tl.int32)
    there &= entry > 0
    at = space * groups + group
    size = tl.load(tokens_0 + at, mask=there, other=0)
    low = tl.load(first_0 + at, mask=there, other=0)
    high = tl.load(end_0 + at, mask=there, other=0)
    used = size > 0
    cut, left, at_cut = threshold(counts + head_row * counts_stride, room)
    candidates += head_row.to(tl.int64) * candidate_room
    weight = tl.where(there & (entry == cut), size, 0)
    is_kept = (entry > cut) | (tl.cumsum(weight, 0) - weight < left) & (entry == cut)
    take = tl.load(children_0 + at, mask=there & is_kept, other=0)
    behind = tl.cumsum(take, 0)
    # What is listed at a place is where its cluster begins, less the place of the cluster, and the place.
    shift = tl.load(begin_0 + at, mask=there & is_kept, other=0) - (behind - take)
    total = tl.minimum(tl.sum(take, 0), candidate_room)
    for start in range(lot * LISTED_0, total, tl.num_programs(1) * LISTED_0):
        place = start + tl.arange(0, LISTED_0)
        holder = tl.sum((behind[None, :] <= place[:, None]).to(tl.int32), 1)
        of_holder = unit[None, :] == holder[:, None]
        child = order_1 + space * child_groups + place + tl.sum(tl.where(of_holder, shift[None, :], 0), 1)
        tl.store(candidates + place, tl.load(child, mask=place < total, other=0), mask=place < total)
    if lot == 0:
        tl.store(candidate_count + head_row, total)


@triton.jit
def estimate_1(
    queries, summary_cluster_mean, summary_cluster_radius, group, held,
):
    """Estimate q.k for the groups [N] of level 1 that are held, bool [N]: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_cluster_mean = tl.load(summary_cluster_mean + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_cluster_radius = tl.load(summary_cluster_radius + group, mask=held, other=0.0)
    return ((field_cluster_radius[None, :] * tl.sqrt(tl.sum((queries.to(tl.float32) * queries.to(tl.float32)), 1))[:, None]) + tl.dot(queries, tl.trans(field_cluster_mean)))


@triton.jit
def scan_1(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    span, numbers, tokens_1, first_1, end_1, groups, listed, listed_room, listed_count, open_1,
    summary_cluster_mean, summary_cluster_radius, label_1, scores, totals, counts, counts_stride,
    child_counts, candidate_count,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, scan_tiles, tiles, length,
    TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store log2 of the estimated mass of groups of level 1 for each head, and of its sum.

    A group's score stands for one of its tokens, whatever their number. Counters of later
    kernels are cleared here.
    """
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    space = (b * kv_heads + kv_head).to(tl.int64)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    known = tl.minimum(end, fresh)
    g = tl.arange(0, ROWS)
    scores += (head_row.to(tl.int64) * GROUP + g)[:, None] * items
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    known_count, open_group = tl.load(listed_count + head_row), tl.load(open_1 + space)
    count = known_count + tl.maximum(groups - open_group, 0)
    for start in range(tile * SCANNED_1, count, scan_tiles * SCANNED_1):
        item = start + tl.arange(0, SCANNED_1)
        there, is_listed = item < count, item < known_count
        place = listed + head_row.to(tl.int64) * listed_room + item
        group = tl.where(is_listed, tl.load(place, mask=is_listed, other=0), open_group + item - known_count)
        at = space * groups + group
        size = tl.load(tokens_1 + at, mask=there, other=0)
        low = tl.load(first_1 + at, mask=there, other=0)
        high = tl.load(end_1 + at, mask=there, other=0)
        used = size > 0
        used &= (tl.load(label_1 + at, mask=used, other=0) > 0) == is_listed
        held = used & (tl.minimum(high, known) > tl.maximum(low, first))
        s = estimate_1(
            queries, summary_cluster_mean + space * groups * HEAD_DIM, summary_cluster_radius + space * groups, group, held,
        )
        mass = tl.full([ROWS, SCANNED_1], float("-inf"), tl.float32)
        bits = score(s, b, heads[:, None], t, low[None, :], held[None, :], length)
        mass = tl.where(held[None, :], bits, mass)
        most = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp2(top - most) + tl.sum(tl.exp2(mass - most[:, None]), 1)
        top = most
        tl.store(scores + item[None, :], mass, mask=(g < GROUP)[:, None] & there[None, :])
    whole = tl.where(total > 0, top + tl.log2(total), -1e30)
    tl.store(totals + (head_row.to(tl.int64) * scan_tiles + tile) * ROWS + g, whole)
    if tile == 0:
        tl.store(counts + head_row * counts_stride + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(child_counts + head_row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(candidate_count + head_row, 0)


@triton.jit
def rank_1(
    scores, totals, scan_tiles,
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    span, numbers, tokens_1, first_1, end_1, groups, listed, listed_room, listed_count, open_1,
    children_1, begin_1, order_2, child_groups, child_ranks, child_counts,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, SCAN_TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of RANKED groups, and count what is in each bin.

    No group that may be chosen is in the first bin.
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
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    known_count, open_group = tl.load(listed_count + head_row), tl.load(open_1 + space)
    count = known_count + tl.maximum(groups - open_group, 0)
    while lot * RANKED < count:
        g, item = tl.arange(0, ROWS)[:, None], lot * RANKED + tl.arange(0, RANKED)
        there, is_listed = item < count, item < known_count
        place = listed + head_row.to(tl.int64) * listed_room + item
        group = tl.where(is_listed, tl.load(place, mask=is_listed, other=0), open_group + item - known_count)
        value = tl.load(
            scores + (head_row.to(tl.int64) * GROUP + g) * items + item[None, :],
            mask=(g < GROUP) & there[None, :], other=float("-inf"),
        )
        at = space * groups + group
        size = tl.load(tokens_1 + at, mask=there, other=0)
        low = tl.load(first_1 + at, mask=there, other=0)
        high = tl.load(end_1 + at, mask=there, other=0)
        used = size > 0
        possible = used & (tl.max(value, 0) > float("-inf")) & (low < stop) & (high > begin)
        share = shares_of(value, denominators(totals, head_row, scan_tiles, SCAN_TILES))
        entry = tl.maximum(bins_of_shares(share, possible), possible.to(tl.int32))
        mine = head_row.to(tl.int64) * lots + lot
        tl.store(group_bins + mine * RANKED + tl.arange(0, RANKED), entry.to(tl.uint8))
        found = weigh_bins(counts + head_row * counts_stride, entry, size)
        tl.store(ranks + mine * BINS + tl.arange(0, BINS), tl.cumsum(found, 0, reverse=True))
        below = tl.load(children_1 + at, mask=there, other=0)
        found = weigh_bins(child_counts + head_row * BINS, entry, below)
        tl.store(child_ranks + mine * BINS + tl.arange(0, BINS), tl.cumsum(found, 0, reverse=True))
        lot += tl.num_programs(1)


@triton.jit
def list_1(
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    span, numbers, tokens_1, first_1, end_1, groups, listed, listed_room, listed_count, open_1,
    children_1, begin_1, order_2, child_groups, child_ranks, child_counts,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, LOTS: tl.constexpr, EARLY: tl.constexpr,
):
    """List what is in the best of RANKED clusters, until all listed ones have KEPT_1 tokens."""
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
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    room = tl.maximum(BUDGET - (end - stop) - (begin - first), 0)
    room = tl.where(stop - begin <= room, 2**26, KEPT_1)
    known_count, open_group = tl.load(listed_count + head_row), tl.load(open_1 + space)
    count = known_count + tl.maximum(groups - open_group, 0)
    cut, left, at_cut = threshold(counts + head_row * counts_stride, room)
    candidates += head_row.to(tl.int64) * candidate_room
    while lot * RANKED < count:
        item = lot * RANKED + tl.arange(0, RANKED)
        mine = head_row.to(tl.int64) * lots + lot
        there, is_listed = item < count, item < known_count
        place = listed + head_row.to(tl.int64) * listed_room + item
        group = tl.where(is_listed, tl.load(place, mask=is_listed, other=0), open_group + item - known_count)
        entry = tl.load(group_bins + mine * RANKED + tl.arange(0, RANKED)).to(tl.int32)
        there &= entry > 0
        at = space * groups + group
        size = tl.load(tokens_1 + at, mask=there, other=0)
        low = tl.load(first_1 + at, mask=there, other=0)
        high = tl.load(end_1 + at, mask=there, other=0)
        used = size > 0
        above, before = weights_before(ranks + (mine - lot) * BINS, cut, lot, LOTS)
        higher, at_it = there & (entry > cut), there & (entry == cut)
        weight = tl.where(at_it, size, 0)
        due_to = left - before - (tl.cumsum(weight, 0) - weight)
        own = tl.load(children_1 + at, mask=there, other=0)
        take = tl.where(higher | (at_it & (due_to > 0)), own, 0)
        above, before = weights_before(child_ranks + (mine - lot) * BINS, cut, lot, LOTS)
        before += weights_above(child_counts + head_row * BINS, cut)
        # What is above the cut comes first, in all lots, and then what is at the cut.
        over, rest = tl.where(higher, take, 0), tl.where(higher, 0, take)
        place = tl.where(higher, above + tl.cumsum(over, 0), before + tl.cumsum(rest, 0)) - take
        order = order_2 + space * child_groups + tl.load(begin_1 + at, mask=there, other=0)
        for start in range(0, tl.max(take, 0), 4):
            inner = start + tl.arange(0, 4)[None, :]
            fits = (inner < take[:, None]) & (place[:, None] + inner < candidate_room)
            child = tl.load(order[:, None] + inner, mask=fits, other=0)
            tl.store(candidates + place[:, None] + inner, child, mask=fits)
        last = tl.max(tl.where(take > 0, place + take, 0), 0)
        tl.atomic_max(candidate_count + head_row, tl.minimum(last, candidate_room), sem="relaxed")
        lot += tl.num_programs(1)


@triton.jit
def estimate_2(
    queries, summary_chunk_mean, summary_chunk_radius, group, held,
):
    """Estimate q.k for the groups [N] of level 2 that are held, bool [N]: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_chunk_mean = tl.load(summary_chunk_mean + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_chunk_radius = tl.load(summary_chunk_radius + group, mask=held, other=0.0)
    return ((field_chunk_radius[None, :] * tl.sqrt(tl.sum((queries.to(tl.float32) * queries.to(tl.float32)), 1))[:, None]) + tl.dot(queries, tl.trans(field_chunk_mean)))


@triton.jit
def scan_2(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    span, numbers, groups, listed, listed_room, listed_count, open_2,
    summary_chunk_mean, summary_chunk_radius, label_2, scores, totals, counts, counts_stride,
    candidate_count,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, scan_tiles, tiles, length,
    TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store log2 of the estimated mass of groups of level 2 for each head, and of its sum.

    A group's score stands for one of its tokens, whatever their number. Counters of later
    kernels are cleared here.
    """
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    space = (b * kv_heads + kv_head).to(tl.int64)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    known = tl.minimum(end, fresh)
    g = tl.arange(0, ROWS)
    scores += (head_row.to(tl.int64) * GROUP + g)[:, None] * items
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    known_count, open_group = tl.load(listed_count + head_row), tl.load(open_2 + space)
    count = known_count + tl.maximum(fresh // SHORTEST - open_group, 0)
    for start in range(tile * SCANNED_2, count, scan_tiles * SCANNED_2):
        item = start + tl.arange(0, SCANNED_2)
        there, is_listed = item < count, item < known_count
        place = listed + head_row.to(tl.int64) * listed_room + item
        group = tl.where(is_listed, tl.load(place, mask=is_listed, other=0), open_group + item - known_count)
        at = space * groups + group
        low, high = span_bounds(span + at, group, there & (group * SHORTEST < fresh))
        used = (high > low) & (low + LONGEST < fresh)
        used &= (tl.load(label_2 + at, mask=used, other=0) > 0) == is_listed
        held = used & (tl.minimum(high, known) > tl.maximum(low, first))
        s = estimate_2(
            queries, summary_chunk_mean + space * groups * HEAD_DIM, summary_chunk_radius + space * groups, group, held,
        )
        mass = tl.full([ROWS, SCANNED_2], float("-inf"), tl.float32)
        bits = score(s, b, heads[:, None], t, low[None, :], held[None, :], length)
        mass = tl.where(held[None, :], bits, mass)
        most = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp2(top - most) + tl.sum(tl.exp2(mass - most[:, None]), 1)
        top = most
        tl.store(scores + item[None, :], mass, mask=(g < GROUP)[:, None] & there[None, :])
    whole = tl.where(total > 0, top + tl.log2(total), -1e30)
    tl.store(totals + (head_row.to(tl.int64) * scan_tiles + tile) * ROWS + g, whole)
    if tile == 0:
        tl.store(counts + head_row * counts_stride + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(candidate_count + head_row, 0)


@triton.jit
def rank_2(
    scores, totals, scan_tiles,
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    span, numbers, groups, listed, listed_room, listed_count, open_2,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, SCAN_TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of RANKED groups, and count what is in each bin.

    No group that may be chosen is in the first bin.
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
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    known_count, open_group = tl.load(listed_count + head_row), tl.load(open_2 + space)
    count = known_count + tl.maximum(fresh // SHORTEST - open_group, 0)
    while lot * RANKED < count:
        g, item = tl.arange(0, ROWS)[:, None], lot * RANKED + tl.arange(0, RANKED)
        there, is_listed = item < count, item < known_count
        place = listed + head_row.to(tl.int64) * listed_room + item
        group = tl.where(is_listed, tl.load(place, mask=is_listed, other=0), open_group + item - known_count)
        value = tl.load(
            scores + (head_row.to(tl.int64) * GROUP + g) * items + item[None, :],
            mask=(g < GROUP) & there[None, :], other=float("-inf"),
        )
        at = space * groups + group
        low, high = span_bounds(span + at, group, there & (group * SHORTEST < fresh))
        used = (high > low) & (low + LONGEST < fresh)
        possible = used & (tl.max(value, 0) > float("-inf")) & (low < stop) & (high > begin)
        share = shares_of(value, denominators(totals, head_row, scan_tiles, SCAN_TILES))
        entry = tl.maximum(bins_of_shares(share, possible), possible.to(tl.int32))
        size = tl.minimum(high, stop) - tl.maximum(low, begin)
        mine = head_row.to(tl.int64) * lots + lot
        tl.store(group_bins + mine * RANKED + tl.arange(0, RANKED), entry.to(tl.uint8))
        found = weigh_bins(counts + head_row * counts_stride, entry, size)
        tl.store(ranks + mine * BINS + tl.arange(0, BINS), tl.cumsum(found, 0, reverse=True))
        lot += tl.num_programs(1)


@triton.jit
def list_2(
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    span, numbers, groups, listed, listed_room, listed_count, open_2,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, LOTS: tl.constexpr, EARLY: tl.constexpr,
):
    """List the slots of the best of RANKED chunks, as candidates that `attend` reads for certain.

    Of the chunk that the budget ends in, the first slots are listed.
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
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
    )
    room = tl.maximum(BUDGET - (end - stop) - (begin - first), 0)
    known_count, open_group = tl.load(listed_count + head_row), tl.load(open_2 + space)
    count = known_count + tl.maximum(fresh // SHORTEST - open_group, 0)
    cut, left, at_cut = threshold(counts + head_row * counts_stride, room)
    candidates += head_row.to(tl.int64) * candidate_room
    bins += head_row.to(tl.int64) * candidate_room
    while lot * RANKED < count:
        item = lot * RANKED + tl.arange(0, RANKED)
        mine = head_row.to(tl.int64) * lots + lot
        there, is_listed = item < count, item < known_count
        place = listed + head_row.to(tl.int64) * listed_room + item
        group = tl.where(is_listed, tl.load(place, mask=is_listed, other=0), open_group + item - known_count)
        entry = tl.load(group_bins + mine * RANKED + tl.arange(0, RANKED)).to(tl.int32)
        there &= entry > 0
        at = space * groups + group
        low, high = span_bounds(span + at, group, there & (group * SHORTEST < fresh))
        used = (high > low) & (low + LONGEST < fresh)
        low, high = tl.maximum(low, begin), tl.minimum(high, stop)
        size = high - low
        above, before = weights_before(ranks + (mine - lot) * BINS, cut, lot, LOTS)
        higher, at_it = there & (entry > cut), there & (entry == cut)
        weight = tl.where(at_it, size, 0)
        due_to = left - before - (tl.cumsum(weight, 0) - weight)
        take = tl.where(higher, size, tl.maximum(tl.minimum(due_to, weight), 0))
        before += weights_above(counts + head_row * counts_stride, cut)
        # What is above the cut comes first, in all lots, and then what is at the cut.
        over, rest = tl.where(higher, take, 0), tl.where(higher, 0, take)
        place = tl.where(higher, above + tl.cumsum(over, 0), before + tl.cumsum(rest, 0)) - take
        for start in range(0, tl.max(take, 0), 8):
            inner = start + tl.arange(0, 8)[None, :]
            fits = (inner < take[:, None]) & (place[:, None] + inner < candidate_room)
            child = low[:, None] + inner
            tl.store(bins + place[:, None] + inner, (inner * 0 + BINS - 1).to(tl.uint8), mask=fits)
            tl.store(candidates + place[:, None] + inner, child, mask=fits)
        last = tl.max(tl.where(take > 0, place + take, 0), 0)
        tl.atomic_max(candidate_count + head_row, tl.minimum(last, candidate_room), sem="relaxed")
        lot += tl.num_programs(1)


@triton.jit
def index_new(
    key, stride_b, stride_h, stride_l, stride_d,
    header, fingerprints, strength, span, numbers, label_2, open_2, summary_chunk_mean, summary_chunk_radius, positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, kv_len,
):
    """Rate the boundaries before the new keys, and summarise the chunks that these close.

    All new keys get fingerprints.
    """
    of_row = (b * kv_heads + kv_head).to(tl.int64)
    strength += of_row * slots
    span += of_row * numbers
    first_head = key + b.to(tl.int64) * stride_b
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
        if slot > 0:
            cosine = tl.full([], 0.0, tl.float32)
            pair = first_head + slot.to(tl.int64) * stride_l + d * stride_d
            for _ in range(kv_heads):
                here = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
                last = tl.load(pair - stride_l, mask=inside, other=0.0).to(tl.float32)
                lengths = tl.maximum(tl.sqrt(tl.sum(here * here, 0)), 1e-12)
                lengths *= tl.maximum(tl.sqrt(tl.sum(last * last, 0)), 1e-12)
                cosine += tl.sum(here * last, 0) / lengths
                pair += stride_h
            cosine = tl.where(cosine == cosine, cosine / kv_heads, 0.0)
            rated = tl.floor((1.0 - cosine) * 127.5 + 0.5)
            rated = tl.minimum(tl.maximum(rated, 0.0), 255.0)
            tl.store(strength + slot - 1, rated.to(tl.int32).to(tl.uint8))
        tl.debug_barrier()
        open_slot = unread_slot(span, slot)
        if open_slot + LONGEST == slot:
            offset = tl.arange(0, MEMBERS)
            cuts = (offset >= SHORTEST - 1) & (offset < LONGEST)
            boundary = tl.load(strength + open_slot + offset, mask=cuts, other=0).to(tl.int32)
            # The strongest boundary wins, and the last of those.
            best = tl.max(tl.where(cuts, boundary * MEMBERS + offset, -1), 0)
            length = best % MEMBERS + 1
            chunk = open_slot // SHORTEST
            tl.store(span + chunk, (open_slot % SHORTEST << 16) + length)
            behind = chunk + 1 + tl.arange(0, LOOK)
            tl.store(
                span + behind, tl.zeros([LOOK], tl.int32),
                mask=behind * SHORTEST < open_slot + length,
            )
            over_0_0 = tl.full([DIM], 0.0, tl.float32)
            for low in range(0, LONGEST, 16):
                place = (open_slot + low + tl.arange(0, 16)).to(tl.int64)
                member = low + tl.arange(0, 16) < length
                keys = tl.load(
                    key + place[:, None] * stride_l + d[None, :] * stride_d, mask=member[:, None] & inside[None, :], other=0.0
                ).to(tl.float32)
                over_0_0 = over_0_0 + tl.sum(tl.where(member[:, None], keys, 0.0), 0)
            over_1_0 = tl.full([], float("-inf"), tl.float32)
            for low in range(0, LONGEST, 16):
                place = (open_slot + low + tl.arange(0, 16)).to(tl.int64)
                member = low + tl.arange(0, 16) < length
                keys = tl.load(
                    key + place[:, None] * stride_l + d[None, :] * stride_d, mask=member[:, None] & inside[None, :], other=0.0
                ).to(tl.float32)
                over_1_0 = tl.maximum(over_1_0, tl.max(tl.where(member, tl.sum(tl.where(inside[None, :], (((-1.0 * ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32))[None, :] + keys) * ((-1.0 * ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32))[None, :] + keys)), 0.0), 1), float("-inf")), 0))
            at = space * numbers + chunk
            field_chunk_mean = ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32)
            tl.store(summary_chunk_mean + at * HEAD_DIM + d, field_chunk_mean.to(summary_chunk_mean.dtype.element_ty), mask=inside)
            field_chunk_radius = tl.sqrt(over_1_0)
            tl.store(summary_chunk_radius + at, field_chunk_radius.to(summary_chunk_radius.dtype.element_ty))
            tl.store(label_2 + at, 0)
            tl.store(open_2 + space, tl.minimum(tl.load(open_2 + space), chunk))
        tl.debug_barrier()
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
    header, fingerprints, strength, span, numbers, label_2, open_2, summary_chunk_mean, summary_chunk_radius, slots,
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
    space = (b * kv_heads + kv_head).to(tl.int64)
    unread = unread_slot(span + space * numbers, fresh)
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
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
    header, fingerprints, strength, span, numbers, label_2, open_2, summary_chunk_mean, summary_chunk_radius, slots,
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
                header, fingerprints, strength, span, numbers, label_2, open_2, summary_chunk_mean, summary_chunk_radius, positions, position_stride_b, position_stride_t, written,
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
        space = (b * kv_heads + kv_head).to(tl.int64)
        unread = unread_slot(span + space * numbers, fresh)
        first, begin, stop, end = always_read(
            tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, unread, length, TILES
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
