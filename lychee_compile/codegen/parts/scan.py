"""Kernels that rank every token by its sketch, and what they share with those that rank pages."""

from __future__ import annotations

from lychee_compile.codegen.parts.terms import captured, indented, sees_range
from lychee_compile.codegen.specification import AttentionSpec, H, SparseSpec
from lychee_compile.kernels.sizes import BINS, PAGE, power_of_two

LARGEST = 12
"""log2 of the share that the last bin holds: estimates of the denominator may be that far off."""

TURN = 16
"""Chosen pages of one block that a program scores at a time."""

PARAMETERS = """weights, constants, totals,
    positions, position_stride_b, position_stride_t, written, header,
    tile_first, tile_end, bins, histogram,
    kv_len, slots, blocks, kv_heads: tl.constexpr, query_len, tiles"""
"""Of all scans, after what is their own."""


def emit_selection_constants(sparse: SparseSpec, paged: bool) -> str:
    """How much is read, how shares are counted, how much of a long context is looked at."""
    pages = f"""
PAGE_ROOM = tl.constexpr({-(-sparse.overfetch * sparse.budget // PAGE)})  # pages looked into
TURN = tl.constexpr({TURN})  # of them in one block, whose tokens are scored at a time"""
    return f"""
FLAT_TOKENS = {sparse.flat_tokens}  # slots up to which every token is scanned; pages beyond
BUDGET = tl.constexpr({sparse.budget})  # tokens read per KV head and query position
SINKS = tl.constexpr({sparse.sinks})  # first tokens, always read
RECENT = tl.constexpr({sparse.recent})  # last tokens, always read{pages if paged else ""}
BINS = tl.constexpr({BINS})  # of a histogram of shares; the first is for what cannot be chosen
LAST_BIN = tl.constexpr({(127 + LARGEST) * 8})  # a share of 2^{LARGEST}, in eighths of an octave
"""


def emit_bins(spec: AttentionSpec) -> str:
    """Shares of the softmax as bins of a histogram, and the bin that a budget ends in."""
    sparse = spec.sparse
    assert sparse is not None
    short = sparse.overfetch * sparse.budget < 2**20  # there are at most 2,048 of our own
    due = "left * own" if short else "left.to(tl.int64) * own"
    return f'''
HEADS = tl.constexpr({power_of_two(spec.group)})  # of a group, padded


@triton.jit
def fresh_from(positions, stride_b, stride_t, written, header, b, kv_len):
    """First slot that this step has written: it and what follows have no sketch yet."""
    fresh = tl.load(header + 1 + b)
    if written > 0:
        number = tl.arange(0, 16)
        slot = tl.load(
            positions + b * stride_b + number * stride_t, mask=number < written, other=2**30
        ).to(tl.int32)
        fresh = tl.min(tl.where(slot < 0, slot + kv_len, slot), 0)
    return fresh


@triton.jit
def denominators(totals, head_row, blocks, BLOCKS: tl.constexpr):
    """log2 of the softmax's denominator for the heads of a group, as blocks estimate it: [ROWS]."""
    block, g = tl.arange(0, BLOCKS), tl.arange(0, HEADS)
    parts = tl.load(
        totals + (head_row.to(tl.int64) * blocks + block)[:, None] * ROWS + g[None, :],
        mask=(block < blocks)[:, None], other=-1e30,
    )
    most = tl.max(parts, 0)
    total = most + tl.log2(tl.sum(tl.exp2(parts - most[None, :]), 0))
    return tl.gather(total, tl.minimum(tl.arange(0, ROWS), HEADS - 1), 0)


@triton.jit
def bins_of(value, total, possible):
    """The bin of each item's share [N], from the scores [ROWS, N] of a group's heads, in bits.

    Eight bins to a factor of two: a float's exponent and the first bits of its mantissa; the first
    bin where an item is not `possible` [N].
    """
    real = (tl.arange(0, ROWS) < GROUP)[:, None]
    share = tl.sum(tl.where(real, tl.exp2(value - total[:, None]), 0.0), 0)
    # Out of a product, eight threads have the same; gathered, every thread has items of its own.
    share = tl.gather(share, tl.arange(0, value.shape[1]), 0)
    place = (share.to(tl.int32, bitcast=True) >> 20) - (LAST_BIN - BINS + 1)
    return tl.where(possible & (share > 0), tl.minimum(tl.maximum(place, 1), BINS - 1), 0)


@triton.jit
def count_bins(histogram, entry):
    """Count the bins `entry` [N], but for the first, in a histogram, and return the counts."""
    counts = tl.histogram(entry, BINS)
    place = tl.arange(0, BINS)
    counts = tl.where(place > 0, counts, 0)
    tl.atomic_add(histogram + place, counts, mask=counts > 0, sem="relaxed")
    return counts


@triton.jit
def threshold(histogram, room, read=0):
    """The bin that `room` items end in, what is left for that bin, and how many are in it.

    `read` of those in each bin do not count.
    """
    place = tl.arange(0, BINS)
    counts = tl.load(histogram + place) - read
    through = tl.cumsum(counts, 0, reverse=True)
    # One search for all three: the bin, how many are in bins above it, and in itself.
    all_three = (place.to(tl.int64) << 24 | through - counts) << 24 | counts
    found = tl.max(tl.where(through > room, all_three, 0), 0)
    above = (found >> 24 & 0xFFFFFF).to(tl.int32)
    return (found >> 48).to(tl.int32), -(above - room), (found & 0xFFFFFF).to(tl.int32)


@triton.jit
def due(left, own, at_cut):
    """How many of our `own` items at the cut are chosen, where `left` of all `at_cut` are."""
    return ({due} // tl.maximum(at_cut, 1)).to(tl.int32)


@triton.jit
def choose(entry, cut, left, at_cut):
    """Which items are chosen, where each goes in a list of them, and how many there are.

    Those in bins above the cut, and of those at the cut the first, as many as are due to us.
    """
    kind = tl.where(entry > cut, 65536, tl.where((entry == cut) & (cut > 0), 1, 0))
    through = tl.cumsum(kind, 0)
    total = tl.max(through, 0)
    ours = due(left, total & 65535, at_cut)
    chosen = (kind > 1) | ((kind == 1) & ((through & 65535) <= ours))
    return chosen, (through >> 16) + tl.minimum(through & 65535, ours) - 1, (total >> 16) + ours
'''


def emit_ranks() -> str:
    """Where the best pages of each tile stand among the best of all."""
    return '''
@triton.jit
def chosen_of_tiles(ranks, cut, left, at_cut, tiles, TILES: tl.constexpr):
    """How many pages are chosen of each tile: [TILES].

    `ranks` has, for each tile, how many of its pages are in each bin or above.
    """
    tile = tl.arange(0, TILES)
    ranks += tile * BINS + cut
    above = tl.load(ranks + 1, mask=tile < tl.where(cut < BINS - 1, tiles, 0), other=0)
    through = tl.load(ranks, mask=tile < tl.where(cut > 0, tiles, 0), other=0)
    return above + due(left, tl.maximum(through - above, 0), at_cut)
'''


def emit_always_read(spec: AttentionSpec, unread: str = "fresh") -> str:
    """`always_read`: sinks and recent tokens, and all from the slot `unread` on."""
    names, counted = captured(spec), _emit_bins_read(spec)
    ends = """    tile = tl.arange(0, TILES)
    inside = tile < tiles
    first = tl.min(tl.load(tile_first + head_row * tiles + tile, mask=inside, other=2**30), 0)
    end = tl.max(tl.load(tile_end + head_row * tiles + tile, mask=inside, other=0), 0)"""
    if sees_range(spec):
        ends, counted = f"    first, end = seen_range(b, t, kv_len{names})", ""
    return f'''
@triton.jit
def always_read(
    tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh{names}, TILES: tl.constexpr
):
    """Slots [first, sinks_end) and [recent_start, end), which are read whatever they hold."""
{ends}
    sinks_end = tl.minimum(first + SINKS, end)
    recent_start = tl.maximum(tl.minimum(end - RECENT, {unread}), sinks_end)
    return first, sinks_end, recent_start, end
{counted}'''


def _emit_bins_read(spec: AttentionSpec) -> str:
    """`bins_read`, where a scan does not know yet which tokens are read anyway."""
    assert spec.sparse is not None
    most = power_of_two(spec.sparse.sinks + spec.sparse.recent)
    return f'''

@triton.jit
def bins_read(bins, first, begin, stop, known):
    """How many of the slots [first, begin) and [stop, known) are in each of the bins."""
    number = tl.arange(0, {most})
    slot = tl.where(number < begin - first, first + number, stop + number - (begin - first))
    inside = slot < tl.maximum(known, begin)
    return tl.histogram(tl.load(bins + slot, mask=inside, other=0).to(tl.int32), BINS)
'''


def emit_scan(spec: AttentionSpec) -> str:
    """`scan_tokens`: bins of all tokens, but those that are read anyway where these are known."""
    extra, possible = captured(spec), "slot < fresh"
    if sees_range(spec):
        possible = "(slot >= first + SINKS) & (slot < tl.minimum(end - RECENT, fresh))"
    body = where_seen(
        spec,
        "TILE",
        f"""slot = tile * TILE + tl.arange(0, TILE)
inside = slot < kv_len
space = (b * kv_heads + kv_head).to(tl.int64) * slots
packed, packed_coarse = load_codes(
    fine + space * FINE_BYTES, coarse + space * COARSE_BYTES, slot, inside
)
fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
if EARLY:
    tl.extra.cuda.gdc_wait()
s = sketch_scores(
    packed, packed_coarse, weights, constants,
    head_row.to(tl.int64) * blocks + tile * TILE // BLOCK,
)
total = denominators(totals, head_row, blocks, BLOCKS)
value = score(s, b, h, t, slot[None, :], inside[None, :]{extra})
{seen_slots(spec)}{"" if sees_range(spec) else _ENDS}
entry = bins_of(value, total, seen & ({possible}))
tl.store(bins + head_row.to(tl.int64) * slots + slot, entry.to(tl.uint8))
count_bins(histogram + head_row * (2 * BINS), entry)""",
    )
    return f'''
@triton.jit
def scan_tokens(
    fine, coarse, {PARAMETERS}{extra},
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):
    """Bins, uint8, of the shares of TILE tokens, by their sketches."""
{query_of_program("tile")}
{body}
'''


def query_of_program(other: str) -> str:
    """Which query, of which heads, a program of a scan is for, and what its `other` number is."""
    return f"""    head_row, {other} = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    g = tl.arange(0, ROWS)
    h = (kv_head * GROUP + tl.minimum(g, GROUP - 1))[:, None]"""


def where_seen(
    spec: AttentionSpec, size: str, body: str, before: str = "", otherwise: str = ""
) -> str:
    """A program's work, or what it does instead where its query sees nothing."""
    start = f"{before}if EARLY:\n    tl.extra.cuda.gdc_launch_dependents()\n"
    if not sees_range(spec):
        return indented(start + body, 4)
    check = f"""first, end = seen_range(b, t, kv_len{captured(spec)})
if (tile * {size} < end) & (tile * {size} + {size} > first):
"""
    instead = f"\nelse:\n{indented(otherwise, 4)}" if otherwise else ""
    return indented(start + check + indented(body, 4) + instead, 4)


def seen_slots(spec: AttentionSpec) -> str:
    """Which slots are seen: one by one, or, where heads see different ones, by any of them.

    What a head alone does not see weighs nothing with it.
    """
    extra = captured(spec)
    if not spec.visible.has(H):
        return f"seen = visible(b, kv_head * GROUP, t, slot, kv_len, inside{extra})"
    return f"""each = visible(b, h, t, slot[None, :], kv_len, inside[None, :]{extra})
value = tl.where(each, value, float("-inf"))
seen = tl.max(each.to(tl.int32), 0) > 0"""


_ENDS = """
tl.store(tile_first + head_row * tiles + tile, tl.min(tl.where(seen, slot, 2**30), 0))
tl.store(tile_end + head_row * tiles + tile, tl.max(tl.where(seen, slot + 1, 0), 0))"""
"""Keep the first and the last slot that any head of the group sees in this tile."""
