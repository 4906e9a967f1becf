"""Decode attention: decode fasa bf16 g4 d128 loads b1024 c0 9.

score(s) = 0.0883883476483184*s
visible: length + q >= kv
"""

import triton
import triton.language as tl

POLICY = "fasa"  # the policy that selects keys; None: all visible keys are read
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


LOADS = ("key",)  # operands that are tuples of tensors
ENTRY_BYTES = 900  # bytes that one key and its value are computed from


@triton.jit
def load_key(b, h, kv, d, there, key):
    """Return the keys (key_1[Mod(key_0[b, floor(kv/16)], 4096), Mod(kv, 16), h, d] - key_3[Mod(key_0[b, floor(kv/16)], 4096), Mod(kv, 16), h, floor(d/32)])*key_2[Mod(key_0[b, floor(kv/16)], 4096), Mod(kv, 16), h, floor(d/32)]."""
    key_0, key_0_stride_0, key_0_stride_1, key_1, key_1_stride_0, key_1_stride_1, key_1_stride_2, key_1_stride_3, key_2, key_2_stride_0, key_2_stride_1, key_2_stride_2, key_2_stride_3, key_3, key_3_stride_0, key_3_stride_1, key_3_stride_2, key_3_stride_3 = key
    index_0 = tl.load(key_0 + tl.cast(b, tl.int64) * key_0_stride_0 + tl.cast(kv // 16, tl.int64) * key_0_stride_1, mask=there, other=0)
    number_1 = tl.load(key_2 + tl.cast((index_0 % 4096 + 4096) % 4096, tl.int64) * key_2_stride_0 + tl.cast(kv % 16, tl.int64) * key_2_stride_1 + tl.cast(h, tl.int64) * key_2_stride_2 + (d // 32) * key_2_stride_3, mask=there & (d < HEAD_DIM), other=0.0).to(tl.float32)
    number_2 = tl.load(key_1 + tl.cast((index_0 % 4096 + 4096) % 4096, tl.int64) * key_1_stride_0 + tl.cast(kv % 16, tl.int64) * key_1_stride_1 + tl.cast(h, tl.int64) * key_1_stride_2 + d * key_1_stride_3, mask=there & (d < HEAD_DIM), other=0).to(tl.float32)
    number_3 = tl.load(key_3 + tl.cast((index_0 % 4096 + 4096) % 4096, tl.int64) * key_3_stride_0 + tl.cast(kv % 16, tl.int64) * key_3_stride_1 + tl.cast(h, tl.int64) * key_3_stride_2 + (d // 32) * key_3_stride_3, mask=there & (d < HEAD_DIM), other=0.0).to(tl.float32)
    found = number_1 * (number_2 - number_3)
    return tl.where(there & (d < HEAD_DIM), found, 0.0).to(tl.bfloat16)


@triton.jit
def load_one_key(b, h, slot, key):
    """Return the key in one slot, [1, DIM]."""
    kv = slot + tl.zeros([1, 1], tl.int32)
    return load_key(b, h, kv, tl.arange(0, DIM)[None, :], kv >= 0, key)


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
    kv_head, key, value, value_stride_l, value_stride_d, length,
):
    """Do one step of online softmax over the keys in the slots [N] that are `inside`."""
    seen = visible(b, heads[:, None], t, slot[None, :], kv_len, inside[None, :], length)
    d, width = tl.arange(0, DIM), tl.arange(0, WIDTH)
    place = slot.to(tl.int64)[:, None]
    keys = load_key(b, kv_head, slot[:, None], d[None, :], inside[:, None], key)
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
    kv_head, key, value, value_stride_l, value_stride_d, length,
    KEYS: tl.constexpr,
):
    """Attend to every splits-th run of KEYS keys; a run of hidden keys is not read."""
    first, end = seen_range(b, t, kv_len, length)
    for start in range(first // KEYS * KEYS + split * KEYS, end, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = (slot >= first) & (slot < end)
        top, total, result = attend_to(
            slot, inside, queries, heads, top, total, result, b, t, kv_len,
            kv_head, key, value, value_stride_l, value_stride_d, length,
        )
    return top, total, result


@triton.jit
def attend_all(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key,
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
    value += b.to(tl.int64) * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    top, total, result = read_all(
        queries, heads, top, total, result, b, t, kv_len, split, splits,
        kv_head, key, value, value_stride_l, value_stride_d, length,
        KEYS,
    )
    store_part(
        top, total, result, head_row, split, splits, partial, partial_top, partial_sum
    )


BUDGET = tl.constexpr(1024)  # tokens read per KV head and query position
SINKS = tl.constexpr(0)  # first tokens, always read
RECENT = tl.constexpr(1)  # last tokens, always read
PAGE = tl.constexpr(1)  # slots of the groups that are read whole
SAMPLED = tl.constexpr(32)  # keys that each KV head compares with fingerprints
NEWEST = tl.constexpr(8)  # those among them that are the newest
RANKED = tl.constexpr(512)  # groups that a program ranks
BINS = tl.constexpr(256)  # bins of a histogram of shares; the first is for what cannot be chosen
LAST_BIN = tl.constexpr(1112)  # a share of 2^12, in eighths of an octave
MAY_MISS = tl.constexpr(0.09999999999999998)  # share of the softmax that may be left out
HEADS = tl.constexpr(4)  # query heads of a group, up to a power of two
SIZE_0 = tl.constexpr(1)  # slots of a group of level 0
SCANNED_0 = tl.constexpr(256)  # groups of level 0 scored at a time
CHANNELS = tl.constexpr(32)  # channels of queries and keys that estimates read
GATHERED = tl.constexpr(32)  # CHANNELS, padded to what a tensor core's product takes


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
def note_heads(own, head_mass):
    """Add the mass of each head, `own` [ROWS], to `head_mass`, int64 [ROWS], in 2^-24.

    Sums of integers depend on no order.
    """
    g = tl.arange(0, ROWS)
    mass = (tl.minimum(own, 1048576.0) * 16777216.0 + 0.5).to(tl.int64)
    tl.atomic_add(head_mass + g, mass, mask=g < GROUP, sem="relaxed")


@triton.jit
def note_small(share, entry, untold):
    """Add the mass of the items in the second bin to `untold`, int32, in 2^-20.

    `share` [N] and the bins `entry` [N] are those of all heads together.
    """
    mass = tl.minimum(tl.sum(tl.where(entry == 1, share, 0.0), 0), 256.0)
    tl.atomic_add(untold, (mass * 1048576.0 + 0.5).to(tl.int32), sem="relaxed")


@triton.jit
def note_mass(value, total, entry, head_mass, untold, each):
    """Add the shares of items [N] up: for each head, and for those in the second bin.

    The bins `entry` [N] are made of scores `value` [ROWS, N] in bits. An item stands for `each`
    tokens, a number or one for each item [1, N].
    """
    share = tl.where((entry > 0)[None, :], tl.exp2(value - total[:, None]), 0.0) * each
    note_heads(tl.sum(share, 1), head_mass)
    real = (tl.arange(0, ROWS) < GROUP)[:, None]
    note_small(tl.sum(tl.where(real, share, 0.0), 0), entry, untold)


@triton.jit
def mass_of_bins(counts):
    """Return the mass of the items in each bin, by their numbers; 0 for the first two bins."""
    place = tl.arange(0, BINS)
    middle = ((place + (LAST_BIN - BINS + 1)) << 20 | 1 << 19).to(tl.float32, bitcast=True)
    return tl.where(place > 1, counts.to(tl.float32) * middle, 0.0)


@triton.jit
def limit_of_mass(mass, log_always, whole, head_mass):
    """Return how much of the `mass` of the tokens to choose from may be left out.

    `log_always` [ROWS] is log2 of the sum of weights over what is always read, `whole` [ROWS] the
    row's denominators. A head's part of `mass` is by `head_mass`, int64 [ROWS]. What is left out is
    taken to be as much for all heads, each of which has its own softmax.
    """
    g = tl.arange(0, ROWS)
    part = tl.load(head_mass + g, mask=g < GROUP, other=0).to(tl.float32)
    part = mass * part / tl.maximum(tl.sum(part, 0), 1.0)
    seen = part + tl.exp2(tl.minimum(log_always - tl.load(whole + g), 100.0))
    weight = tl.where((g < GROUP) & (seen > 0), 1 / tl.maximum(seen, 1e-30), 0.0)
    return MAY_MISS * GROUP * GROUP / tl.maximum(tl.sum(weight, 0), 1e-30)


@triton.jit
def threshold_of_mass(histogram, room, log_always, whole, head_mass, read=0):
    """Return what `threshold` does, or a higher bin if what is below it may be left out.

    All items of that bin are then chosen. See `limit_of_mass` for what may be left out.
    """
    cut, left, at_cut = threshold(histogram, room, read)
    place = tl.arange(0, BINS)
    counts = tl.load(histogram + place)
    untold = tl.maximum(tl.sum(tl.where(place == 0, counts, 0), 0), 0).to(tl.float32) / 1048576.0
    counts = tl.where(place > 0, counts - read, 0)
    mass = mass_of_bins(counts)
    whole_mass = tl.sum(mass, 0) + untold
    limit = limit_of_mass(whole_mass, log_always, whole, head_mass)
    below = tl.cumsum(mass, 0) - mass + untold
    enough = tl.max(tl.where((below <= limit) & (place > 1), place, 1), 0)
    in_bin = tl.sum(tl.where(place == enough, counts, 0), 0)
    higher = enough > cut
    cut = tl.where(higher, enough, cut)
    left = tl.where(higher, in_bin, left)
    at_cut = tl.where(higher, in_bin, at_cut)
    nothing = whole_mass <= limit
    return tl.where(nothing, BINS - 1, cut), tl.where(nothing, 0, left), at_cut


@triton.jit
def log_always(
    first, stop, sinks, always, queries, heads, b, t, kv_len,
    kv_head, key, length, KEYS: tl.constexpr,
):
    """Return log2 of the sum of weights over what is always read, for each head: [ROWS]."""
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    d = tl.arange(0, DIM)
    for start in range(0, always, KEYS):
        which = start + tl.arange(0, KEYS)
        inside = which < always
        slot = tl.where(which < sinks, first + which, stop + which - sinks)
        seen = visible(b, heads[:, None], t, slot[None, :], kv_len, inside[None, :], length)
        keys = load_key(b, kv_head, slot[:, None], d[None, :], inside[:, None], key)
        s = tl.dot(queries, tl.trans(keys))
        bits = score(s, b, heads[:, None], t, slot[None, :], inside[None, :], length)
        bits = tl.where(seen & inside[None, :], bits, -1e30)
        higher = tl.maximum(top, tl.max(bits, 1))
        weight = tl.where(bits > -1e30, tl.exp2(bits - higher[:, None]), 0.0)
        total = total * tl.exp2(top - higher) + tl.sum(weight, 1)
        top = higher
    return top + tl.log2(total)


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
    key,
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
        keys = load_key(b, kv_head, slot[:, None], d[None, :], slot[:, None] >= 0, key)
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
def compare_keys(key, header, fingerprints, slots, kv_heads, kv_len):
    """Distrust the index of a row if one of the keys that it knows is not as it was indexed."""
    space, slot = tl.program_id(1), tl.program_id(0) * 64 + tl.arange(0, 64)
    b, kv_head, d = space // kv_heads, space % kv_heads, tl.arange(0, DIM)
    inside = slot < tl.minimum(tl.load(header + 1 + b), kv_len)
    if tl.max(inside.to(tl.int32), 0) > 0:
        keys = load_key(b, kv_head, slot[:, None], d[None, :], inside[:, None], key)
        fingerprints += space.to(tl.int64) * slots
        if tl.max(changed_keys(keys, slot, inside, fingerprints), 0) > 0:
            lose_row(header, b)


@triton.jit(do_not_specialize=["end", "first_row"])
def record_fingerprints(
    key, first_row, fingerprints, end, slots, kv_heads
):
    """Hash the keys in the slots [0, end), 64 a program."""
    space, slot = tl.program_id(1), tl.program_id(0) * 64 + tl.arange(0, 64)
    b, kv_head, d = space // kv_heads, space % kv_heads, tl.arange(0, DIM)
    keys = load_key(first_row + b, kv_head, slot[:, None], d[None, :], (slot < end)[:, None], key)
    tl.store(
        fingerprints + space.to(tl.int64) * slots + slot, fingerprint(keys), mask=slot < end
    )


@triton.jit
def load_query_channels(
    query, channels, b, kv_head, t, stride_b, stride_h, stride_t, stride_d
):
    """Return the queries [ROWS, GATHERED] of a group at position t, and their heads and channels.

    `channels`, int32 [CHANNELS], are those of the KV head.
    """
    h = kv_head * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1)
    inside = tl.arange(0, GATHERED) < CHANNELS
    channel = tl.load(channels + tl.arange(0, GATHERED), mask=inside, other=0)
    place = query + b.to(tl.int64) * stride_b + t * stride_t
    place = place + h[:, None] * stride_h + channel[None, :] * stride_d
    return tl.load(place, mask=inside[None, :], other=0.0), h, channel


@triton.jit
def estimate_0(
    queries, b, kv_head, key, channel, group, held,
):
    """Estimate q.k for the groups [N] of level 0 that are held, bool [N]: [ROWS, N]."""
    inside = held[:, None] & (tl.arange(0, GATHERED) < CHANNELS)[None, :]
    keys = load_key(b, kv_head, group[:, None], channel[None, :], held[:, None], key)
    return tl.dot(queries, tl.trans(keys))


@triton.jit
def scan_0(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, fingerprints, slots,
    scores, totals, counts, counts_stride,
    histogram, head_mass,
    channels,
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
                key,
                header, fingerprints, positions, position_stride_b, position_stride_t, written, fresh,
                b, kv_head, slots, kv_heads, kv_len,
            )
        return
    queries, heads, channel = load_query_channels(
        query, channels + (b * kv_heads + kv_head) * CHANNELS, b, kv_head, t,
        query_stride_b, query_stride_h, query_stride_t, query_stride_d,
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
            queries, b, kv_head, key, channel, group, held,
        )
        mass = score(s, b, heads[:, None], t, (group * SIZE_0)[None, :], held[None, :], length)
        mass = tl.where(held[None, :], mass, float("-inf"))
        most = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp2(top - most) + tl.sum(tl.exp2(mass - most[:, None]), 1)
        top = most
        tl.store(scores + item[None, :], mass, mask=(g < GROUP)[:, None] & there[None, :])
    whole = tl.where(total > 0, top + tl.log2(total), -1e30)
    tl.store(totals + (head_row.to(tl.int64) * scan_tiles + tile) * ROWS + g, whole)
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32))
        tl.store(head_mass + head_row * ROWS + g, tl.zeros([ROWS], tl.int64))
        tl.store(counts + head_row * counts_stride + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def rank_0(
    scores, totals, scan_tiles,
    group_bins, counts, counts_stride,
    whole, head_mass,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, items, kv_heads, query_len, tiles, length,
    TILES: tl.constexpr, SCAN_TILES: tl.constexpr, EARLY: tl.constexpr,
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
    total = denominators(totals, head_row, scan_tiles, SCAN_TILES)
    tl.store(whole + head_row * ROWS + tl.arange(0, ROWS), total)  # all programs of a row store the same
    untold = counts + head_row * counts_stride
    note_mass(value, total, entry, head_mass + head_row * ROWS, untold, 1)
    mine = head_row.to(tl.int64) * tl.num_programs(1) + lot
    tl.store(group_bins + mine * RANKED + tl.arange(0, RANKED), entry.to(tl.uint8))
    found = count_bins(counts + head_row * counts_stride, entry)


@triton.jit
def index_new(
    key,
    header, fingerprints, positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, kv_len,
):
    """Summarise every group whose last slot this step has written.

    All new keys get fingerprints.
    """
    space = (b * kv_heads + kv_head).to(tl.int64)
    d = tl.arange(0, DIM)
    inside = d < HEAD_DIM
    for number in range(written):
        slot = tl.load(positions + b * position_stride_b + number * position_stride_t).to(tl.int32)
        slot = tl.where(slot < 0, slot + kv_len, slot)
        mark = tl.sum(fingerprint(load_one_key(b, kv_head, slot, key)), 0)
        tl.store(fingerprints + space * slots + slot, mark)
    if (kv_head == 0) & (written > 0):
        last = written_slots(
            positions, position_stride_b, position_stride_t, written, b, kv_len, -1
        )
        move_end(header, b, tl.max(last, 0) + 1)


@triton.jit
def choose(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits,
    header, fingerprints, slots,
    tile_first, tile_end, tiles, positions, position_stride_b, position_stride_t, written,
    histogram, bins, bin_room, candidates, candidate_count, chosen_list, list_count, capacity, length,
    whole, head_mass,
    KEYS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, PAGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """List the selected keys. Every program finds the threshold itself, and the tokens above it."""
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
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
        mass = log_always(
            first, stop, sinks, always, queries, heads, b, t, kv_len,
            kv_head, key, length, KEYS,
        )
        whole += head_row * ROWS
        head_mass += head_row * ROWS
        cut, left, at_cut = threshold_of_mass(histogram + head_row * (2 * BINS) + PAGED * BINS, room, mass, whole, head_mass)
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
    key,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits,
    header, fingerprints, slots,
    tile_first, tile_end, tiles, positions, position_stride_b, position_stride_t, written,
    histogram, bins, bin_room, candidates, candidate_count, chosen_list, list_count, capacity, length,
    whole, head_mass,
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
                key,
                header, fingerprints, positions, position_stride_b, position_stride_t, written,
                b, kv_head, slots, kv_heads, kv_len,
            )
        return
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
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
            mass = log_always(
                first, stop, sinks, always, queries, heads, b, t, kv_len,
                kv_head, key, length, KEYS,
            )
            whole += head_row * ROWS
            head_mass += head_row * ROWS
            cut, left, at_cut = threshold_of_mass(histogram + head_row * (2 * BINS) + PAGED * BINS, room, mass, whole, head_mass)
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
                kv_head, key, value, value_stride_l, value_stride_d, length,
            )
        if fresh % splits == split:
            turns = (count + SAMPLED - 1) // SAMPLED
            number = fresh // splits % tl.maximum(turns, 1) * SAMPLED + tl.arange(0, SAMPLED)
            slot = tl.load(chosen_list + number, mask=number < count, other=0)
            compared = (number < count) & (slot < fresh)
            d = tl.arange(0, DIM)
            keys = load_key(b, kv_head, slot[:, None], d[None, :], compared[:, None], key)
            fingerprints += (b * kv_heads + kv_head).to(tl.int64) * slots
            if tl.max(changed_keys(keys, slot, compared, fingerprints), 0) > 0:
                tl.store(header, 2)
    else:
        top, total, result = read_all(
            queries, heads, top, total, result, b, t, kv_len, split, splits,
            kv_head, key, value, value_stride_l, value_stride_d, length,
            KEYS,
        )
    store_part(
        top, total, result, head_row, split, splits, partial, partial_top, partial_sum
    )
