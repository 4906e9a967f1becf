"""Kernels that rank every token by its sketch, or every page, and then the tokens of the best."""

from __future__ import annotations

from lychee_compile.codegen.parts.terms import captured, indented, sees_range
from lychee_compile.codegen.specification import AttentionSpec, H, SparseSpec
from lychee_compile.kernels.launch_parts import BINS, power_of_two
from lychee_compile.kernels.slot_layout import BLOCK, PAGE

LARGEST = 12
"""log2 of the share that the last bin holds: estimates of the denominator may be that far off."""

TURN = 16
"""Chosen pages of one block that a program scores at a time."""

_PARAMETERS = """weights, constants, totals,
    positions, position_stride_b, position_stride_t, written, header,
    tile_first, tile_end, bins, histogram,
    kv_len, slots, blocks, kv_heads, query_len, tiles"""


def emit_selection_constants(sparse: SparseSpec, paged: bool) -> str:
    """How much is read, how shares are counted, how much of a long context is looked at."""
    pages = f"""
PAGE_ROOM = tl.constexpr({-(-sparse.overfetch * sparse.budget // PAGE)})  # pages looked into
TURN = tl.constexpr({TURN})  # of them in one block, whose tokens are scored at a time
PER_BLOCK = tl.constexpr({BLOCK // PAGE})  # pages of a block"""
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
    short = sparse.overfetch * sparse.budget < 2**20  # there are at most 1,024 of our own
    due = "left * own" if short else "left.to(tl.int64) * own"
    return f'''
HEADS = tl.constexpr({power_of_two(spec.group)})  # of a group, padded


@triton.jit
def fresh_from(positions, stride_b, stride_t, written, header, b, kv_len):
    """First slot that this step has written: it and what follows have no sketch yet."""
    fresh = tl.load(header + 1)
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
    body = _where_seen(
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
{_seen(spec)}{"" if sees_range(spec) else _ENDS}
entry = bins_of(value, total, seen & ({possible}))
tl.store(bins + head_row.to(tl.int64) * slots + slot, entry.to(tl.uint8))
count_bins(histogram + head_row * (2 * BINS), entry)""",
    )
    return f'''
@triton.jit
def scan_tokens(
    fine, coarse, {_PARAMETERS}{extra},
    BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):
    """Bins, uint8, of the shares of TILE tokens, by their sketches."""
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    g = tl.arange(0, ROWS)
    h = (kv_head * GROUP + tl.minimum(g, GROUP - 1))[:, None]
{body}
'''


def emit_page_scans(spec: AttentionSpec) -> str:
    """`scan_pages` and `scan_chosen`, for contexts too long to scan every token."""
    extra = captured(spec)
    body = _where_seen(
        spec,
        "BLOCK",
        f"""page = tile * PER_BLOCK + tl.arange(0, PER_BLOCK)
space = (b * kv_heads + kv_head).to(tl.int64) * (slots // PAGE)
packed = load_pages(pages + space * FINE_BYTES, page, page * PAGE < slots)
fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
{_page_ends(spec)}
queries, heads = load_queries(
    query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
)
mine = (b * kv_heads + kv_head).to(tl.int64) * blocks + tile
s = page_scores(
    packed, queries, axes + mine * (KEPT * HEAD_DIM), centre + mine * HEAD_DIM,
    step + mine * KEPT, spread + mine * KEPT_FINE,
)
value = score(s, b, h, t, (page * PAGE)[None, :], held[None, :]{extra})
if EARLY:
    tl.extra.cuda.gdc_wait()  # for the denominators alone
total = denominators(totals, head_row, blocks, BLOCKS)
tl.store(whole + head_row * ROWS + g, total)  # all programs of a row store the same
entry = bins_of(value, total, held)
tl.store(bins + head_row.to(tl.int64) * (blocks * PER_BLOCK) + page, entry.to(tl.uint8))
counts = count_bins(histogram + head_row * (2 * BINS), entry)
tl.store(ranks + tl.arange(0, BINS), tl.cumsum(counts, 0, reverse=True))""",
        before="ranks += (head_row.to(tl.int64) * tiles + tile) * BINS\n",
        otherwise="tl.store(ranks + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))",
    )
    scored = indented(
        f"""chosen, place, _ = choose(entry.to(tl.int32), cut, left, at_cut)
first_rank = before + turn * TURN
rank = before + place
ours = (rank >= first_rank) & (rank < first_rank + count)
tl.store(page_list + rank, block * PER_BLOCK + number, mask=chosen & ours)
tl.debug_barrier()
lane = tl.arange(0, TURN * PAGE)
listed = lane < count * PAGE
slot = tl.load(page_list + first_rank + lane // PAGE, mask=listed, other=0) * PAGE
slot += lane % PAGE
inside = listed & (slot >= begin) & (slot < stop)
packed, packed_coarse = load_codes(
    fine + space * FINE_BYTES, coarse + space * COARSE_BYTES, slot, inside
)
s = sketch_scores(
    packed, packed_coarse, weights, constants, head_row.to(tl.int64) * blocks + block
)
value = score(s, b, h, t, slot[None, :], inside[None, :]{extra})
{_seen(spec)}
found = bins_of(value, total, seen)
into = first_rank * PAGE + lane
tl.store(candidates + into, slot, mask=listed)
tl.store(bins + into, found.to(tl.uint8), mask=listed)
count_bins(counts + BINS, found)""",
        12,
    )
    return f'''
@triton.jit
def scan_pages(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    pages, axes, centre, step, spread, ranks, whole, {_PARAMETERS}{extra},
    BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):
    """Bins, uint8, of the shares of the pages of one block, and how many are in each or above."""
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    g = tl.arange(0, ROWS)
    h = (kv_head * GROUP + tl.minimum(g, GROUP - 1))[:, None]
{body}


@triton.jit
def scan_chosen(
    fine, coarse, whole, page_bins, ranks, page_list, candidates, candidate_count, candidate_room,
    {_PARAMETERS}{extra},
    TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """The tokens of the best pages of all blocks in a row, and their bins."""
    head_row, part = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    g = tl.arange(0, ROWS)
    h = (kv_head * GROUP + tl.minimum(g, GROUP - 1))[:, None]
    counts = histogram + head_row * (2 * BINS)
    page_bins += head_row.to(tl.int64) * (blocks * PER_BLOCK)
    bins += head_row.to(tl.int64) * candidate_room
    candidates += head_row.to(tl.int64) * candidate_room
    page_list += head_row.to(tl.int64) * (candidate_room // PAGE)
    space = (b * kv_heads + kv_head).to(tl.int64) * slots
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, begin, stop, _ = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh{extra}, TILES
    )
    # The first turns of every block are shared out before it is known how many it has.
    programs, number = tl.num_programs(1), tl.arange(0, PER_BLOCK)
    ahead = programs // blocks
    block, turn = part % blocks, tl.where(part < ahead * blocks, part // blocks, PER_BLOCK)
    entry = tl.load(page_bins + block * PER_BLOCK + number)
    total = tl.load(whole + head_row * ROWS + g)
    cut, left, at_cut = threshold(counts, PAGE_ROOM)
    ranks += head_row.to(tl.int64) * tiles * BINS
    of_tile = chosen_of_tiles(ranks, cut, left, at_cut, tiles, TILES)
    if part == 0:
        tl.store(candidate_count + head_row, tl.sum(of_tile, 0) * PAGE)
    tile = tl.arange(0, TILES)
    turns = tl.cumsum(tl.maximum((of_tile + TURN - 1) // TURN - ahead, 0), 0)
    last = programs + tl.max(turns, 0)
    for later in range(part, last, programs):
        both = tl.where(tile < block, of_tile, tl.where(tile == block, of_tile << 20, 0))
        both = tl.sum(both, 0)
        before, count = both & 0xFFFFF, tl.minimum((both >> 20) - turn * TURN, TURN)
        if count > 0:
{scored}
        if later + programs < last:
            past = turns <= later
            block = tl.minimum(tl.sum(past.to(tl.int32), 0), blocks - 1)
            turn = ahead + later - tl.max(tl.where(past, turns, 0), 0)
            entry = tl.load(page_bins + block * PER_BLOCK + number)
'''


def _where_seen(
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


def _seen(spec: AttentionSpec) -> str:
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


def _page_ends(spec: AttentionSpec) -> str:
    """Which pages hold a key to choose; first and last slot seen, where that is no range."""
    if sees_range(spec):
        return "held = (page * PAGE < tl.minimum(end, fresh)) & (page * PAGE + PAGE > first)"
    return f"""slot = page[None, :] * PAGE + tl.arange(0, PAGE)[:, None]
anywhere = visible(b, kv_head * GROUP, t, slot, kv_len, slot < kv_len{captured(spec)})
held = tl.max((anywhere & (slot < fresh)).to(tl.int32), 0) > 0
first = tl.min(tl.min(tl.where(anywhere, slot, 2**30), 0), 0)
end = tl.max(tl.max(tl.where(anywhere, slot + 1, 0), 0), 0)
tl.store(tile_first + head_row * tiles + tile, first)
tl.store(tile_end + head_row * tiles + tile, end)"""
