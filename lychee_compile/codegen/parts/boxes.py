"""Quest's page selection (arXiv 2406.10774): pages ranked by the best corner of a box around keys.

Chosen pages are read whole. See `kernels/policies/decode/quest.py` for what differs from the paper.
"""

from __future__ import annotations

from lychee_compile.codegen.parts.attend import IndexUpdate
from lychee_compile.codegen.parts.common import precision
from lychee_compile.codegen.parts.scan import LARGEST
from lychee_compile.codegen.parts.terms import captured, indented, sees_range
from lychee_compile.codegen.specification import AttentionSpec, H
from lychee_compile.kernels.sizes import BINS, PAGE, power_of_two

RANKED = 512
"""Pages that a program ranks."""
BYTES_AT_ONCE = 32768
"""Of boxes, that a program of the scan has in flight at a time."""

UPKEEP = IndexUpdate(
    "header, least, greatest, slots",
    """box_new(
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    header, least, greatest, positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, kv_len,
)""",
)
"""A page that becomes full gets its box."""


def emit_box_constants(spec: AttentionSpec) -> str:
    """How much is read, how shares are counted, how many pages a program takes."""
    assert spec.sparse is not None
    box = 2 * power_of_two(spec.head_dim, 16) * (4 if spec.dtype == "float32" else 2)
    return f"""
BUDGET = tl.constexpr({spec.sparse.budget})  # tokens read per KV head and query position
SINKS = tl.constexpr(0)  # first tokens, always read: none
RECENT = tl.constexpr(1)  # last tokens, always read, besides the page being written
PAGE = tl.constexpr({PAGE})  # slots summarised together
SCANNED = tl.constexpr({max(BYTES_AT_ONCE // box, 16)})  # pages scored at a time
RANKED = tl.constexpr({RANKED})  # pages that a program ranks
BINS = tl.constexpr({BINS})  # of a histogram of shares; the first is for what cannot be chosen
LAST_BIN = tl.constexpr({(127 + LARGEST) * 8})  # a share of 2^{LARGEST}, in eighths of an octave
"""


def emit_scan(spec: AttentionSpec) -> str:
    """`scan_boxes`: scores of all pages, and what a softmax over them sums up to."""
    extra = captured(spec)
    before, shown, after = _tokens_shown(spec)
    return f'''
@triton.jit
def corner_scores(above, below, least, greatest, page, held):
    """q.k in the best corner of the box of each page [N], for queries [ROWS, DIM]: [ROWS, N].

    It is the sum of max(q least, q greatest); `above` and `below` are the queries' parts of either
    sign.
    """
    d = tl.arange(0, DIM)
    place = page[:, None] * HEAD_DIM + d[None, :]
    inside = held[:, None] & (d < HEAD_DIM)[None, :]
    high = tl.load(greatest + place, mask=inside, other=0.0)
    low = tl.load(least + place, mask=inside, other=0.0)
    s = tl.dot(above, tl.trans(high){precision(spec)})
    return tl.dot(below, tl.trans(low), s{precision(spec)})


@triton.jit
def scan_boxes(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    least, greatest, scores, totals, histogram,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, pages, kv_heads, query_len, tiles{extra},
    STEPS: tl.constexpr, EARLY: tl.constexpr,
):
    """Log2 of the estimated mass of STEPS * SCANNED pages for each head, and of its sum.

    A page's score stands for every token that some head sees of it; pages that may not be chosen
    have no mass. Clears what later kernels count.
    """
    head_row, tile = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    queries, heads = load_queries(
        query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
    )
    wide = queries.to(tl.float32)
    above = tl.maximum(wide, 0.0).to(queries.dtype)
    below = tl.minimum(wide, 0.0).to(queries.dtype)
    space = (b * kv_heads + kv_head).to(tl.int64) * pages * HEAD_DIM
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    fresh = fresh // PAGE * PAGE
{indented(before, 4)}
    g = tl.arange(0, ROWS)
    scores += (head_row.to(tl.int64) * GROUP + g)[:, None] * pages
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    for number in range(STEPS):
        page = (tile * STEPS + number) * SCANNED + tl.arange(0, SCANNED)
{indented(shown, 8)}
        s = corner_scores(above, below, least + space, greatest + space, page, held)
        mass = score(s, b, heads[:, None], t, (page * PAGE)[None, :], held[None, :]{extra})
        mass += tl.log2(tl.maximum(shown, 1).to(tl.float32))[None, :]
        mass = tl.where((shown > 0)[None, :], mass, float("-inf"))
        tl.store(scores + page[None, :], mass, mask=(g < GROUP)[:, None] & (page < pages)[None, :])
        most = tl.maximum(top, tl.max(mass, 1))
        total = total * tl.exp2(top - most) + tl.sum(tl.exp2(mass - most[:, None]), 1)
        top = most
    whole = tl.where(total > 0, top + tl.log2(total), -1e30)
    tl.store(totals + (head_row.to(tl.int64) * tiles + tile) * ROWS + g, whole){after}
    if tile == 0:
        entry = tl.arange(0, 2 * BINS)
        tl.store(histogram + head_row * (2 * BINS) + entry, tl.zeros([2 * BINS], tl.int32))
'''


def emit_choice(spec: AttentionSpec) -> str:
    """`rank_boxes` and `list_boxes`: bins of the pages' shares, and the slots of the best pages."""
    extra = captured(spec)
    return f'''
@triton.jit
def rank_boxes(
    scores, totals, page_bins, ranks, histogram, pages, tiles,
    TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """Bins, uint8, of the shares of RANKED pages, and how many are in each or above.

    None that may be chosen is in the first.
    """
    head_row, lot = tl.program_id(0), tl.program_id(1)
    g, page = tl.arange(0, ROWS)[:, None], lot * RANKED + tl.arange(0, RANKED)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(
        scores + (head_row.to(tl.int64) * GROUP + g) * pages + page[None, :],
        mask=(g < GROUP) & (page < pages)[None, :], other=float("-inf"),
    )
    possible = tl.max(value, 0) > float("-inf")
    entry = bins_of(value, denominators(totals, head_row, tiles, TILES), possible)
    entry = tl.maximum(entry, possible.to(tl.int32))
    mine = head_row.to(tl.int64) * tl.num_programs(1) + lot
    tl.store(page_bins + mine * RANKED + tl.arange(0, RANKED), entry.to(tl.uint8))
    counts = count_bins(histogram + head_row * (2 * BINS), entry)
    tl.store(ranks + mine * BINS + tl.arange(0, BINS), tl.cumsum(counts, 0, reverse=True))


@triton.jit
def list_boxes(
    page_bins, ranks, histogram, candidates, bins, candidate_room, candidate_count,
    positions, position_stride_b, position_stride_t, written, header, tile_first, tile_end,
    kv_len, kv_heads, query_len, tiles{extra},
    TILES: tl.constexpr, LOTS: tl.constexpr, EARLY: tl.constexpr,
):
    """The slots of the best of RANKED pages, as candidates that are read for certain.

    So many pages are chosen as fit into the budget whole; `attend` finds no token to leave out.
    """
    head_row, lot = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    _, begin, stop, end = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh{extra}, TILES
    )
    room = tl.maximum(BUDGET - (end - stop), 0)
    room = tl.where(stop - begin <= room, 2**30, room // PAGE)
    lots, number = tl.num_programs(1), tl.arange(0, RANKED)
    mine = head_row.to(tl.int64) * lots + lot
    entry = tl.load(page_bins + mine * RANKED + number).to(tl.int32)
    cut, left, at_cut = threshold(histogram + head_row * (2 * BINS), room)
    of_lot = chosen_of_tiles(ranks + (mine - lot) * BINS, cut, left, at_cut, lots, LOTS)
    before = tl.sum(tl.where(tl.arange(0, LOTS) < lot, of_lot, 0), 0)
    chosen, place, _ = choose(entry, cut, left, at_cut)
    slot = ((lot * RANKED + number) * PAGE)[:, None] + tl.arange(0, PAGE)[None, :]
    into = head_row.to(tl.int64) * candidate_room
    into += ((before + place) * PAGE)[:, None] + tl.arange(0, PAGE)[None, :]
    within = (slot >= begin) & (slot < stop)
    tl.store(candidates + into, slot, mask=chosen[:, None])
    tl.store(bins + into, tl.where(within, BINS - 1, 0).to(tl.uint8), mask=chosen[:, None])
    if lot == 0:
        tl.store(candidate_count + head_row, tl.sum(of_lot, 0) * PAGE)
'''


def emit_update() -> str:
    """`box_new`: the boxes of pages that a step has completed."""
    return '''
@triton.jit
def box_new(
    key, stride_b, stride_h, stride_l, stride_d,
    header, least, greatest, positions, position_stride_b, position_stride_t, written,
    b, kv_head, slots, kv_heads, kv_len,
):
    """Put a box around the keys of every page whose last slot this step has written."""
    space = (b * kv_heads + kv_head).to(tl.int64)
    d, inner = tl.arange(0, DIM), tl.arange(0, PAGE)
    key += b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    for number in range(written):
        slot = tl.load(positions + b * position_stride_b + number * position_stride_t).to(tl.int32)
        slot = tl.where(slot < 0, slot + kv_len, slot)
        page = slot // PAGE
        if slot % PAGE == PAGE - 1:
            place = (page * PAGE + inner).to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
            keys = tl.load(key + place, mask=(d < HEAD_DIM)[None, :], other=0.0)
            into = (space * (slots // PAGE) + page) * HEAD_DIM + d
            kind = least.dtype.element_ty
            tl.store(least + into, tl.min(keys, 0).to(kind), mask=d < HEAD_DIM)
            tl.store(greatest + into, tl.max(keys, 0).to(kind), mask=d < HEAD_DIM)
        if kv_head == 0:
            tl.store(header + 1 + b, slot + 1)
'''


def _tokens_shown(spec: AttentionSpec) -> tuple[str, str, str]:
    """Before the loop over pages: what is seen. In it: `shown`, tokens of each page, and `held`.

    After it, where what is seen is no range: first and last slot seen are kept for later kernels.
    """
    extra = captured(spec)
    if sees_range(spec):
        before = f"""first, end = seen_range(b, t, kv_len{extra})
stop = tl.minimum(end - RECENT, fresh)"""
        shown = """shown = tl.minimum(page * PAGE + PAGE, stop) - tl.maximum(page * PAGE, first)
held = shown > 0"""
        return before, shown, ""
    others = f"""
for other in tl.static_range(1, GROUP):
    seen |= visible(b, kv_head * GROUP + other, t, slot, kv_len, slot < kv_len{extra})"""
    shown = f"""slot = page[None, :] * PAGE + tl.arange(0, PAGE)[:, None]
seen = visible(b, kv_head * GROUP, t, slot, kv_len, slot < kv_len{extra}){
        others if spec.visible.has(H) else ""
    }
shown = tl.sum((seen & (slot < fresh)).to(tl.int32), 0)
held = page * PAGE < fresh
first = tl.minimum(first, tl.min(tl.min(tl.where(seen, slot, 2**30), 0), 0))
end = tl.maximum(end, tl.max(tl.max(tl.where(seen, slot + 1, 0), 0), 0))"""
    after = """
    tl.store(tile_first + head_row * tiles + tile, first)
    tl.store(tile_end + head_row * tiles + tile, end)"""
    return "first, end = tl.full([], 2**30, tl.int32), tl.full([], 0, tl.int32)", shown, after
