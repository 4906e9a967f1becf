"""Kernels for contexts too long to scan every token: pages are ranked, then tokens of the best."""

from __future__ import annotations

from lychee_compile.codegen.parts.scan import PARAMETERS, query_of_program, seen_slots, where_seen
from lychee_compile.codegen.parts.terms import captured, indented, sees_range
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.gpu.lychee.layout import planes

PLANNED = 64
"""Turns that are planned at a time."""


def emit_page_scores(spec: AttentionSpec) -> str:
    """`page_scores`: the log of the mean of exp(score) over the keys of a page."""
    fine, _ = planes(spec.head_dim)
    products = "".join(
        f"""
    weight = load_weights(weights, mine, {field.first}, {field.width}, FINE_COLUMNS)
    total = tl.dot(weight, codes(packed, {field.shift}, {2**field.bits - 1}), total)"""
        for field in fine
    )
    return f'''
@triton.jit
def load_pages(pages, page, inside):
    """Packed means, uint8 [FINE_COLUMNS, N], of the pages [N]."""
    byte = tl.arange(0, FINE_COLUMNS)
    return tl.load(
        pages + page[None, :] * FINE_BYTES + byte[:, None],
        mask=inside[None, :] & (byte < FINE_BYTES)[:, None], other=0,
    )


@triton.jit
def page_scores(packed, weights, constants, mine):
    """Scores [ROWS, N], as products q.k, that stand for the keys of pages of the block `mine`."""
    constant = tl.load(constants + mine * ROWS + tl.arange(0, ROWS))
    total = tl.zeros([ROWS, packed.shape[1]], tl.float32){products}
    return PAGE_STEP * total + constant[:, None]
'''


def emit_page_scans(spec: AttentionSpec) -> str:
    """`scan_pages` and `scan_chosen`."""
    extra = captured(spec)
    body = where_seen(
        spec,
        "BLOCK",
        f"""page = tile * PER_BLOCK + tl.arange(0, PER_BLOCK)
space = (b * kv_heads + kv_head).to(tl.int64) * (slots // PAGE)
packed = load_pages(pages + space * FINE_BYTES, page, page * PAGE < slots)
fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
{_page_ends(spec)}
if EARLY:
    tl.extra.cuda.gdc_wait()
s = page_scores(packed, weights, page_constants, head_row.to(tl.int64) * blocks + tile)
value = score(s, b, h, t, (page * PAGE)[None, :], held[None, :]{extra})
total = denominators(totals, head_row, blocks, BLOCKS)
tl.store(whole + head_row * ROWS + g, total)  # all programs of a row store the same
entry = bins_of(value, total, held)
tl.store(bins + head_row.to(tl.int64) * (blocks * PER_BLOCK) + page, entry.to(tl.uint8))
counts = count_bins(histogram + head_row * (2 * BINS), entry)
tl.store(mine + tl.arange(0, BINS), tl.cumsum(counts, 0, reverse=True))""",
        before="ranks += head_row.to(tl.int64) * tiles * BINS\nmine = ranks + tile * BINS\n",
        otherwise="tl.store(mine + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))",
    )
    return f'''
@triton.jit
def plan_turns(
    histogram, ranks, plan, limits, candidate_count, tiles, turns, TILES: tl.constexpr
):
    """Deal the best pages of a row out in turns of up to TURN of one block.

    For each turn: its block, how many chosen pages are in blocks and turns before it, how many of
    the latter are of its block, and how many it has. And what `choose` has to know.
    """
    cut, left, at_cut = threshold(histogram, PAGE_ROOM)
    of_tile = chosen_of_tiles(ranks, cut, left, at_cut, tiles, TILES)
    tl.store(candidate_count, tl.sum(of_tile, 0) * PAGE)
    tl.store(limits, cut)
    tl.store(limits + 1, left)
    tl.store(limits + 2, at_cut)
    own = (of_tile + TURN - 1) // TURN
    through, before = tl.cumsum(own, 0), tl.cumsum(of_tile, 0) - of_tile
    for start in range(0, turns, {PLANNED}):
        number = start + tl.arange(0, {PLANNED})
        block = tl.sum((through[None, :] <= number[:, None]).to(tl.int32), 1)
        place = tl.minimum(block, TILES - 1)
        skipped = (number - tl.gather(through - own, place, 0)) * TURN
        count = tl.minimum(tl.gather(of_tile, place, 0) - skipped, TURN)
        entry, inside = plan + number * 4, number < turns
        tl.store(entry, block, mask=inside)
        tl.store(entry + 1, tl.gather(before, place, 0) + skipped, mask=inside)
        tl.store(entry + 2, skipped, mask=inside)
        tl.store(entry + 3, tl.where(block < tiles, count, 0), mask=inside)


@triton.jit
def scan_pages(
    pages, page_constants, ranks, whole, arrivals, plan, turns, limits, candidate_count,
    {PARAMETERS}{extra},
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):
    """Bins, uint8, of the shares of the pages of one block, and how many are in each or above.

    The last program of a row plans what `scan_chosen` does.
    """
    PER_BLOCK: tl.constexpr = BLOCK // PAGE
{query_of_program("tile")}
{body}
    if EARLY:
        tl.extra.cuda.gdc_wait()  # also where nothing is seen: `arrivals` are cleared before
    tl.debug_barrier()
    if tl.atomic_add(arrivals + head_row, 1) == tiles - 1:
        plan_turns(
            histogram + head_row * (2 * BINS), ranks, plan + head_row.to(tl.int64) * turns * 4,
            limits + head_row * 4, candidate_count + head_row, tiles, turns, BLOCKS,
        )


@triton.jit
def scan_chosen(
    fine, coarse, whole, page_bins, plan, turns, limits, candidates, candidate_room,
    {PARAMETERS}{extra},
    BLOCK: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr,
):
    """The tokens of the best pages of all blocks in a row, and their bins."""
    PER_BLOCK: tl.constexpr = BLOCK // PAGE
{query_of_program("part")}
    histogram += head_row * (2 * BINS) + BINS
    page_bins += head_row.to(tl.int64) * (blocks * PER_BLOCK)
    bins += head_row.to(tl.int64) * candidate_room
    candidates += head_row.to(tl.int64) * candidate_room
    plan += head_row.to(tl.int64) * turns * 4
    limits += head_row * 4
    space = (b * kv_heads + kv_head).to(tl.int64) * slots
    number, lane = tl.arange(0, PER_BLOCK), tl.arange(0, TURN * PAGE)
    fresh = fresh_from(positions, position_stride_b, position_stride_t, written, header, b, kv_len)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    _, begin, stop, _ = always_read(
        tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh{extra}, TILES
    )
    total = tl.load(whole + head_row * ROWS + g)
    cut, left, at_cut = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2)
    for turn in range(part, turns, tl.num_programs(1)):
        block, first_rank = tl.load(plan + turn * 4), tl.load(plan + turn * 4 + 1)
        skipped, count = tl.load(plan + turn * 4 + 2), tl.load(plan + turn * 4 + 3)
        if count > 0:
            entry = tl.load(page_bins + block * PER_BLOCK + number)
            _, place, _ = choose(entry.to(tl.int32), cut, left, at_cut)
            # The chosen page of a rank comes after all up to which there are no more than that.
            rank = skipped + tl.arange(0, TURN)
            page = tl.sum((place[None, :] < rank[:, None]).to(tl.int32), 1)
            slot = ((block * PER_BLOCK + page) * PAGE)[:, None] + tl.arange(0, PAGE)[None, :]
            slot = tl.reshape(slot, [TURN * PAGE])
            listed = lane < count * PAGE
            inside = listed & (slot >= begin) & (slot < stop)
            packed, packed_coarse = load_codes(
                fine + space * FINE_BYTES, coarse + space * COARSE_BYTES, slot, inside
            )
            s = sketch_scores(
                packed, packed_coarse, weights, constants, head_row.to(tl.int64) * blocks + block
            )
            value = score(s, b, h, t, slot[None, :], inside[None, :]{extra})
{indented(seen_slots(spec), 12)}
            found = bins_of(value, total, seen)
            into = first_rank * PAGE + lane
            tl.store(candidates + into, slot, mask=listed)
            tl.store(bins + into, found.to(tl.uint8), mask=listed)
            count_bins(histogram, found)
'''


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
