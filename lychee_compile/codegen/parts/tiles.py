"""Kernels for whole sequences: every tile of queries looks for the keys that matter to it.

`ask`      what a tile reads in any case, centres of its parts, denominators of their softmaxes
`scan`     of every key the largest share that a part of a tile gives it, as a bin of a histogram
`choose`   the bin that a tile's budget ends in, and the list of its keys (tile_choice.py)
`attend`   attention of a tile over that list, and over what it reads in any case (tile_attend.py)

What a tile reads, which keys it may choose from and how shares are estimated is the specification
of `kernels/reference/tiles.py` and `kernels/policies/prefill/lychee.py`;
but where a mask has holes a
part votes for what its first, middle or last query sees; only what lies at the ends is read in any
case, and what the last query of a part sees and none before the part is chosen before all else.

Numbers that change from prompt to prompt are not specialised on: nothing is compiled for a length.
"""

from __future__ import annotations

from lychee_compile.codegen.parts.common import emit_logits, emit_sizes, emit_tuned, precision
from lychee_compile.codegen.parts.terms import captured, sees_range
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.policies.prefill.lychee import CENTRES_PER_TILE, SAMPLE
from lychee_compile.kernels.sizes import BINS, QUERY_TILE


def _seen_by(spec: AttentionSpec) -> str:
    """`seen_by`: what the parts of a tile vote on."""
    names, wide = captured(spec), wide_index(spec)
    heading = f"""@triton.jit
def seen_by(b, h, begin, query_len, slot, kv_len, inside{names}):
    \"\"\"Which of the slots that are `inside` parts see that begin at queries `begin`.

    And which of them no query before the part sees, but its last does. One of slots and parts is a
    row, the other a column.
    \"\"\""""
    if sees_range(spec):
        return f"""{heading}
    seen = inside & (begin >= 0)
    return seen, seen"""
    at = f"tl.minimum(%s, query_len - 1){wide}"
    call = f"visible(b, h, {at}, slot, kv_len, inside{names})"
    return f"""{heading}
    before = {call % "tl.maximum(begin - 1, 0)"}
    first = {call % "begin"}
    middle = {call % "begin + PART // 2"}
    last = {call % "begin + PART - 1"}
    seen = first | middle | last
    return seen & (begin >= 0), last & (before == 0) & (begin >= 0)"""


def wide_index(spec: AttentionSpec) -> str:
    """Makes 64 bits of an index where a mask may have more elements than 32 bits count."""
    return ".to(tl.int64)" if any(each.rank > 1 for each in spec.captured) else ""


def tile_place(spec: AttentionSpec, row: str) -> str:
    """Which tile, of which row of the batch and head, a program is for."""
    wide = wide_index(spec)
    return f"""head, tile = {row} // tiles, {row} % tiles
    b, h = (head // heads){wide}, (head % heads){wide}"""


def emit_tile_constants(spec: AttentionSpec) -> str:
    """Sizes of this site, of tiles and of a histogram."""
    assert spec.tiles is not None
    return f"""{emit_sizes(spec)}
{emit_tuned(spec)}
TILE = tl.constexpr({QUERY_TILE})  # query positions that read the same keys
PARTS = tl.constexpr({CENTRES_PER_TILE})  # parts of a tile, each of which asks with its centre
PART = tl.constexpr({QUERY_TILE // CENTRES_PER_TILE})
SAMPLE = tl.constexpr({SAMPLE})  # one key in so many stands for all in a denominator
SINKS = tl.constexpr({spec.tiles.sinks})  # first tokens, always read
RECENT = tl.constexpr({spec.tiles.recent})  # last tokens, and those near the tile's own: likewise
BINS = tl.constexpr({BINS})  # of a histogram of shares; 0: not to choose from, 1: no part sees it
LAST_BIN = tl.constexpr({BINS - 8})  # a share of 1, in eighths of an octave{emit_logits(spec)}
"""


def emit_edges(spec: AttentionSpec) -> str:
    """`edges` of a tile: what it reads in any case, and what lies between."""
    names = captured(spec)
    return f'''
@triton.jit
def edges(b, tile, query_len, kv_len{names}, SELF: tl.constexpr):
    """Slots [first, begin), [own, own_end) and [stop, end) that a tile reads in any case.

    Between them all of its queries see all keys, if the mask has no holes. Queries that see no key
    do not count. With SELF, queries and keys are the same tokens.
    """
    q = tile * TILE + tl.arange(0, TILE)
    last = tl.minimum(tile * TILE + TILE, query_len)
    start, stop = seen_range(b, tl.minimum(q, query_len - 1), kv_len{names})
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


@triton.jit
def stretches(edge, place):
    """What `ask` has left of `edges` for one tile."""
    edge += place * 8
    own, own_end = tl.load(edge + 2), tl.load(edge + 3)
    return tl.load(edge), tl.load(edge + 1), own, own_end, tl.load(edge + 4), tl.load(edge + 5)
'''


def emit_ask(spec: AttentionSpec) -> str:
    """`ask`: what the parts of a tile ask with."""
    names, wide = captured(spec), wide_index(spec)
    return f'''
{_seen_by(spec)}


@triton.jit(do_not_specialize=["first_row", "tiles", "query_len", "kv_len"])
def ask(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    centres, totals, edge, first_row, heads, tiles, query_len, kv_len{names},
    KEYS: tl.constexpr, TILES: tl.constexpr, SELF: tl.constexpr,
):
    """The mean query of each part of TILES tiles of one head, and log2 of its denominator.

    A tile that fills up the last of its head sees nothing.
    """
    place = tl.program_id(0) * TILES
    row = first_row + place
    {tile_place(spec, "row")}
    part, d = tl.arange(0, TILES * PARTS), tl.arange(0, DIM)
    begin = tile * TILE + part * PART
    query += b.to(tl.int64) * query_stride_b + h.to(tl.int64) * query_stride_h
    total = tl.zeros([TILES * PARTS, DIM], tl.float32)
    for each in range(0, PART):
        t = begin + each
        total += tl.load(
            query + t.to(tl.int64)[:, None] * query_stride_t + d[None, :] * query_stride_d,
            mask=(t < query_len)[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        ).to(tl.float32)
    held = tl.minimum(tl.maximum(query_len - begin, 0), PART)
    centre = (total / tl.maximum(held, 1)[:, None]).to(key.dtype.element_ty)
    source = place.to(tl.int64) * PARTS + part
    tl.store(
        centres + source[:, None] * HEAD_DIM + d[None, :], centre, mask=(d < HEAD_DIM)[None, :]
    )
    edge += place * 8
    for number in range(0, TILES):
        one = tile + number
        first, sinks_end, own, own_end, stop, end = edges(b, one, query_len, kv_len{names}, SELF)
        used = (one * TILE < query_len).to(tl.int32)
        mine = edge + number * 8
        tl.store(mine, first * used)
        tl.store(mine + 1, sinks_end * used)
        tl.store(mine + 2, own * used)
        tl.store(mine + 3, own_end * used)
        tl.store(mine + 4, stop * used)
        tl.store(mine + 5, end * used)
    tl.debug_barrier()
    firsts, ends = tl.load(edge + part // PARTS * 8), tl.load(edge + part // PARTS * 8 + 5)
    least = tl.min(tl.where(ends > firsts, firsts, kv_len), 0)
    most = tl.max(tl.where(ends > firsts, ends, 0), 0)
    q = tl.minimum(begin + PART // 2, query_len - 1){wide}
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    top = tl.full([TILES * PARTS], float("-inf"), tl.float32)
    whole = tl.zeros([TILES * PARTS], tl.float32)
    for start in range(least // (SAMPLE * KEYS) * (SAMPLE * KEYS), most, SAMPLE * KEYS):
        slot = start + tl.arange(0, KEYS) * SAMPLE
        inside = (slot >= least) & (slot < most)
        keys = tl.load(
            key + slot.to(tl.int64)[None, :] * key_stride_l + d[:, None] * key_stride_d,
            mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
        )
        s = tl.dot(centre, keys{precision(spec)})
        among = (slot[None, :] >= firsts[:, None]) & (slot[None, :] < ends[:, None])
        bits = score(s, b, h, q[:, None], slot[None, :]{wide}, among{names})
        seen, _ = seen_by(
            b, h, begin[:, None], query_len, slot[None, :]{wide}, kv_len, among{names}
        )
        bits = tl.where(seen, bits, float("-inf"))
        above = tl.maximum(top, tl.max(bits, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        whole = whole * tl.exp2(top - base) + tl.sum(tl.exp2(bits - base[:, None]), 1)
        top = above
    total = tl.where(whole > 0, tl.log2(whole * SAMPLE) + top, 0.0)
    tl.store(totals + source, tl.where(held > 0, total, float("inf")))
'''


def emit_scan(spec: AttentionSpec) -> str:
    """`scan`: how much each key matters to each tile."""
    names, wide = captured(spec), wide_index(spec)
    newest = """
        new = tl.max(tl.reshape(new.to(tl.int32), [KEYS, PARTS, TILES]), 1)
        level = tl.where(new > 0, BINS - 1.0, level)"""
    newest = "" if sees_range(spec) else newest
    return f'''
@triton.jit(do_not_specialize=["first_row", "tiles", "query_len", "kv_len", "splits"])
def scan(
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    centres, totals, edge, bins, bin_room,
    first_row, heads, tiles, query_len, kv_len, splits{names},
    KEYS: tl.constexpr, TILES: tl.constexpr,
):
    """Bins [TILES, kv_len] of the largest share that any part of a tile gives a key.

    TILES tiles of one head share what is read of the keys, the splits-th part of them. The parts of
    a tile are so far apart in a product that one thread has them all.
    """
    place, split = tl.program_id(0) * TILES, tl.program_id(1)
    row = first_row + place
    {tile_place(spec, "row")}
    number, column, d = tl.arange(0, TILES), tl.arange(0, TILES * PARTS), tl.arange(0, DIM)
    rows = place.to(tl.int64) + number
    begins, stops = tl.load(edge + rows * 8 + 1), tl.load(edge + rows * 8 + 4)
    owns, own_ends = tl.load(edge + rows * 8 + 2), tl.load(edge + rows * 8 + 3)
    least = tl.min(tl.where(stops > begins, begins, kv_len), 0)
    most = tl.max(tl.where(stops > begins, stops, 0), 0)
    part = column % TILES * PARTS + column // TILES
    source = place.to(tl.int64) * PARTS + part
    asking = tl.load(
        centres + source[None, :] * HEAD_DIM + d[:, None],
        mask=(d < HEAD_DIM)[:, None], other=0.0,
    )
    total = tl.load(totals + source)
    begin = tile * TILE + part * PART
    q = tl.minimum(begin + PART // 2, query_len - 1){wide}
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    bins += rows[None, :] * bin_room
    for start in range(least // KEYS * KEYS + split * KEYS, most, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = slot < most
        keys = tl.load(
            key + slot.to(tl.int64)[:, None] * key_stride_l + d[None, :] * key_stride_d,
            mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        )
        s = tl.dot(keys, asking{precision(spec)})
        bits = score(s, b, h, q[None, :], slot[:, None]{wide}, inside[:, None]{names})
        seen, new = seen_by(
            b, h, begin[None, :], query_len, slot[:, None]{wide}, kv_len, inside[:, None]{names}
        )
        bits = tl.where(seen, bits - total[None, :], float("-inf"))
        share = tl.max(tl.reshape(bits, [KEYS, PARTS, TILES]), 1)
        near = (slot[:, None] >= owns[None, :]) & (slot[:, None] < own_ends[None, :])
        among = (slot[:, None] >= begins[None, :]) & (slot[:, None] < stops[None, :])
        level = tl.minimum(tl.maximum(share * 8 + LAST_BIN, 2.0), BINS - 1.0)
        level = tl.where(share > float("-inf"), level, 1.0){newest}
        level = tl.where(near, 0.0, level)
        tl.store(bins + slot[:, None], level.to(tl.uint8), mask=among)
'''
