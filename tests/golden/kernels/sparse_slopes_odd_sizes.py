"""Decode attention: decode lychee f16 g3 d80 v64 b1024.

score(s) = 0.111803398874989*s + (kv - length - q)*slopes[h]
visible: length + q >= kv
"""

import triton
import triton.language as tl

POLICY = "lychee"  # the policy that selects keys; None: all visible keys are read
CAPTURED = ("length", "slopes")  # tensors that score and mask read, in the order of a call


GROUP = tl.constexpr(3)  # query heads that share a KV head
ROWS = tl.constexpr(16)
HEAD_DIM = tl.constexpr(80)
DIM = tl.constexpr(128)
VALUE_DIM = tl.constexpr(64)
WIDTH = tl.constexpr(64)
AUTOTUNE = False  # if True, the first call measures tile sizes


@triton.jit
def visible(b, h, q, kv, kv_len, inside, length, slopes, slopes_stride_0):
    """True for slots kv [1, N] that are `inside` and whose keys the heads h [ROWS, 1] see."""
    return inside & (tl.load(length) + q >= kv)


@triton.jit
def score(s, b, h, q, kv, inside, length, slopes, slopes_stride_0):
    """Return the scores, in bits, for products s [ROWS, N] of queries and keys."""
    return 0.16129820911147805 * s + 1.4426950408889634 * tl.load(slopes + h * slopes_stride_0) * (kv - tl.load(length) - q)


@triton.jit
def seen_range(b, q, kv_len, length, slopes, slopes_stride_0):
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
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length, slopes, slopes_stride_0,
):
    """Do one step of online softmax over the keys in the slots [N] that are `inside`."""
    seen = visible(b, heads[:, None], t, slot[None, :], kv_len, inside[None, :], length, slopes, slopes_stride_0)
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
    bits = score(s, b, heads[:, None], t, slot[None, :], inside[None, :], length, slopes, slopes_stride_0)
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
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length, slopes, slopes_stride_0,
    KEYS: tl.constexpr,
):
    """Attend to every splits-th run of KEYS keys; a run of hidden keys is not read."""
    first, end = seen_range(b, t, kv_len, length, slopes, slopes_stride_0)
    for start in range(first // KEYS * KEYS + split * KEYS, end, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = (slot >= first) & (slot < end)
        top, total, result = attend_to(
            slot, inside, queries, heads, top, total, result, b, t, kv_len,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length, slopes, slopes_stride_0,
        )
    return top, total, result


@triton.jit
def attend_all(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits, length, slopes, slopes_stride_0,
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
        key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length, slopes, slopes_stride_0,
        KEYS,
    )
    store_part(
        top, total, result, head_row, split, splits, partial, partial_top, partial_sum
    )


FLAT_TOKENS = 65536  # slots up to which every token is scanned; beyond, pages are ranked
BUDGET = tl.constexpr(1024)  # tokens read per KV head and query position
SINKS = tl.constexpr(16)  # first tokens, always read
RECENT = tl.constexpr(64)  # last tokens, always read
BINS = tl.constexpr(256)  # bins of a histogram of shares; the first is for what cannot be chosen
LAST_BIN = tl.constexpr(1112)  # a share of 2^12, in eighths of an octave


TILE = tl.constexpr(512)  # slots that a program of the scan takes
PAGE = tl.constexpr(16)  # slots summarised together
SAMPLED = tl.constexpr(32)  # keys that each KV head compares with fingerprints
NEWEST = tl.constexpr(8)  # those among them that are the newest
KEPT = tl.constexpr(40)  # coordinates of a sketch
KEPT_COLUMNS = tl.constexpr(64)
KEPT_FINE = tl.constexpr(20)  # coordinates of 4 bits
FINE_BYTES = tl.constexpr(12)
FINE_COLUMNS = tl.constexpr(16)
COARSE_BYTES = tl.constexpr(8)
COARSE_COLUMNS = tl.constexpr(16)
PAGE_STEP = tl.constexpr(0.75)  # step of a page's mean, in steps of a coordinate
WEIGHT_COLUMNS = tl.constexpr(64)  # weights of a head, one for each code in the bytes of a sketch
IN_REGISTERS = tl.constexpr(not triton.knobs.runtime.interpret)  # Triton's interpreter knows no PTX
IN_SHARED = tl.constexpr(not triton.knobs.runtime.interpret)  # bins are counted in shared memory
IN_WORDS = tl.constexpr(not triton.knobs.runtime.interpret)  # codes are multiplied four at a time


RANKS_PAGES = False  # True if pages of a long context are ranked first
SCALE = tl.constexpr(0.11180339887498948)  # factor of s in the score


HEADS = tl.constexpr(4)  # query heads of a group, up to a power of two


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
    positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
):
    """Return the first slot that this step has written and the query sees, else `fresh_from`."""
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    if written > 1:
        slot = written_slots(
            positions, position_stride_b, position_stride_t, written, b, kv_len, 2**30
        )
        inside = slot < kv_len
        seen = visible(b, kv_head * GROUP, t, slot, kv_len, inside, length, slopes, slopes_stride_0)
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
def no_counts():
    """Return counters of bins, all 0: their place in shared memory if IN_SHARED, else int32 [BINS].

    Triton's own histograms take many more instructions for each item.
    """
    if IN_SHARED:
        tl.static_assert(BINS <= 256)
        counters = tl.inline_asm_elementwise(
            "{ .shared .align 16 .b32 bin_counts[256]; mov.u32 $0, bin_counts; }", "=r", [],
            dtype=tl.int32, is_pure=False, pack=1,
        )
        tl.inline_asm_elementwise(
            "st.shared.b32 [$1], 0; mov.b32 $0, 0;", "=r,r", [counters + 4 * tl.arange(0, BINS)],
            dtype=tl.int32, is_pure=False, pack=1,
        )
        tl.debug_barrier()
    else:
        counters = tl.zeros([BINS], tl.int32)
    return counters


@triton.jit
def count_items(counters, entry):
    """Count the items in the bins `entry` [N], and return the counters.

    There must be no fewer items than threads: an item that several threads have counts for each.
    """
    if IN_SHARED:
        tl.inline_asm_elementwise(
            "red.shared.add.u32 [$1], 1; mov.b32 $0, 0;", "=r,r", [counters + 4 * entry],
            dtype=tl.int32, is_pure=False, pack=1,
        )
    else:
        counters += tl.histogram(entry, BINS)
    return counters


@triton.jit
def add_counts(histogram, counters):
    """Add the counts of all bins but the first to a histogram, and return them, int32 [BINS]."""
    place = tl.arange(0, BINS)
    if IN_SHARED:
        tl.debug_barrier()
        counters = tl.inline_asm_elementwise(
            "ld.shared.b32 $0, [$1];", "=r,r", [counters + 4 * place],
            dtype=tl.int32, is_pure=False, pack=1,
        )
    counts = tl.where(place > 0, counters, 0)
    tl.atomic_add(histogram + place, counts, mask=counts > 0, sem="relaxed")
    return counts


@triton.jit
def always_read(
    tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, slopes, slopes_stride_0, TILES: tl.constexpr
):
    """Return the bounds of the slots [first, sinks_end) and [recent_start, end), always read."""
    first, end = seen_range(b, t, kv_len, length, slopes, slopes_stride_0)
    sinks_end = tl.minimum(first + SINKS, end)
    recent_start = tl.maximum(tl.minimum(end - RECENT, fresh), sinks_end)
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


@triton.jit
def query_weights(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    axes, centre, step, spread, weights, scales, constants, page_constants, totals, histogram, arrivals,
    positions, position_stride_b, position_stride_t, written, header,
    kv_len, blocks, kv_heads: tl.constexpr, query_len, length, slopes, slopes_stride_0,
    BLOCK: tl.constexpr, PAGED: tl.constexpr, EARLY: tl.constexpr,
):
    """Store the weights of a block's codes in q.k, and the rest of q.k, which no code changes.

    By second-order cumulants the log of the mean of exp(score) over keys of variance v is the score
    of their mean plus scale / 2 sum w^2 v. Over a whole block it gives the block's part of the
    softmax's denominator. Counters of later kernels are cleared here.
    """
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    block = (b * kv_heads + kv_head).to(tl.int64) * blocks + tile
    place, d, g = tl.arange(0, WEIGHT_COLUMNS), tl.arange(0, DIM), tl.arange(0, ROWS)
    kept = tl.where(place < 2 * FINE_BYTES, place, place - (2 * FINE_BYTES - KEPT_FINE))
    real = (kept < KEPT) & ((place < KEPT_FINE) | (place >= 2 * FINE_BYTES))
    axis = tl.load(
        axes + (block * KEPT + kept)[None, :] * HEAD_DIM + d[:, None],
        mask=real[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
    )
    steps = tl.load(step + block * KEPT + kept, mask=real, other=0.0)
    middle = tl.load(centre + block * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    # The loads above are of old data; those below may be of data that the kernel before writes.
    # The kernels after this one read it too: they must not begin while that kernel still runs.
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    exact = tl.dot(queries, axis.to(queries.dtype)) * steps[None, :]
    most = tl.maximum(tl.max(tl.abs(exact), 1), 1e-30)
    weight = tl.floor(exact * (127 / most)[:, None] + 0.5)
    rounded = weight * (most / 127)[:, None]
    constant = tl.sum(queries.to(tl.float32) * middle[None, :], 1)
    moved = tl.where(place < KEPT_FINE, 8.9000, 1.0087)
    of_block = constant + 0.5 * SCALE * tl.sum(exact * exact * moved[None, :], 1)
    zero = tl.where(place < KEPT_FINE, 7.5, 1.5)
    constant -= tl.sum(rounded * zero[None, :], 1)
    mine = head_row.to(tl.int64) * blocks + tile
    tl.store(weights + (mine * ROWS + g[:, None]) * WEIGHT_COLUMNS + place[None, :], weight.to(tl.int8))
    tl.store(scales + mine * ROWS + g, most / 127)
    tl.store(constants + mine * ROWS + g, constant)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
    )
    held = tl.minimum(fresh - tile * BLOCK, BLOCK)
    probe = tl.maximum((1 + tl.arange(0, 16)) * held // 16 - 1, 0)
    slot = tile * BLOCK + probe[None, :]
    seen = visible(b, heads[:, None], t, slot, kv_len, slot < kv_len, length, slopes, slopes_stride_0)
    bits = score(of_block[:, None], b, heads[:, None], t, slot, slot < kv_len, length, slopes, slopes_stride_0)
    bits = tl.where(seen, bits, -1e30)
    most = tl.max(bits, 1)
    whole = most + tl.log2(tl.sum(tl.exp2(bits - most[:, None]), 1) / 16)
    whole += tl.log2(tl.maximum(held, 1).to(tl.float32))
    tl.store(totals + mine * ROWS + g, tl.where(held > 0, whole, -1e30))
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32))


@triton.jit
def words_of(plane):
    """Return a pointer to bytes as one to words of four bytes."""
    return plane.to(tl.pointer_type(tl.int32))


@triton.jit
def dot4(codes, weights, total):
    """Return `total` plus the products of four codes and their weights: int32, of any shape.

    Codes are the bytes of a word without sign, weights those of a word with a sign.
    """
    if IN_REGISTERS:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, weights, total],
            dtype=tl.int32, is_pure=True, pack=1,
        )
    else:
        for byte in tl.static_range(4):
            total += ((codes >> (8 * byte)) & 255) * ((weights << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def load_bytes(plane, number, inside, BYTES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the bytes, uint8 [N, COLUMNS], of the tokens or pages `number` [N] in a plane."""
    byte = tl.arange(0, COLUMNS)[None, :]
    there = inside[:, None] & (byte < BYTES)
    return tl.load(plane + number[:, None] * BYTES + byte, mask=there, other=0)


@triton.jit
def load_weights(weights, FIRST: tl.constexpr, BYTES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the weights of a head from FIRST on, int32 [1 or N, COLUMNS]; 0 for padding."""
    byte = tl.arange(0, COLUMNS)[None, :]
    return tl.load(weights + FIRST + byte, mask=byte < BYTES, other=0).to(tl.int32)


@triton.jit
def load_sketches(fine, coarse, number, inside):
    """Return packed codes as a tuple: of words, int32 [N], or of planes, uint8 [N, columns]."""
    if IN_WORDS:
        fine_0 = tl.load(words_of(fine) + number * 3 + 0, mask=inside, other=0)
        fine_1 = tl.load(words_of(fine) + number * 3 + 1, mask=inside, other=0)
        fine_2 = tl.load(words_of(fine) + number * 3 + 2, mask=inside, other=0)
        coarse = tl.load(
            words_of(coarse) + number[:, None] * 2 + tl.arange(0, 2)[None, :],
            mask=inside[:, None], other=0,
        )
        coarse_0, coarse_1 = tl.split(coarse)
        packed = (fine_0, fine_1, fine_2, coarse_0, coarse_1)
    else:
        packed = (
            load_bytes(fine, number, inside, FINE_BYTES, FINE_COLUMNS),
            load_bytes(coarse, number, inside, COARSE_BYTES, COARSE_COLUMNS),
        )
    return packed


@triton.jit
def token_codes(packed):
    """Return codes as a tuple: four in the bytes of a word, int32 [N], or one, int32 [N, columns]."""
    if IN_WORDS:
        fine_0, fine_1, fine_2, coarse_0, coarse_1 = packed
        unpacked = (
            fine_0 & 0x0f0f0f0f,
            fine_1 & 0x0f0f0f0f,
            fine_2 & 0x0f0f0f0f,
            (fine_0 >> 4) & 0x0f0f0f0f,
            (fine_1 >> 4) & 0x0f0f0f0f,
            (fine_2 >> 4) & 0x0f0f0f0f,
            coarse_0 & 0x03030303,
            coarse_1 & 0x03030303,
            (coarse_0 >> 2) & 0x03030303,
            (coarse_1 >> 2) & 0x03030303,
            (coarse_0 >> 4) & 0x03030303,
            (coarse_1 >> 4) & 0x03030303,
        )
    else:
        fine, coarse = packed
        unpacked = (
            ((fine >> 0) & 15).to(tl.int32),
            ((fine >> 4) & 15).to(tl.int32),
            ((coarse >> 0) & 3).to(tl.int32),
            ((coarse >> 2) & 3).to(tl.int32),
            ((coarse >> 4) & 3).to(tl.int32),
        )
    return unpacked


TOKEN_PAIR = tl.constexpr("""
{
.reg .b32 lane, column, other, weight<12>, code<4>, sum<4>;
.reg .b64 place;
.reg .pred own;
mov.u32 lane, %laneid;
shr.u32 column, lane, 2;
shr.u32 other, lane, 3;
xor.b32 other, other, lane;
and.b32 other, other, 3;
setp.eq.u32 own, other, 0;
and.b32 column, column, 1;
mad.wide.u32 place, column, 64, $28;
mov.b32 weight0, 0;
mov.b32 weight1, 0;
mov.b32 weight2, 0;
mov.b32 weight3, 0;
mov.b32 weight4, 0;
mov.b32 weight5, 0;
mov.b32 weight6, 0;
mov.b32 weight7, 0;
mov.b32 weight8, 0;
mov.b32 weight9, 0;
mov.b32 weight10, 0;
mov.b32 weight11, 0;
@own ld.global.v4.b32 {weight0, weight1, weight2, weight3}, [place+0];
@own ld.global.v4.b32 {weight4, weight5, weight6, weight7}, [place+16];
@own ld.global.v4.b32 {weight8, weight9, weight10, weight11}, [place+32];
mov.b32 sum0, 0;
mov.b32 sum1, 0;
mov.b32 sum2, 0;
mov.b32 sum3, 0;
and.b32 code0, $8, 0x0f0f0f0f;
and.b32 code1, $9, 0x0f0f0f0f;
and.b32 code2, $12, 0x0f0f0f0f;
and.b32 code3, $13, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight0, weight1}, {sum0, sum1, sum2, sum3};
and.b32 code0, $16, 0x0f0f0f0f;
and.b32 code1, $17, 0x0f0f0f0f;
shr.u32 code2, $8, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $9, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight2, weight3}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $12, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $13, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $16, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $17, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight4, weight5}, {sum0, sum1, sum2, sum3};
and.b32 code0, $20, 0x03030303;
and.b32 code1, $21, 0x03030303;
and.b32 code2, $24, 0x03030303;
and.b32 code3, $25, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight6, weight7}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $20, 2;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $21, 2;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $24, 2;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $25, 2;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight8, weight9}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $20, 4;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $21, 4;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $24, 4;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $25, 4;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight10, weight11}, {sum0, sum1, sum2, sum3};
mov.b32 $0, sum0;
mov.b32 $4, sum1;
mov.b32 $1, sum2;
mov.b32 $5, sum3;
mov.b32 sum0, 0;
mov.b32 sum1, 0;
mov.b32 sum2, 0;
mov.b32 sum3, 0;
and.b32 code0, $10, 0x0f0f0f0f;
and.b32 code1, $11, 0x0f0f0f0f;
and.b32 code2, $14, 0x0f0f0f0f;
and.b32 code3, $15, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight0, weight1}, {sum0, sum1, sum2, sum3};
and.b32 code0, $18, 0x0f0f0f0f;
and.b32 code1, $19, 0x0f0f0f0f;
shr.u32 code2, $10, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $11, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight2, weight3}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $14, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $15, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $18, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $19, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight4, weight5}, {sum0, sum1, sum2, sum3};
and.b32 code0, $22, 0x03030303;
and.b32 code1, $23, 0x03030303;
and.b32 code2, $26, 0x03030303;
and.b32 code3, $27, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight6, weight7}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $22, 2;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $23, 2;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $26, 2;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $27, 2;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight8, weight9}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $22, 4;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $23, 4;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $26, 4;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $27, 4;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight10, weight11}, {sum0, sum1, sum2, sum3};
mov.b32 $2, sum0;
mov.b32 $6, sum1;
mov.b32 $3, sum2;
mov.b32 $7, sum3;
}
""")


@triton.jit
def token_pair(packed, own, PAIR: tl.constexpr):
    """Return the products, int32 [N], of codes and the weights of two heads."""
    place = own[0] + (own[1] * ROWS + 2 * PAIR) * WEIGHT_COLUMNS
    return tl.inline_asm_elementwise(
        TOKEN_PAIR, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,l,l,l,l",
        [packed[0], packed[1], packed[2], packed[3], packed[4], place.to(tl.int64)],
        dtype=(tl.int32, tl.int32), is_pure=False, pack=4,
    )


@triton.jit
def token_weights(weights, scales, constants, mine):
    """Return what products take of the block `mine`."""
    scales, constants = scales + mine * ROWS, constants + mine * ROWS
    return (
        weights,
        mine,
        tl.load(scales + 0),
        tl.load(constants + 0),
        tl.load(scales + 1),
        tl.load(constants + 1),
        tl.load(scales + 2),
        tl.load(constants + 2),
    )


@triton.jit
def token_products(packed, own):
    """Return the products of all heads, int32 [N] each, or the codes that `token_product` multiplies."""
    if IN_REGISTERS:
        product_0, product_1 = token_pair(packed, own, 0)
        product_2, product_3 = token_pair(packed, own, 1)
        products = (product_0, product_1, product_2)
    else:
        products = token_codes(packed)
    return products


@triton.jit
def token_product(products, own, HEAD: tl.constexpr):
    """Return q.k [N] of one head, its constant included."""
    weights, mine = own[0], own[1]
    scale, constant = own[2 + 2 * HEAD], own[3 + 2 * HEAD]
    weights += (mine * ROWS + HEAD) * WEIGHT_COLUMNS
    if IN_REGISTERS:
        product = products[HEAD]
    elif IN_WORDS:
        product = tl.zeros_like(products[0])
        product = dot4(products[0], tl.load(words_of(weights) + 0), product)
        product = dot4(products[1], tl.load(words_of(weights) + 1), product)
        product = dot4(products[2], tl.load(words_of(weights) + 2), product)
        product = dot4(products[3], tl.load(words_of(weights) + 3), product)
        product = dot4(products[4], tl.load(words_of(weights) + 4), product)
        product = dot4(products[5], tl.load(words_of(weights) + 5), product)
        product = dot4(products[6], tl.load(words_of(weights) + 6), product)
        product = dot4(products[7], tl.load(words_of(weights) + 7), product)
        product = dot4(products[8], tl.load(words_of(weights) + 8), product)
        product = dot4(products[9], tl.load(words_of(weights) + 9), product)
        product = dot4(products[10], tl.load(words_of(weights) + 10), product)
        product = dot4(products[11], tl.load(words_of(weights) + 11), product)
    else:
        product = tl.zeros([products[0].shape[0]], tl.int32)
        weight = load_weights(weights, 0, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[0] * weight, 1)
        weight = load_weights(weights, 12, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[1] * weight, 1)
        weight = load_weights(weights, 24, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[2] * weight, 1)
        weight = load_weights(weights, 32, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[3] * weight, 1)
        weight = load_weights(weights, 40, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[4] * weight, 1)
    return product.to(tl.float32) * scale + constant


@triton.jit
def token_shares(
    packed, slot, inside, known, own, total, b, kv_head, t, kv_len, length, slopes, slopes_stride_0,
):
    """Return the sum over heads of each share, float32 [N], and which slots any head sees, bool [N]."""
    g = tl.arange(0, ROWS)
    products = token_products(packed, own)
    share = tl.zeros([slot.shape[0]], tl.float32)
    seen = visible(b, kv_head * GROUP, t, slot, kv_len, inside, length, slopes, slopes_stride_0)
    known &= seen
    for head in tl.static_range(GROUP):
        h = kv_head * GROUP + head
        bits = score(token_product(products, own, head), b, h, t, slot, inside, length, slopes, slopes_stride_0)
        bits = tl.where(known, bits, float("-inf"))
        part = tl.exp2(bits - tl.sum(tl.where(g == head, total, 0.0), 0))
        share += part
    return share, seen


@triton.jit
def store_bins(
    packed, slot, own, total, bins, first, end, fresh, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
):
    """Store the bins of the shares of a tile's tokens, and return them."""
    inside = slot < kv_len
    known = (slot >= first + SINKS) & (slot < tl.minimum(end - RECENT, fresh))
    share, seen = token_shares(
        packed, slot, inside, known, own, total, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
    )
    entry = bins_of_shares(share, share > 0)
    tl.store(bins + slot, entry.to(tl.uint8))
    return entry


@triton.jit
def scan_tokens(
    fine, coarse, key, key_stride_b, key_stride_h, key_stride_l, key_stride_d, fingerprints,
    weights, scales, constants, totals,
    positions, position_stride_b, position_stride_t, written, header,
    tile_first, tile_end, bins, histogram,
    kv_len, slots, blocks, kv_heads: tl.constexpr, query_len, tiles, length, slopes, slopes_stride_0,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of STEPS tiles of tokens, estimated from their sketches.

    One more program looks if the index is stale.
    """
    head_row, part = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if part == (tiles + STEPS - 1) // STEPS:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        fresh = fresh_seen(
            positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
        )
        if (t == 0) | (fresh > fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)):
            check_sample(
                key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
                header, fingerprints, positions, position_stride_b, position_stride_t, written, fresh,
                b, kv_head, slots, kv_heads, kv_len,
            )
        return
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    span: tl.constexpr = STEPS * TILE
    first, end = seen_range(b, t, kv_len, length, slopes, slopes_stride_0)
    low = tl.maximum(first - part * span, 0) // TILE
    high = tl.minimum(tl.maximum(end - part * span + TILE - 1, 0) // TILE, STEPS)
    if low < high:
        space = (b * kv_heads + kv_head).to(tl.int64) * slots
        fine += space * FINE_BYTES
        coarse += space * COARSE_BYTES
        slot = part * span + low * TILE + tl.arange(0, TILE)
        packed = load_sketches(fine, coarse, slot, slot < kv_len)
        fresh = fresh_seen(
            positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
        )
        counters = no_counts()
        if EARLY:
            tl.extra.cuda.gdc_wait()
        total = denominators(totals, head_row, blocks, BLOCKS)
        own = token_weights(
            weights, scales, constants, head_row.to(tl.int64) * blocks + part * span // BLOCK
        )
        bins += head_row.to(tl.int64) * slots
        histogram += head_row * (2 * BINS)
        if STEPS == 1:
            counters = count_items(counters, store_bins(packed, slot, own, total, bins, first, end, fresh, b, kv_head, t, kv_len, length, slopes, slopes_stride_0))
        else:
            stop = tl.minimum(kv_len, part * span + high * TILE)
            for step in range(low, high):
                # The next tile is on its way while this one is scored.
                after = slot + TILE
                following = load_sketches(fine, coarse, after, after < stop)
                counters = count_items(counters, store_bins(packed, slot, own, total, bins, first, end, fresh, b, kv_head, t, kv_len, length, slopes, slopes_stride_0))
                packed, slot = following, after
        add_counts(histogram, counters)


SHORTEST = tl.constexpr(8)  # slots of the shortest chunk
LONGEST = tl.constexpr(16)  # slots of the longest chunk
LOOK = tl.constexpr(4)  # numbers of chunks among which the last one of a row is
MEMBERS = tl.constexpr(16)  # LONGEST, up to a power of two


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
def index_chunks(
    key, stride_b, stride_h, stride_l, stride_d,
    strength, span, numbers, label_2, open_2, summary_chunk_mean, summary_chunk_variance, summary_chunk_radius, positions, position_stride_b, position_stride_t, written, slots, kv_heads, kv_len,
):
    """Rate the boundaries before the keys of this step, and summarise the chunks that they close."""
    b, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
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
            over_1_0 = tl.full([DIM], 0.0, tl.float32)
            over_1_1 = tl.full([], float("-inf"), tl.float32)
            for low in range(0, LONGEST, 16):
                place = (open_slot + low + tl.arange(0, 16)).to(tl.int64)
                member = low + tl.arange(0, 16) < length
                keys = tl.load(
                    key + place[:, None] * stride_l + d[None, :] * stride_d, mask=member[:, None] & inside[None, :], other=0.0
                ).to(tl.float32)
                over_1_0 = over_1_0 + tl.sum(tl.where(member[:, None], (((-1.0 * ((over_0_0 / 1) / length).to(tl.float16).to(tl.float32))[None, :] + keys) * ((-1.0 * ((over_0_0 / 1) / length).to(tl.float16).to(tl.float32))[None, :] + keys)), 0.0), 0)
                over_1_1 = tl.maximum(over_1_1, tl.max(tl.where(member, tl.sum(tl.where(inside[None, :], (((-1.0 * ((over_0_0 / 1) / length).to(tl.float16).to(tl.float32))[None, :] + keys) * ((-1.0 * ((over_0_0 / 1) / length).to(tl.float16).to(tl.float32))[None, :] + keys)), 0.0), 1), float("-inf")), 0))
            at = space * numbers + chunk
            field_chunk_mean = ((over_0_0 / 1) / length).to(tl.float16).to(tl.float32)
            tl.store(summary_chunk_mean + at * HEAD_DIM + d, field_chunk_mean.to(summary_chunk_mean.dtype.element_ty), mask=inside)
            field_chunk_variance = ((over_1_0 / 1) / length).to(tl.float16).to(tl.float32)
            tl.store(summary_chunk_variance + at * HEAD_DIM + d, field_chunk_variance.to(summary_chunk_variance.dtype.element_ty), mask=inside)
            field_chunk_radius = tl.sqrt(over_1_1)
            tl.store(summary_chunk_radius + at, field_chunk_radius.to(summary_chunk_radius.dtype.element_ty))
            tl.store(label_2 + at, 0)
            tl.store(open_2 + space, tl.minimum(tl.load(open_2 + space), chunk))
        tl.debug_barrier()


@triton.jit
def field_codes(
    centred, axes, step,
    FIRST: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):
    """Return the codes, int32 [N, COLUMNS], of the coordinates from FIRST on."""
    column, d = tl.arange(0, COLUMNS), tl.arange(0, DIM)
    inside = (column < WIDE)[None, :] & (d < HEAD_DIM)[:, None]
    axis = tl.load(axes + (FIRST + column)[None, :] * HEAD_DIM + d[:, None], mask=inside, other=0.0)
    steps = tl.load(step + FIRST + column, mask=column < WIDE, other=0.0)[None, :]
    level = tl.dot(centred.to(axis.dtype), axis) / tl.maximum(steps, 1e-30)
    level = tl.where((steps > 0) & (level == level), level, 0.0)  # a NaN counts as 0
    code = tl.floor(tl.minimum(tl.maximum(level, -1.0 * (LEVELS // 2)), 1.0 * LEVELS)) + LEVELS // 2
    code = tl.minimum(code, LEVELS - 1).to(tl.int32)
    return tl.where((column < WIDE)[None, :], code, 0)


@triton.jit
def encode_keys(keys, axes, centre, step):
    """Return packed codes, uint8 [N, FINE_COLUMNS] and [N, COARSE_COLUMNS], of keys [N, DIM]."""
    d = tl.arange(0, DIM)
    middle = tl.load(centre + d, mask=d < HEAD_DIM, other=0.0)
    centred = keys - middle[None, :]
    fine = field_codes(centred, axes, step, 0, 12, FINE_COLUMNS, 16)
    fine |= field_codes(centred, axes, step, 12, 8, FINE_COLUMNS, 16) << 4
    coarse = field_codes(centred, axes, step, 20, 8, COARSE_COLUMNS, 4)
    coarse |= field_codes(centred, axes, step, 28, 8, COARSE_COLUMNS, 4) << 2
    coarse |= field_codes(centred, axes, step, 36, 4, COARSE_COLUMNS, 4) << 4
    return fine.to(tl.uint8), coarse.to(tl.uint8)


@triton.jit
def page_code(mean):
    """Return the 4-bit code, int32, of a page's mean code, float32."""
    code = tl.floor((mean - 7.5) / PAGE_STEP + 8.0)
    return tl.minimum(tl.maximum(code, 0.0), 15.0).to(tl.int32)


@triton.jit(do_not_specialize=["begin", "end"])
def encode(
    key, stride_b, stride_h, stride_l, stride_d,
    fingerprints, fine, coarse, pages, axes, centre, step,
    begin, end, slots, kv_heads, blocks, BLOCK: tl.constexpr,
):
    """Sketch the keys in the slots [begin, end), 64 a program; begin is a multiple of 64."""
    space = tl.program_id(0)
    slot = begin + tl.program_id(1) * 64 + tl.arange(0, 64)
    b, kv_head = space // kv_heads, space % kv_heads
    d = tl.arange(0, DIM)
    place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    place = place + slot.to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
    inside = (slot < end)[:, None]
    keys = tl.load(place, mask=inside & (d < HEAD_DIM)[None, :], other=0.0)
    mark = fingerprint(keys)
    keys = keys.to(tl.float32)
    block = space.to(tl.int64) * blocks + (begin + tl.program_id(1) * 64) // BLOCK
    axes, centre = axes + block * KEPT * HEAD_DIM, centre + block * HEAD_DIM
    packed, packed_coarse = encode_keys(keys, axes, centre, step + block * KEPT)
    space = space.to(tl.int64) * slots
    tl.store(fingerprints + space + slot, mark, mask=slot < end)
    byte, column = tl.arange(0, FINE_COLUMNS), tl.arange(0, COARSE_COLUMNS)
    tl.store(
        fine + (space + slot)[:, None] * FINE_BYTES + byte[None, :],
        packed, mask=inside & (byte < FINE_BYTES)[None, :],
    )
    tl.store(
        coarse + (space + slot)[:, None] * COARSE_BYTES + column[None, :],
        packed_coarse, mask=inside & (column < COARSE_BYTES)[None, :],
    )
    held = tl.sum(tl.reshape((slot < end).to(tl.float32), [64 // PAGE, PAGE]), 1)
    number = tl.maximum(held, 1.0)[:, None]
    each = tl.reshape(tl.where(inside, packed, 0), [64 // PAGE, PAGE, FINE_COLUMNS]).to(tl.int32)
    low = page_code(tl.sum(each & 15, 1).to(tl.float32) / number)
    high = page_code(tl.sum(each >> 4, 1).to(tl.float32) / number)
    page = (begin + tl.program_id(1) * 64) // PAGE + tl.arange(0, 64 // PAGE)
    tl.store(
        pages + (space // PAGE + page)[:, None] * FINE_BYTES + byte[None, :],
        (low | (high << 4)).to(tl.uint8),
        mask=(held > 0)[:, None] & (byte < FINE_BYTES)[None, :],
    )


@triton.jit
def encode_new(
    key, stride_b, stride_h, stride_l, stride_d,
    header, fingerprints, fine, coarse, pages, axes, centre, step, spread,
    positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, blocks, BLOCK: tl.constexpr, kv_len,
):
    """Sketch the keys that this step has written, and sum up their pages anew.

    A block that begins takes over the axes of the block before it.
    """
    space = (b * kv_heads + kv_head).to(tl.int64)
    kept, d, row = tl.arange(0, KEPT_COLUMNS), tl.arange(0, DIM), tl.arange(0, PAGE)
    byte, column = tl.arange(0, FINE_COLUMNS), tl.arange(0, COARSE_COLUMNS)
    is_fine = kept < KEPT_FINE
    number_coarse = kept - KEPT_FINE
    whole = (kept < KEPT)[:, None] & (d < HEAD_DIM)[None, :]
    for number in range(written):
        slot = tl.load(positions + b * position_stride_b + number * position_stride_t).to(tl.int32)
        slot = tl.where(slot < 0, slot + kv_len, slot)
        block = space * blocks + slot // BLOCK
        source = tl.where((slot % BLOCK == 0) & (slot > 0), block - 1, block)
        place = key + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
        place += slot.to(tl.int64) * stride_l
        newest = tl.load(place + d * stride_d, mask=d < HEAD_DIM, other=0.0)
        mark = tl.sum(fingerprint(newest[None, :]), 0)
        newest = newest.to(tl.float32)
        middle = tl.load(centre + source * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        matrix = source * (KEPT * HEAD_DIM) + kept[:, None] * HEAD_DIM + d[None, :]
        axis = tl.load(axes + matrix, mask=whole, other=0.0)
        steps = tl.load(step + source * KEPT + kept, mask=kept < KEPT, other=0.0)
        page = slot // PAGE
        older = tl.load(
            fine + (space * slots + page * PAGE + row)[:, None] * FINE_BYTES + byte[None, :],
            mask=(page * PAGE + row < slot)[:, None] & (byte < FINE_BYTES)[None, :], other=0,
        ).to(tl.int32)
        if source != block:
            spreads = tl.load(spread + source * KEPT_FINE + kept, mask=is_fine, other=0.0)
            moved = (block - source) * (KEPT * HEAD_DIM)
            tl.store(axes + matrix + moved, axis, mask=whole)
            tl.store(centre + block * HEAD_DIM + d, middle, mask=d < HEAD_DIM)
            tl.store(step + block * KEPT + kept, steps, mask=kept < KEPT)
            tl.store(spread + block * KEPT_FINE + kept, spreads, mask=is_fine)
        level = tl.sum((newest - middle)[None, :] * axis.to(tl.float32), 1)
        level = level / tl.maximum(steps, 1e-30)
        level = tl.where((steps > 0) & (level == level), level, 0.0)  # a NaN counts as 0
        half = tl.where(is_fine, 8.0, 2.0)
        code = tl.floor(tl.minimum(tl.maximum(level, -half), half)) + half
        code = tl.minimum(code, 2 * half - 1).to(tl.int32)
        into = (kept % FINE_BYTES)[:, None] == byte[None, :]
        moved_code = code << (kept // FINE_BYTES * 4)
        packed = tl.sum(tl.where(into & is_fine[:, None], moved_code[:, None], 0), 0)
        into = (number_coarse % COARSE_BYTES)[:, None] == column[None, :]
        into = into & ((kept >= KEPT_FINE) & (kept < KEPT))[:, None]
        moved_code = code << (tl.maximum(number_coarse, 0) // COARSE_BYTES * 2)
        packed_coarse = tl.sum(tl.where(into, moved_code[:, None], 0), 0)
        at = space * slots + slot
        tl.store(fingerprints + at, mark)
        tl.store(fine + at * FINE_BYTES + byte, packed.to(tl.uint8), mask=byte < FINE_BYTES)
        tl.store(
            coarse + at * COARSE_BYTES + column, packed_coarse.to(tl.uint8),
            mask=column < COARSE_BYTES,
        )
        count = (slot % PAGE + 1).to(tl.float32)
        low = page_code((tl.sum(older & 15, 0) + (packed & 15)).to(tl.float32) / count)
        high = page_code((tl.sum(older >> 4, 0) + (packed >> 4)).to(tl.float32) / count)
        tl.store(
            pages + (space * (slots // PAGE) + page) * FINE_BYTES + byte,
            (low | (high << 4)).to(tl.uint8), mask=byte < FINE_BYTES,
        )
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
    header, fingerprints, fine, coarse, pages, axes, centre, step, spread, slots, blocks, BLOCK: tl.constexpr,
    tile_first, tile_end, tiles, positions, position_stride_b, position_stride_t, written,
    histogram, bins, bin_room, candidates, candidate_count, chosen_list, list_count, capacity, length, slopes, slopes_stride_0,
    KEYS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, PAGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """List the selected keys. Every program finds the threshold itself, and the tokens above it."""
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
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
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, slopes, slopes_stride_0, TILES
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
    header, fingerprints, fine, coarse, pages, axes, centre, step, spread, slots, blocks, BLOCK: tl.constexpr,
    tile_first, tile_end, tiles, positions, position_stride_b, position_stride_t, written,
    histogram, bins, bin_room, candidates, candidate_count, chosen_list, list_count, capacity, length, slopes, slopes_stride_0,
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
            encode_new(
                key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
                header, fingerprints, fine, coarse, pages, axes, centre, step, spread,
                positions, position_stride_b, position_stride_t, written,
                b, kv_head, slots, kv_heads, blocks, BLOCK, kv_len,
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
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length, slopes, slopes_stride_0
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
            tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, slopes, slopes_stride_0, TILES
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
                key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length, slopes, slopes_stride_0,
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
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d, length, slopes, slopes_stride_0,
            KEYS,
        )
    store_part(
        top, total, result, head_row, split, splits, partial, partial_top, partial_sum
    )
