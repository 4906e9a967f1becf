"""Decode attention: decode lychee bf16 g4 d128 b1024.

score(s) = 0.0883883476483184*s
visible: length + q >= kv
"""

import triton
import triton.language as tl

POLICY = "lychee"  # the policy that selects keys; None: all visible keys are read
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


FLAT_TOKENS = 65536  # slots up to which every token is scanned; beyond, pages are ranked
BUDGET = tl.constexpr(1024)  # tokens read per KV head and query position
SINKS = tl.constexpr(16)  # first tokens, always read
RECENT = tl.constexpr(64)  # last tokens, always read
PAGE_ROOM = tl.constexpr(1024)  # pages whose tokens are scored
FLAT_PAGES = tl.constexpr(4096)  # pages seen by a query up to which the tokens of all are scored
TURN = tl.constexpr(32)  # pages of one block whose tokens are scored at a time
BINS = tl.constexpr(256)  # bins of a histogram of shares; the first is for what cannot be chosen
LAST_BIN = tl.constexpr(1112)  # a share of 2^12, in eighths of an octave


TILE = tl.constexpr(512)  # slots that a program of the scan takes
PAGE = tl.constexpr(16)  # slots summarised together
SAMPLED = tl.constexpr(32)  # keys that each KV head compares with fingerprints
NEWEST = tl.constexpr(8)  # those among them that are the newest
KEPT = tl.constexpr(64)  # coordinates of a sketch
KEPT_COLUMNS = tl.constexpr(64)
KEPT_FINE = tl.constexpr(32)  # coordinates of 4 bits
FINE_BYTES = tl.constexpr(16)
FINE_COLUMNS = tl.constexpr(16)
COARSE_BYTES = tl.constexpr(8)
COARSE_COLUMNS = tl.constexpr(16)
PAGE_STEP = tl.constexpr(0.75)  # step of a page's mean, in steps of a coordinate
PAGE_ZERO = tl.constexpr(5.625)  # zero of a page's codes, in steps of a coordinate
WEIGHT_COLUMNS = tl.constexpr(64)  # weights of a head, one for each code in the bytes of a sketch
IN_REGISTERS = tl.constexpr(not triton.knobs.runtime.interpret)  # Triton's interpreter knows no PTX
IN_SHARED = tl.constexpr(not triton.knobs.runtime.interpret)  # bins are counted in shared memory
IN_WORDS = tl.constexpr(not triton.knobs.runtime.interpret)  # codes are multiplied four at a time


RANKS_PAGES = True  # True if pages of a long context are ranked first
SCALE = tl.constexpr(0.08838834764831843)  # factor of s in the score


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
    tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES: tl.constexpr
):
    """Return the bounds of the slots [first, sinks_end) and [recent_start, end), always read."""
    first, end = seen_range(b, t, kv_len, length)
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
    kv_len, blocks, kv_heads: tl.constexpr, query_len, length,
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
    variance = tl.zeros([WEIGHT_COLUMNS], tl.float32)
    if PAGED:
        variance = tl.load(spread + block * KEPT_FINE + place, mask=place < KEPT_FINE, other=0.0)
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
    if PAGED:
        # The same cumulants for a page whose variance is the usual one.
        zero = PAGE_ZERO * tl.sum(tl.where((place < KEPT_FINE)[None, :], rounded, 0.0), 1)
        of_page = constant + 0.5 * SCALE * tl.sum(exact * exact * variance[None, :], 1) - zero
        tl.store(page_constants + (head_row.to(tl.int64) * blocks + tile) * ROWS + g, of_page)
    moved = tl.where(place < KEPT_FINE, 8.9000, 1.0087)
    of_block = constant + 0.5 * SCALE * tl.sum(exact * exact * moved[None, :], 1)
    zero = tl.where(place < KEPT_FINE, 7.5, 1.5)
    constant -= tl.sum(rounded * zero[None, :], 1)
    mine = head_row.to(tl.int64) * blocks + tile
    tl.store(weights + (mine * ROWS + g[:, None]) * WEIGHT_COLUMNS + place[None, :], weight.to(tl.int8))
    tl.store(scales + mine * ROWS + g, most / 127)
    tl.store(constants + mine * ROWS + g, constant)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    held = tl.minimum(fresh - tile * BLOCK, BLOCK)
    first = (tile * BLOCK + tl.zeros([1, 1], tl.int32))
    bits = score(of_block[:, None], b, heads[:, None], t, first, first < kv_len, length)
    whole = tl.max(bits, 1)
    whole += tl.log2(tl.maximum(held, 1).to(tl.float32))
    tl.store(totals + mine * ROWS + g, tl.where(held > 0, whole, -1e30))
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32))
        if PAGED:
            tl.store(arrivals + head_row, 0)


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
        fine = tl.load(
            words_of(fine) + number[:, None] * 4 + tl.arange(0, 4)[None, :],
            mask=inside[:, None], other=0,
        )
        fine_even, fine_odd = tl.split(tl.reshape(fine, [number.shape[0], 2, 2]))
        fine_0, fine_2 = tl.split(fine_even)
        fine_1, fine_3 = tl.split(fine_odd)
        coarse = tl.load(
            words_of(coarse) + number[:, None] * 2 + tl.arange(0, 2)[None, :],
            mask=inside[:, None], other=0,
        )
        coarse_0, coarse_1 = tl.split(coarse)
        packed = (fine_0, fine_1, fine_2, fine_3, coarse_0, coarse_1)
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
        fine_0, fine_1, fine_2, fine_3, coarse_0, coarse_1 = packed
        unpacked = (
            fine_0 & 0x0f0f0f0f,
            fine_1 & 0x0f0f0f0f,
            fine_2 & 0x0f0f0f0f,
            fine_3 & 0x0f0f0f0f,
            (fine_0 >> 4) & 0x0f0f0f0f,
            (fine_1 >> 4) & 0x0f0f0f0f,
            (fine_2 >> 4) & 0x0f0f0f0f,
            (fine_3 >> 4) & 0x0f0f0f0f,
            coarse_0 & 0x03030303,
            coarse_1 & 0x03030303,
            (coarse_0 >> 2) & 0x03030303,
            (coarse_1 >> 2) & 0x03030303,
            (coarse_0 >> 4) & 0x03030303,
            (coarse_1 >> 4) & 0x03030303,
            (coarse_0 >> 6) & 0x03030303,
            (coarse_1 >> 6) & 0x03030303,
        )
    else:
        fine, coarse = packed
        unpacked = (
            ((fine >> 0) & 15).to(tl.int32),
            ((fine >> 4) & 15).to(tl.int32),
            ((coarse >> 0) & 3).to(tl.int32),
            ((coarse >> 2) & 3).to(tl.int32),
            ((coarse >> 4) & 3).to(tl.int32),
            ((coarse >> 6) & 3).to(tl.int32),
        )
    return unpacked


TOKEN_PAIR = tl.constexpr("""
{
.reg .b32 lane, column, other, weight<16>, code<4>, sum<4>;
.reg .b64 place;
.reg .pred own;
mov.u32 lane, %laneid;
shr.u32 column, lane, 2;
shr.u32 other, lane, 3;
xor.b32 other, other, lane;
and.b32 other, other, 3;
setp.eq.u32 own, other, 0;
and.b32 column, column, 1;
mad.wide.u32 place, column, 64, $32;
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
mov.b32 weight12, 0;
mov.b32 weight13, 0;
mov.b32 weight14, 0;
mov.b32 weight15, 0;
@own ld.global.v4.b32 {weight0, weight1, weight2, weight3}, [place+0];
@own ld.global.v4.b32 {weight4, weight5, weight6, weight7}, [place+16];
@own ld.global.v4.b32 {weight8, weight9, weight10, weight11}, [place+32];
@own ld.global.v4.b32 {weight12, weight13, weight14, weight15}, [place+48];
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
and.b32 code2, $20, 0x0f0f0f0f;
and.b32 code3, $21, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight2, weight3}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $8, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $9, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $12, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $13, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight4, weight5}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $16, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $17, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $20, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $21, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight6, weight7}, {sum0, sum1, sum2, sum3};
and.b32 code0, $24, 0x03030303;
and.b32 code1, $25, 0x03030303;
and.b32 code2, $28, 0x03030303;
and.b32 code3, $29, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight8, weight9}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $24, 2;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $25, 2;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $28, 2;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $29, 2;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight10, weight11}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $24, 4;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $25, 4;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $28, 4;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $29, 4;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight12, weight13}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $24, 6;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $25, 6;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $28, 6;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $29, 6;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight14, weight15}, {sum0, sum1, sum2, sum3};
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
and.b32 code2, $22, 0x0f0f0f0f;
and.b32 code3, $23, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight2, weight3}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $10, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $11, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $14, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $15, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight4, weight5}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $18, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $19, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $22, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $23, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight6, weight7}, {sum0, sum1, sum2, sum3};
and.b32 code0, $26, 0x03030303;
and.b32 code1, $27, 0x03030303;
and.b32 code2, $30, 0x03030303;
and.b32 code3, $31, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight8, weight9}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $26, 2;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $27, 2;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $30, 2;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $31, 2;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight10, weight11}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $26, 4;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $27, 4;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $30, 4;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $31, 4;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight12, weight13}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $26, 6;
and.b32 code0, code0, 0x03030303;
shr.u32 code1, $27, 6;
and.b32 code1, code1, 0x03030303;
shr.u32 code2, $30, 6;
and.b32 code2, code2, 0x03030303;
shr.u32 code3, $31, 6;
and.b32 code3, code3, 0x03030303;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight14, weight15}, {sum0, sum1, sum2, sum3};
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
        TOKEN_PAIR, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,l,l,l,l",
        [packed[0], packed[1], packed[2], packed[3], packed[4], packed[5], place.to(tl.int64)],
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
        tl.load(scales + 3),
        tl.load(constants + 3),
    )


@triton.jit
def token_products(packed, own):
    """Return the products of all heads, int32 [N] each, or the codes that `token_product` multiplies."""
    if IN_REGISTERS:
        product_0, product_1 = token_pair(packed, own, 0)
        product_2, product_3 = token_pair(packed, own, 1)
        products = (product_0, product_1, product_2, product_3)
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
        product = dot4(products[12], tl.load(words_of(weights) + 12), product)
        product = dot4(products[13], tl.load(words_of(weights) + 13), product)
        product = dot4(products[14], tl.load(words_of(weights) + 14), product)
        product = dot4(products[15], tl.load(words_of(weights) + 15), product)
    else:
        product = tl.zeros([products[0].shape[0]], tl.int32)
        weight = load_weights(weights, 0, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[0] * weight, 1)
        weight = load_weights(weights, 16, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[1] * weight, 1)
        weight = load_weights(weights, 32, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[2] * weight, 1)
        weight = load_weights(weights, 40, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[3] * weight, 1)
        weight = load_weights(weights, 48, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[4] * weight, 1)
        weight = load_weights(weights, 56, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[5] * weight, 1)
    return product.to(tl.float32) * scale + constant


@triton.jit
def token_shares(
    packed, slot, inside, known, own, total, b, kv_head, t, kv_len, length,
):
    """Return the sum over heads of each share, float32 [N], and which slots any head sees, bool [N]."""
    g = tl.arange(0, ROWS)
    products = token_products(packed, own)
    share = tl.zeros([slot.shape[0]], tl.float32)
    seen = visible(b, kv_head * GROUP, t, slot, kv_len, inside, length)
    known &= seen
    for head in tl.static_range(GROUP):
        h = kv_head * GROUP + head
        bits = score(token_product(products, own, head), b, h, t, slot, inside, length)
        bits = tl.where(known, bits, float("-inf"))
        part = tl.exp2(bits - tl.sum(tl.where(g == head, total, 0.0), 0))
        share += part
    return share, seen


@triton.jit
def store_bins(
    packed, slot, own, total, bins, first, end, fresh, b, kv_head, t, kv_len, length
):
    """Store the bins of the shares of a tile's tokens, and return them."""
    inside = slot < kv_len
    known = (slot >= first + SINKS) & (slot < tl.minimum(end - RECENT, fresh))
    share, seen = token_shares(
        packed, slot, inside, known, own, total, b, kv_head, t, kv_len, length
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
    kv_len, slots, blocks, kv_heads: tl.constexpr, query_len, tiles, length,
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
            positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
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
    first, end = seen_range(b, t, kv_len, length)
    low = tl.maximum(first - part * span, 0) // TILE
    high = tl.minimum(tl.maximum(end - part * span + TILE - 1, 0) // TILE, STEPS)
    if low < high:
        space = (b * kv_heads + kv_head).to(tl.int64) * slots
        fine += space * FINE_BYTES
        coarse += space * COARSE_BYTES
        slot = part * span + low * TILE + tl.arange(0, TILE)
        packed = load_sketches(fine, coarse, slot, slot < kv_len)
        fresh = fresh_seen(
            positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
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
            counters = count_items(counters, store_bins(packed, slot, own, total, bins, first, end, fresh, b, kv_head, t, kv_len, length))
        else:
            stop = tl.minimum(kv_len, part * span + high * TILE)
            for step in range(low, high):
                # The next tile is on its way while this one is scored.
                after = slot + TILE
                following = load_sketches(fine, coarse, after, after < stop)
                counters = count_items(counters, store_bins(packed, slot, own, total, bins, first, end, fresh, b, kv_head, t, kv_len, length))
                packed, slot = following, after
        add_counts(histogram, counters)


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
def load_pages(fine, number, inside):
    """Return packed codes as a tuple: of words, int32 [N], or of planes, uint8 [N, columns]."""
    if IN_WORDS:
        fine = tl.load(
            words_of(fine) + number[:, None] * 4 + tl.arange(0, 4)[None, :],
            mask=inside[:, None], other=0,
        )
        fine_even, fine_odd = tl.split(tl.reshape(fine, [number.shape[0], 2, 2]))
        fine_0, fine_2 = tl.split(fine_even)
        fine_1, fine_3 = tl.split(fine_odd)
        packed = (fine_0, fine_1, fine_2, fine_3)
    else:
        packed = (
            load_bytes(fine, number, inside, FINE_BYTES, FINE_COLUMNS),
        )
    return packed


@triton.jit
def page_codes(packed):
    """Return codes as a tuple: four in the bytes of a word, int32 [N], or one, int32 [N, columns]."""
    if IN_WORDS:
        fine_0, fine_1, fine_2, fine_3 = packed
        unpacked = (
            fine_0 & 0x0f0f0f0f,
            fine_1 & 0x0f0f0f0f,
            fine_2 & 0x0f0f0f0f,
            fine_3 & 0x0f0f0f0f,
            (fine_0 >> 4) & 0x0f0f0f0f,
            (fine_1 >> 4) & 0x0f0f0f0f,
            (fine_2 >> 4) & 0x0f0f0f0f,
            (fine_3 >> 4) & 0x0f0f0f0f,
        )
    else:
        fine, = packed
        unpacked = (
            ((fine >> 0) & 15).to(tl.int32),
            ((fine >> 4) & 15).to(tl.int32),
        )
    return unpacked


PAGE_PAIR = tl.constexpr("""
{
.reg .b32 lane, column, other, weight<8>, code<4>, sum<4>;
.reg .b64 place;
.reg .pred own;
mov.u32 lane, %laneid;
shr.u32 column, lane, 2;
shr.u32 other, lane, 3;
xor.b32 other, other, lane;
and.b32 other, other, 3;
setp.eq.u32 own, other, 0;
and.b32 column, column, 1;
mad.wide.u32 place, column, 64, $24;
mov.b32 weight0, 0;
mov.b32 weight1, 0;
mov.b32 weight2, 0;
mov.b32 weight3, 0;
mov.b32 weight4, 0;
mov.b32 weight5, 0;
mov.b32 weight6, 0;
mov.b32 weight7, 0;
@own ld.global.v4.b32 {weight0, weight1, weight2, weight3}, [place+0];
@own ld.global.v4.b32 {weight4, weight5, weight6, weight7}, [place+16];
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
and.b32 code2, $20, 0x0f0f0f0f;
and.b32 code3, $21, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight2, weight3}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $8, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $9, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $12, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $13, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight4, weight5}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $16, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $17, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $20, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $21, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight6, weight7}, {sum0, sum1, sum2, sum3};
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
and.b32 code2, $22, 0x0f0f0f0f;
and.b32 code3, $23, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight2, weight3}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $10, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $11, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $14, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $15, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight4, weight5}, {sum0, sum1, sum2, sum3};
shr.u32 code0, $18, 4;
and.b32 code0, code0, 0x0f0f0f0f;
shr.u32 code1, $19, 4;
and.b32 code1, code1, 0x0f0f0f0f;
shr.u32 code2, $22, 4;
and.b32 code2, code2, 0x0f0f0f0f;
shr.u32 code3, $23, 4;
and.b32 code3, code3, 0x0f0f0f0f;
mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {sum0, sum1, sum2, sum3}, {code0, code1, code2, code3}, {weight6, weight7}, {sum0, sum1, sum2, sum3};
mov.b32 $2, sum0;
mov.b32 $6, sum1;
mov.b32 $3, sum2;
mov.b32 $7, sum3;
}
""")


@triton.jit
def page_pair(packed, own, PAIR: tl.constexpr):
    """Return the products, int32 [N], of codes and the weights of two heads."""
    place = own[0] + (own[1] * ROWS + 2 * PAIR) * WEIGHT_COLUMNS
    return tl.inline_asm_elementwise(
        PAGE_PAIR, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,l,l,l,l",
        [packed[0], packed[1], packed[2], packed[3], place.to(tl.int64)],
        dtype=(tl.int32, tl.int32), is_pure=False, pack=4,
    )


@triton.jit
def page_weights(weights, scales, constants, mine):
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
        tl.load(scales + 3),
        tl.load(constants + 3),
    )


@triton.jit
def page_products(packed, own):
    """Return the products of all heads, int32 [N] each, or the codes that `page_product` multiplies."""
    if IN_REGISTERS:
        product_0, product_1 = page_pair(packed, own, 0)
        product_2, product_3 = page_pair(packed, own, 1)
        products = (product_0, product_1, product_2, product_3)
    else:
        products = page_codes(packed)
    return products


@triton.jit
def page_product(products, own, HEAD: tl.constexpr):
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
    else:
        product = tl.zeros([products[0].shape[0]], tl.int32)
        weight = load_weights(weights, 0, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[0] * weight, 1)
        weight = load_weights(weights, 16, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[1] * weight, 1)
    return product.to(tl.float32) * (scale * PAGE_STEP) + constant


@triton.jit
def page_shares(
    packed, slot, inside, known, own, total, b, kv_head, t, kv_len, length,
):
    """Return the sum over heads of each share, float32 [N]."""
    g = tl.arange(0, ROWS)
    products = page_products(packed, own)
    share = tl.zeros([slot.shape[0]], tl.float32)
    for head in tl.static_range(GROUP):
        h = kv_head * GROUP + head
        bits = score(page_product(products, own, head), b, h, t, slot, inside, length)
        bits = tl.where(known, bits, float("-inf"))
        part = tl.exp2(bits - tl.sum(tl.where(g == head, total, 0.0), 0))
        share += part
    return share


@triton.jit
def plan_turns(
    histogram, ranks, plan, limits, candidate_count, tiles, TILES: tl.constexpr
):
    """Deal the best pages of a row out in turns. A turn has up to TURN pages of one block.

    Store in `plan` for each turn: its block, the number of chosen pages in all blocks and turns
    before it, the number of those in turns of its own block, and the number of its own pages. Store
    in `limits` what `choose_by_bin` needs: the cut, what is left for it, and its number of pages;
    then the number of turns. If the row sees few pages, all of them are chosen.
    """
    seen = tl.sum(tl.load(histogram + tl.arange(0, BINS)), 0)
    room = tl.where(seen <= FLAT_PAGES, seen, PAGE_ROOM)
    cut, left, at_cut = threshold(histogram, room)
    of_tile = chosen_of_tiles(ranks, cut, left, at_cut, tiles, TILES)
    tl.store(candidate_count, tl.sum(of_tile, 0) * PAGE)
    tl.store(limits, cut)
    tl.store(limits + 1, left)
    tl.store(limits + 2, at_cut)
    own = (of_tile + TURN - 1) // TURN
    through, before = tl.cumsum(own, 0), tl.cumsum(of_tile, 0) - of_tile
    planned = tl.max(through, 0)
    tl.store(limits + 3, planned)
    for start in range(0, planned, 64):
        number = start + tl.arange(0, 64)
        block = tl.sum((through[None, :] <= number[:, None]).to(tl.int32), 1)
        place = tl.minimum(block, TILES - 1)
        skipped = (number - tl.gather(through - own, place, 0)) * TURN
        count = tl.minimum(tl.gather(of_tile, place, 0) - skipped, TURN)
        entry, inside = plan + number * 4, number < planned
        tl.store(entry, block, mask=inside)
        tl.store(entry + 1, tl.gather(before, place, 0) + skipped, mask=inside)
        tl.store(entry + 2, skipped, mask=inside)
        tl.store(entry + 3, count, mask=inside)


@triton.jit
def scan_pages(
    pages, page_constants, ranks, whole, arrivals, plan, turns, limits, candidate_count,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d, fingerprints,
    weights, scales, constants, totals,
    positions, position_stride_b, position_stride_t, written, header,
    tile_first, tile_end, bins, histogram,
    kv_len, slots, blocks, kv_heads: tl.constexpr, query_len, tiles, length,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of the pages of one block, and counts of each or above.

    The last program of a row plans the work of `scan_chosen`. One more program looks if the index
    is stale.
    """
    PER_BLOCK: tl.constexpr = BLOCK // PAGE
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if tile == tiles:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        fresh = fresh_seen(
            positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
        )
        if (t == 0) | (fresh > fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)):
            check_sample(
                key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
                header, fingerprints, positions, position_stride_b, position_stride_t, written, fresh,
                b, kv_head, slots, kv_heads, kv_len,
            )
        return
    ranks += head_row.to(tl.int64) * tiles * BINS
    mine = ranks + tile * BINS
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    first, end = seen_range(b, t, kv_len, length)
    if (tile * BLOCK < end) & (tile * BLOCK + BLOCK > first):
        page = tile * PER_BLOCK + tl.arange(0, PER_BLOCK)
        space = (b * kv_heads + kv_head).to(tl.int64) * (slots // PAGE)
        packed = load_pages(pages + space * FINE_BYTES, page, page * PAGE < slots)
        fresh = fresh_seen(
            positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
        )
        held = (page * PAGE < tl.minimum(end, fresh)) & (page * PAGE + PAGE > first)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        total = denominators(totals, head_row, blocks, BLOCKS)
        tl.store(whole + head_row * ROWS + tl.arange(0, ROWS), total)  # all programs of a row store the same
        own = page_weights(weights, scales, page_constants, head_row.to(tl.int64) * blocks + tile)
        share = page_shares(
            packed, page * PAGE, held, held, own, total, b, kv_head, t, kv_len, length,
        )
        entry = bins_of_shares(share, share > 0)
        tl.store(bins + head_row.to(tl.int64) * (blocks * PER_BLOCK) + page, entry.to(tl.uint8))
        counts = add_counts(histogram + head_row * (2 * BINS), count_items(no_counts(), entry))
        tl.store(mine + tl.arange(0, BINS), tl.cumsum(counts, 0, reverse=True))
    else:
        tl.store(mine + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
    if EARLY:
        tl.extra.cuda.gdc_wait()  # even if nothing is seen: `arrivals` are cleared before
    tl.debug_barrier()
    if tl.atomic_add(arrivals + head_row, 1) == tiles - 1:
        plan_turns(
            histogram + head_row * (2 * BINS), ranks, plan + head_row.to(tl.int64) * turns * 4,
            limits + head_row * 4, candidate_count + head_row, tiles, BLOCKS,
        )


@triton.jit
def scan_chosen(
    fine, coarse, whole, page_bins, plan, turns, limits, candidates, candidate_room,
    weights, scales, constants, totals,
    positions, position_stride_b, position_stride_t, written, header,
    tile_first, tile_end, bins, histogram,
    kv_len, slots, blocks, kv_heads: tl.constexpr, query_len, tiles, length,
    BLOCK: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store the tokens of the best pages, one block after the other, and their bins."""
    PER_BLOCK: tl.constexpr = BLOCK // PAGE
    head_row, part = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    histogram += head_row * (2 * BINS) + BINS
    page_bins += head_row.to(tl.int64) * (blocks * PER_BLOCK)
    bins += head_row.to(tl.int64) * candidate_room
    candidates += head_row.to(tl.int64) * candidate_room
    plan += head_row.to(tl.int64) * turns * 4
    limits += head_row * 4
    space = (b * kv_heads + kv_head).to(tl.int64) * slots
    number, lane = tl.arange(0, PER_BLOCK), tl.arange(0, TURN * PAGE)
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    counters = no_counts()
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, begin, stop, _ = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
    )
    total = tl.load(whole + head_row * ROWS + tl.arange(0, ROWS))
    cut, left, at_cut = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2)
    for turn in range(part, tl.load(limits + 3), tl.num_programs(1)):
        block, first_rank = tl.load(plan + turn * 4), tl.load(plan + turn * 4 + 1)
        skipped, count = tl.load(plan + turn * 4 + 2), tl.load(plan + turn * 4 + 3)
        entry = tl.load(page_bins + block * PER_BLOCK + number)
        chosen, place, _ = choose_by_bin(entry.to(tl.int32), cut, left, at_cut)
        # The first slot of each page goes to its place among the candidates; the others follow it.
        mine = chosen & (place >= skipped) & (place < skipped + count)
        head = (first_rank + place - skipped) * PAGE
        tl.store(candidates + head, (block * PER_BLOCK + number) * PAGE, mask=mine)
        tl.debug_barrier()
        into, listed = first_rank * PAGE + lane, lane < count * PAGE
        slot = tl.load(candidates + into // PAGE * PAGE, mask=listed, other=0) + lane % PAGE
        inside = listed & (slot >= begin) & (slot < stop)
        packed = load_sketches(fine + space * FINE_BYTES, coarse + space * COARSE_BYTES, slot, inside)
        own = token_weights(weights, scales, constants, head_row.to(tl.int64) * blocks + block)
        share, seen = token_shares(
            packed, slot, inside, inside, own, total, b, kv_head, t, kv_len, length,
        )
        found = bins_of_shares(share, share > 0)
        tl.store(candidates + into, slot, mask=listed)
        tl.store(bins + into, found.to(tl.uint8), mask=listed)
        counters = count_items(counters, found)
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
                over_1_0 = over_1_0 + tl.sum(tl.where(member[:, None], (((-1.0 * ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32))[None, :] + keys) * ((-1.0 * ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32))[None, :] + keys)), 0.0), 0)
                over_1_1 = tl.maximum(over_1_1, tl.max(tl.where(member, tl.sum(tl.where(inside[None, :], (((-1.0 * ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32))[None, :] + keys) * ((-1.0 * ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32))[None, :] + keys)), 0.0), 1), float("-inf")), 0))
            at = space * numbers + chunk
            field_chunk_mean = ((over_0_0 / 1) / length).to(tl.bfloat16).to(tl.float32)
            tl.store(summary_chunk_mean + at * HEAD_DIM + d, field_chunk_mean.to(summary_chunk_mean.dtype.element_ty), mask=inside)
            field_chunk_variance = ((over_1_0 / 1) / length).to(tl.bfloat16).to(tl.float32)
            tl.store(summary_chunk_variance + at * HEAD_DIM + d, field_chunk_variance.to(summary_chunk_variance.dtype.element_ty), mask=inside)
            field_chunk_radius = tl.sqrt(over_1_1)
            tl.store(summary_chunk_radius + at, field_chunk_radius.to(summary_chunk_radius.dtype.element_ty))
            tl.store(label_2 + at, 0)
            tl.store(open_2 + space, tl.minimum(tl.load(open_2 + space), chunk))
        tl.debug_barrier()


SETTINGS = ((8, 16), True, 4, 64, 0, 16)  # how chunks and clusters are made: the arguments of `GroupSettings`
OVERFETCH = tl.constexpr(16)  # candidates for each token that is left to choose
FLAT_SLOTS = tl.constexpr(65536)  # slots seen by a query up to which all are candidates
LISTED_ROOM = tl.constexpr(65568)  # candidates that there is room for
LISTED = tl.constexpr(64)  # candidates that a program scores at a time
RANKED = tl.constexpr(512)  # groups of a level that a program ranks
SCANNED_0 = tl.constexpr(64)  # groups of level 0 scored at a time
KEPT_PER_TOKEN_0 = tl.constexpr(4)  # tokens in the kept groups of level 0 for each candidate
KEPT_0 = tl.constexpr(65536)  # those for all candidates
FEW_0 = tl.constexpr(64)  # clusters of level 0, up to a power of two
LISTED_0 = tl.constexpr(128)  # groups in them that a program lists at a time
SCANNED_1 = tl.constexpr(64)  # groups of level 1 scored at a time
KEPT_PER_TOKEN_1 = tl.constexpr(2)  # tokens in the kept groups of level 1 for each candidate
KEPT_1 = tl.constexpr(32768)  # those for all candidates
SCANNED_2 = tl.constexpr(64)  # groups of level 2 scored at a time


@triton.jit
def shares_of(value, total):
    """Return the sum over a group's heads of each item's share [N], by scores [ROWS, N] in bits."""
    real = (tl.arange(0, ROWS) < GROUP)[:, None]
    share = tl.sum(tl.where(real, tl.exp2(value - total[:, None]), 0.0), 0)
    # After a product, eight threads have the same items; `gather` gives each thread its own.
    return tl.gather(share, tl.arange(0, value.shape[1]), 0)


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
def estimate_0(
    queries, summary_unit_mean, summary_unit_variance, group, held,
):
    """Estimate q.k for the groups [N] of level 0 that are held, bool [N]: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_unit_mean = tl.load(summary_unit_mean + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_unit_variance = tl.load(summary_unit_variance + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    return (((0.5 * 0.08838834764831843) * tl.dot((queries.to(tl.float32) * queries.to(tl.float32)).to(queries.dtype), tl.trans(field_unit_variance))) + tl.dot(queries, tl.trans(field_unit_mean)))


@triton.jit
def scan_0(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d, fingerprints, slots,
    tokens_0, first_0, end_0, groups,
    summary_unit_mean, summary_unit_variance, scores, totals, counts, counts_stride,
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
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
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
            queries, summary_unit_mean + space * groups * HEAD_DIM, summary_unit_variance + space * groups * HEAD_DIM, group, held,
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
        tl.store(counts + head_row * counts_stride + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(child_counts + head_row * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        tl.store(candidate_count + head_row, 0)


@triton.jit
def rank_0(
    scores, totals, scan_tiles,
    group_bins, ranks, counts, counts_stride, candidates, bins, candidate_room, candidate_count,
    tokens_0, first_0, end_0, groups,
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
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
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
    tokens_0, first_0, end_0, groups,
    children_0, begin_0, order_1, child_groups,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """List what is in the best groups of each RANKED, until all listed ones have enough tokens.

    They have enough if those are a multiple of what is left of the budget. In a short context
    everything is listed.
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
    quota, is_short = OVERFETCH * room, stop - begin <= tl.maximum(FLAT_SLOTS, room)
    room = tl.where(is_short, 2**26, KEPT_PER_TOKEN_0 * quota)
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
    queries, summary_cluster_mean, summary_cluster_variance, group, held,
):
    """Estimate q.k for the groups [N] of level 1 that are held, bool [N]: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_cluster_mean = tl.load(summary_cluster_mean + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_cluster_variance = tl.load(summary_cluster_variance + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    return (((0.5 * 0.08838834764831843) * tl.dot((queries.to(tl.float32) * queries.to(tl.float32)).to(queries.dtype), tl.trans(field_cluster_variance))) + tl.dot(queries, tl.trans(field_cluster_mean)))


@triton.jit
def scan_1(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    tokens_1, first_1, end_1, groups, listed, listed_room, listed_count, open_1,
    summary_cluster_mean, summary_cluster_variance, label_1, scores, totals, counts, counts_stride,
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
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
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
            queries, summary_cluster_mean + space * groups * HEAD_DIM, summary_cluster_variance + space * groups * HEAD_DIM, group, held,
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
    tokens_1, first_1, end_1, groups, listed, listed_room, listed_count, open_1,
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
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
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
    tokens_1, first_1, end_1, groups, listed, listed_room, listed_count, open_1,
    children_1, begin_1, order_2, child_groups, child_ranks, child_counts,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, LOTS: tl.constexpr, EARLY: tl.constexpr,
):
    """List what is in the best groups of each RANKED, until all listed ones have enough tokens.

    They have enough if those are a multiple of what is left of the budget. In a short context
    everything is listed.
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
    quota, is_short = OVERFETCH * room, stop - begin <= tl.maximum(FLAT_SLOTS, room)
    room = tl.where(is_short, 2**26, KEPT_PER_TOKEN_1 * quota)
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
    queries, summary_chunk_mean, summary_chunk_variance, summary_chunk_radius, group, held,
):
    """Estimate q.k for the groups [N] of level 2 that are held, bool [N]: [ROWS, N]."""
    d = tl.arange(0, DIM)
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    field_chunk_mean = tl.load(summary_chunk_mean + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_chunk_variance = tl.load(summary_chunk_variance + group[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
    field_chunk_radius = tl.load(summary_chunk_radius + group, mask=held, other=0.0)
    return (((0.5 * 0.08838834764831843) * tl.dot((queries.to(tl.float32) * queries.to(tl.float32)).to(queries.dtype), tl.trans(field_chunk_variance))) + tl.dot(queries, tl.trans(field_chunk_mean)))


@triton.jit
def scan_2(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    span, groups, listed, listed_room, listed_count, open_2,
    summary_chunk_mean, summary_chunk_variance, summary_chunk_radius, label_2, scores, totals, counts, counts_stride,
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
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
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
            queries, summary_chunk_mean + space * groups * HEAD_DIM, summary_chunk_variance + space * groups * HEAD_DIM, summary_chunk_radius + space * groups, group, held,
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
    span, groups, listed, listed_room, listed_count, open_2,
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
    first, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
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
    span, groups, listed, listed_room, listed_count, open_2,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, lots, length,
    TILES: tl.constexpr, LOTS: tl.constexpr, EARLY: tl.constexpr,
):
    """List what is in the best groups of each RANKED, until all listed ones have enough tokens.

    They have enough if those are a multiple of what is left of the budget. In a short context
    everything is listed.
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
    quota, is_short = OVERFETCH * room, stop - begin <= tl.maximum(FLAT_SLOTS, room)
    room = tl.where(is_short, 2**26, quota)
    known_count, open_group = tl.load(listed_count + head_row), tl.load(open_2 + space)
    count = known_count + tl.maximum(fresh // SHORTEST - open_group, 0)
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
            tl.store(candidates + place[:, None] + inner, child, mask=fits)
        last = tl.max(tl.where(take > 0, place + take, 0), 0)
        tl.atomic_max(candidate_count + head_row, tl.minimum(last, candidate_room), sem="relaxed")
        lot += tl.num_programs(1)


@triton.jit
def listed_weights(weights, scales, constants, mine):
    """Return what products take of the block `mine`."""
    return (weights, mine, scales, constants)


@triton.jit
def listed_products(packed, own):
    """Return the codes that `listed_product` multiplies."""
    return token_codes(packed)


@triton.jit
def listed_product(products, own, HEAD):
    """Return q.k [N] of one head, its constant included."""
    weights, mine, scales, constants = own
    scale, constant = tl.load(scales + mine * ROWS + HEAD), tl.load(constants + mine * ROWS + HEAD)
    weights += (mine * ROWS + HEAD) * WEIGHT_COLUMNS
    if IN_WORDS:
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
        product = dot4(products[12], tl.load(words_of(weights) + 12), product)
        product = dot4(products[13], tl.load(words_of(weights) + 13), product)
        product = dot4(products[14], tl.load(words_of(weights) + 14), product)
        product = dot4(products[15], tl.load(words_of(weights) + 15), product)
    else:
        product = tl.zeros([products[0].shape[0]], tl.int32)
        weight = load_weights(weights[:, None], 0, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[0] * weight, 1)
        weight = load_weights(weights[:, None], 16, FINE_BYTES, FINE_COLUMNS)
        product += tl.sum(products[1] * weight, 1)
        weight = load_weights(weights[:, None], 32, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[2] * weight, 1)
        weight = load_weights(weights[:, None], 40, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[3] * weight, 1)
        weight = load_weights(weights[:, None], 48, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[4] * weight, 1)
        weight = load_weights(weights[:, None], 56, COARSE_BYTES, COARSE_COLUMNS)
        product += tl.sum(products[5] * weight, 1)
    return product.to(tl.float32) * scale + constant


@triton.jit
def listed_shares(
    packed, slot, inside, known, own, total, b, kv_head, t, kv_len, length,
):
    """Return the sum over heads of each share, float32 [N], and which slots any head sees, bool [N]."""
    g = tl.arange(0, ROWS)
    products = listed_products(packed, own)
    share = tl.zeros([slot.shape[0]], tl.float32)
    seen = visible(b, kv_head * GROUP, t, slot, kv_len, inside, length)
    known &= seen
    for head in tl.static_range(GROUP):
        h = kv_head * GROUP + head
        bits = score(listed_product(products, own, head), b, h, t, slot, inside, length)
        bits = tl.where(known, bits, float("-inf"))
        part = tl.exp2(bits - tl.sum(tl.where(g == head, total, 0.0), 0))
        share += part
    return share, seen


@triton.jit
def scan_listed(
    fine, coarse, span, numbers, candidates, candidate_room, listed_count, candidate_count,
    weights, scales, constants, totals,
    positions, position_stride_b, position_stride_t, written, header,
    tile_first, tile_end, bins, histogram,
    kv_len, slots, blocks, kv_heads: tl.constexpr, query_len, tiles, length,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Store bins, uint8, of the shares of listed tokens and of those that are in no chunk yet."""
    head_row, part = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    histogram += head_row * (2 * BINS) + BINS
    bins += head_row.to(tl.int64) * candidate_room
    candidates += head_row.to(tl.int64) * candidate_room
    space = (b * kv_heads + kv_head).to(tl.int64)
    fine += space * slots * FINE_BYTES
    coarse += space * slots * COARSE_BYTES
    fresh = fresh_seen(
        positions, position_stride_b, position_stride_t, written, header, b, kv_head, t, kv_len, length
    )
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, begin, stop, _ = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh, length, TILES
    )
    total = denominators(totals, head_row, blocks, BLOCKS)
    known = tl.load(listed_count + head_row)
    # No chunk that is listed reaches as far as this, even if slots before were never written.
    open_slot = tl.maximum(unread_slot(span + space * numbers, fresh), fresh - LONGEST)
    open_slot = tl.maximum(open_slot, begin)
    count = tl.minimum(known + tl.maximum(stop - open_slot, 0), candidate_room)
    for start in range(part * LISTED, count, tl.num_programs(1) * LISTED):
        item = start + tl.arange(0, LISTED)
        inside, is_listed = item < count, item < known
        slot = tl.load(candidates + item, mask=is_listed, other=0)
        slot = tl.where(is_listed, slot, tl.where(inside, open_slot + item - known, 0))
        tl.store(candidates + item, slot, mask=inside & (item >= known))
        mine = head_row.to(tl.int64) * blocks + slot // BLOCK
        share, seen = listed_shares(
            load_sketches(fine, coarse, slot, inside), slot, inside, inside,
            listed_weights(weights, scales, constants, mine), total, b, kv_head, t, kv_len, length,
        )
        found = bins_of_shares(share, share > 0)
        tl.store(bins + item, found.to(tl.uint8), mask=inside)
        count_bins(histogram, found)
    if part == 0:
        tl.store(candidate_count + head_row, count)


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
    fine = field_codes(centred, axes, step, 0, 16, FINE_COLUMNS, 16)
    fine |= field_codes(centred, axes, step, 16, 16, FINE_COLUMNS, 16) << 4
    coarse = field_codes(centred, axes, step, 32, 8, COARSE_COLUMNS, 4)
    coarse |= field_codes(centred, axes, step, 40, 8, COARSE_COLUMNS, 4) << 2
    coarse |= field_codes(centred, axes, step, 48, 8, COARSE_COLUMNS, 4) << 4
    coarse |= field_codes(centred, axes, step, 56, 8, COARSE_COLUMNS, 4) << 6
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
    header, fingerprints, fine, coarse, pages, axes, centre, step, spread, slots, blocks, BLOCK: tl.constexpr,
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
