"""Kernels for whole sequences: every tile of queries finds the keys that matter to it.

`ask`      what a tile reads in any case, centres of its parts, denominators of their softmaxes
`scan`     of every key the largest share that a part of a tile gives it, as a bin of a histogram
`choose`   the bin that a tile's budget ends in, and the list of its keys
`attend`   attention of a tile over that list, and over what it reads in any case

What a tile reads, which keys it may choose from and how shares are estimated is the specification
of `kernels/reference/tiles.py` and `kernels/tile_policies/lychee.py`; but where a mask has holes a
part votes for what its first, middle or last query sees; only what lies at the ends is read in any
case, and what the last query of a part sees and none before the part is chosen before all else.

Numbers that change from prompt to prompt are not specialised on: nothing is compiled for a length.
"""

from __future__ import annotations

from lychee_compile.codegen.parts.common import (
    emit_logits,
    emit_sizes,
    emit_softmax_step,
    emit_tuned,
    precision,
)
from lychee_compile.codegen.parts.terms import captured, sees_range
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.launch_parts import BINS
from lychee_compile.kernels.reference.tiles import TILE
from lychee_compile.kernels.tile_policies.lychee import PARTS, SAMPLE


def _seen_by(spec: AttentionSpec) -> str:
    """`seen_by`: what the parts of a tile vote on."""
    names, wide = captured(spec), _wide(spec)
    heading = f"""@triton.jit
def seen_by(b, h, begin, query_len, slot, kv_len, inside{names}):
    \"\"\"Which of the slots [1, N] that are `inside` parts see that begin at queries `begin` [M].

    And which of them no query before the part sees, but its last does.
    \"\"\""""
    if sees_range(spec):
        return f"""{heading}
    seen = inside & (begin >= 0)[:, None]
    return seen, seen"""
    at = f"tl.minimum(%s, query_len - 1){wide}[:, None]"
    call = f"visible(b, h, {at}, slot, kv_len, inside{names})"
    return f"""{heading}
    before = {call % "tl.maximum(begin - 1, 0)"}
    first = {call % "begin"}
    middle = {call % "begin + PART // 2"}
    last = {call % "begin + PART - 1"}
    seen = first | middle | last
    return seen & (begin >= 0)[:, None], last & (before == 0)"""


def _wide(spec: AttentionSpec) -> str:
    """Makes 64 bits of an index where a mask may have more elements than 32 bits count."""
    return ".to(tl.int64)" if any(each.rank > 1 for each in spec.captured) else ""


def _place(spec: AttentionSpec, row: str) -> str:
    """Which tile, of which row of the batch and head, a program is for."""
    wide = _wide(spec)
    return f"""head, tile = {row} // tiles, {row} % tiles
    b, h = (head // heads){wide}, (head % heads){wide}"""


def emit_tile_constants(spec: AttentionSpec) -> str:
    """Sizes of this site, of tiles and of a histogram."""
    assert spec.tiles is not None
    return f"""{emit_sizes(spec)}
{emit_tuned(spec)}
TILE = tl.constexpr({TILE})  # query positions that read the same keys
PARTS = tl.constexpr({PARTS})  # parts of a tile, each of which asks with its centre
PART = tl.constexpr({TILE // PARTS})
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
    names, wide = captured(spec), _wide(spec)
    return f'''
{_seen_by(spec)}


@triton.jit(do_not_specialize=["first_row", "tiles", "query_len", "kv_len"])
def ask(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    centres, totals, edge, first_row, heads, tiles, query_len, kv_len{names},
    KEYS: tl.constexpr, SELF: tl.constexpr,
):
    """The mean query of each part of a tile, and log2 of its softmax's denominator.

    A tile that fills up the last of its head sees nothing.
    """
    row = first_row + tl.program_id(0)
    {_place(spec, "row")}
    part, d = tl.arange(0, 16), tl.arange(0, DIM)
    query += b.to(tl.int64) * query_stride_b + h.to(tl.int64) * query_stride_h
    total = tl.zeros([16, DIM], tl.float32)
    for each in range(0, PART):
        t = tile * TILE + part * PART + each
        total += tl.load(
            query + t.to(tl.int64)[:, None] * query_stride_t + d[None, :] * query_stride_d,
            mask=((part < PARTS) & (t < query_len))[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        ).to(tl.float32)
    begin = tile * TILE + part * PART
    held = tl.where(part < PARTS, tl.minimum(tl.maximum(query_len - begin, 0), PART), 0)
    centre = (total / tl.maximum(held, 1)[:, None]).to(key.dtype.element_ty)
    place = tl.program_id(0).to(tl.int64) * PARTS + part
    tl.store(
        centres + place[:, None] * HEAD_DIM + d[None, :], centre,
        mask=(part < PARTS)[:, None] & (d < HEAD_DIM)[None, :],
    )
    first, sinks_end, own, own_end, stop, end = edges(b, tile, query_len, kv_len{names}, SELF)
    used = (tile * TILE < query_len).to(tl.int32)
    edge += tl.program_id(0) * 8
    tl.store(edge, first * used)
    tl.store(edge + 1, sinks_end * used)
    tl.store(edge + 2, own * used)
    tl.store(edge + 3, own_end * used)
    tl.store(edge + 4, stop * used)
    tl.store(edge + 5, end * used)
    end = end * used
    q = tl.minimum(begin + PART // 2, query_len - 1){wide}
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    top = tl.full([16], float("-inf"), tl.float32)
    whole = tl.zeros([16], tl.float32)
    for start in range(first // (SAMPLE * KEYS) * (SAMPLE * KEYS), end, SAMPLE * KEYS):
        slot = start + tl.arange(0, KEYS) * SAMPLE
        inside = (slot >= first) & (slot < end)
        keys = tl.load(
            key + slot.to(tl.int64)[None, :] * key_stride_l + d[:, None] * key_stride_d,
            mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
        )
        s = tl.dot(centre, keys{precision(spec)})
        bits = score(s, b, h, q[:, None], slot[None, :]{wide}, inside[None, :]{names})
        seen, _ = seen_by(
            b, h, begin, query_len, slot[None, :]{wide}, kv_len, inside[None, :]{names}
        )
        bits = tl.where(seen, bits, float("-inf"))
        most = tl.maximum(top, tl.max(bits, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        whole = whole * tl.exp2(top - base) + tl.sum(tl.exp2(bits - base[:, None]), 1)
        top = most
    total = tl.where(whole > 0, tl.log2(whole * SAMPLE) + top, 0.0)
    tl.store(totals + place, tl.where(held > 0, total, float("inf")), mask=part < PARTS)
'''


def emit_scan(spec: AttentionSpec) -> str:
    """`scan`: how much each key matters to each tile."""
    names, wide = captured(spec), _wide(spec)
    newest = """
        new = tl.max(tl.reshape(new.to(tl.int32), [TILES, PARTS, KEYS]), 1)
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

    TILES tiles of one head share what is read of the keys, the splits-th part of them.
    """
    place, split = tl.program_id(0) * TILES, tl.program_id(1)
    row = first_row + place
    {_place(spec, "row")}
    number, part, d = tl.arange(0, TILES), tl.arange(0, TILES * PARTS), tl.arange(0, DIM)
    rows = place.to(tl.int64) + number
    begins, stops = tl.load(edge + rows * 8 + 1), tl.load(edge + rows * 8 + 4)
    owns, own_ends = tl.load(edge + rows * 8 + 2), tl.load(edge + rows * 8 + 3)
    least = tl.min(tl.where(stops > begins, begins, kv_len), 0)
    most = tl.max(tl.where(stops > begins, stops, 0), 0)
    source = place.to(tl.int64) * PARTS + part
    asking = tl.load(
        centres + source[:, None] * HEAD_DIM + d[None, :],
        mask=(d < HEAD_DIM)[None, :], other=0.0,
    )
    total = tl.load(totals + source)
    begin = tile * TILE + part * PART
    q = tl.minimum(begin + PART // 2, query_len - 1){wide}
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    bins += rows[:, None] * bin_room
    for start in range(least // KEYS * KEYS + split * KEYS, most, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = slot < most
        keys = tl.load(
            key + slot.to(tl.int64)[None, :] * key_stride_l + d[:, None] * key_stride_d,
            mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
        )
        s = tl.dot(asking, keys{precision(spec)})
        bits = score(s, b, h, q[:, None], slot[None, :]{wide}, inside[None, :]{names})
        seen, new = seen_by(
            b, h, begin, query_len, slot[None, :]{wide}, kv_len, inside[None, :]{names}
        )
        bits = tl.where(seen, bits - total[:, None], float("-inf"))
        share = tl.max(tl.reshape(bits, [TILES, PARTS, KEYS]), 1)
        near = (slot[None, :] >= owns[:, None]) & (slot[None, :] < own_ends[:, None])
        among = (slot[None, :] >= begins[:, None]) & (slot[None, :] < stops[:, None]) & (near == 0)
        level = tl.minimum(tl.maximum(share * 8 + LAST_BIN, 2.0), BINS - 1.0)
        level = tl.where(share > float("-inf"), level, 1.0){newest}
        tl.store(bins + slot[None, :], level.to(tl.uint8), mask=among)
'''


def emit_choose() -> str:
    """`choose`: which keys each tile reads."""
    return '''
@triton.jit(do_not_specialize=["kv_len", "capacity", "most", "shortest"])
def choose(
    edge, bins, bin_room, chosen, counts, kv_len, capacity, share, most, shortest,
    LANES: tl.constexpr,
):
    """The list of the keys that a tile reads, beside those it reads in any case.

    Of those it sees the given share, or at most so many where that is less; all of them where they
    are fewer than `shortest`.
    """
    row = tl.program_id(0)
    first, begin, own, own_end, stop, end = stretches(edge, row)
    bins += row.to(tl.int64) * bin_room
    chosen += row.to(tl.int64) * capacity
    level = tl.arange(0, BINS)
    held = tl.zeros([BINS], tl.int32)
    for start in range(begin // LANES * LANES, stop, LANES):
        slot = start + tl.arange(0, LANES)
        among = (slot >= begin) & (slot < stop) & ((slot < own) | (slot >= own_end))
        entry = tl.load(bins + slot, mask=among, other=0).to(tl.int32)
        held += tl.histogram(entry, BINS)
    held = tl.where(level > 0, held, 0)
    always = begin - first + own_end - own + end - stop
    seen = tl.sum(tl.where(level > 1, held, 0), 0)
    allowed = tl.minimum(tl.ceil((always + seen) * share).to(tl.int32), most)
    allowed = tl.where(always + seen < shortest, kv_len, allowed)
    room = tl.minimum(tl.maximum(allowed - always, 0), capacity)
    through = tl.cumsum(held, 0, reverse=True)
    cut = tl.max(tl.where(through > room, level, 0), 0)
    above = tl.max(tl.where(level > cut, through, 0), 0)
    left = tl.where(cut > 0, room - above, 0)
    count, at_cut = 0, 0
    for start in range(begin // LANES * LANES, stop, LANES):
        slot = start + tl.arange(0, LANES)
        among = (slot >= begin) & (slot < stop) & ((slot < own) | (slot >= own_end))
        entry = tl.load(bins + slot, mask=among, other=0).to(tl.int32)
        ties = ((entry == cut) & (cut > 0)).to(tl.int32)
        taken = (entry > cut) | ((ties > 0) & (at_cut + tl.cumsum(ties, 0) <= left))
        number = tl.cumsum(taken.to(tl.int32), 0)
        tl.store(chosen + count + number - 1, slot, mask=taken)
        count += tl.max(number, 0)
        at_cut += tl.sum(ties, 0)
    tl.store(counts + row, count)
'''


def emit_attend(spec: AttentionSpec) -> str:
    """`attend`: attention of a tile over what it reads."""
    names, wide = captured(spec), _wide(spec)
    sink = """
    logit = tl.load(extra + b * extra_stride_b + h * extra_stride_h + q * extra_stride_t)
    logit = logit.to(tl.float32) * LOG2E
    most = tl.maximum(top, logit)
    fade = tl.where(top == float("-inf"), 0.0, tl.exp2(top - most))
    result, total = result * fade[:, None], total * fade + tl.exp2(logit - most)
    top = most"""
    step = f"""top, total, result = read(
            slot, inside, asking, sighted, top, total, result, b, h, q, kv_len,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
            CHECKED=%s,
        )"""
    return f'''
@triton.jit
def read(
    slot, inside, asking, sighted, top, total, result, b, h, q, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
    CHECKED: tl.constexpr,
):
    """One step of online softmax over the keys in the slots [N] that are `inside`.

    Of keys that are not CHECKED all queries that see any key see all.
    """
    d, width = tl.arange(0, DIM), tl.arange(0, WIDTH)
    place = slot.to(tl.int64)[:, None]
    seen, held = inside[None, :] & sighted[:, None], inside
    if CHECKED:
        seen &= visible(b, h, q[:, None], slot[None, :]{wide}, kv_len, inside[None, :]{names})
        held = tl.max(seen.to(tl.int32), 0) > 0  # what nobody sees may hold anything
    keys = tl.load(
        key + place * key_stride_l + d[None, :] * key_stride_d,
        mask=held[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
    )
    values = tl.load(
        value + place * value_stride_l + width[None, :] * value_stride_d,
        mask=held[:, None] & (width < VALUE_DIM)[None, :], other=0.0,
    )
    s = tl.dot(asking, tl.trans(keys){precision(spec)})
    bits = score(s, b, h, q[:, None], slot[None, :]{wide}, inside[None, :]{names})
{emit_softmax_step(spec)}


@triton.jit(do_not_specialize=["capacity", "first_row", "tiles", "query_len", "kv_len"])
def attend(
    query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    extra, extra_stride_b, extra_stride_h, extra_stride_t,
    output, output_stride_b, output_stride_h, output_stride_t, output_stride_d, log_sums,
    edge, chosen, counts, capacity, first_row, heads, tiles, query_len, kv_len{names},
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Attention of ROWS queries of a tile over the keys that the tile reads."""
    # The last tiles of a causal sequence take longest: they go first.
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    row = first_row + number
    {_place(spec, "row")}
    t = tile * TILE + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    q, d, width = tl.minimum(t, query_len - 1){wide}, tl.arange(0, DIM), tl.arange(0, WIDTH)
    query += b.to(tl.int64) * query_stride_b + h.to(tl.int64) * query_stride_h
    asking = tl.load(
        query + q.to(tl.int64)[:, None] * query_stride_t + d[None, :] * query_stride_d,
        mask=(d < HEAD_DIM)[None, :], other=0.0,
    )
    key += b.to(tl.int64) * key_stride_b + (h // GROUP).to(tl.int64) * key_stride_h
    value += b.to(tl.int64) * value_stride_b + (h // GROUP).to(tl.int64) * value_stride_h
    first, begin, own, own_end, stop, end = stretches(edge, number)
    from_slot, to_slot = seen_range(b, q, kv_len{names})
    sighted = to_slot - from_slot + tl.zeros([ROWS], tl.int32) > 0
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    chosen += number.to(tl.int64) * capacity
    count = tl.load(counts + number)
    for start in range(0, count, KEYS):
        place = start + tl.arange(0, KEYS)
        inside = place < count
        slot = tl.load(chosen + place, mask=inside, other=0)
        {step % ("False" if sees_range(spec) else "True")}
    # The three stretches read in any case, one after another.
    middle = begin - first
    behind = middle + own_end - own
    for start in range(0, behind + end - stop, KEYS):
        place = start + tl.arange(0, KEYS)
        inside = place < behind + end - stop
        slot = tl.where(place < behind, own + place - middle, stop + place - behind)
        slot = tl.where(place < middle, first + place, slot)
        {step % "True"}{sink if spec.extra else ""}
    # A query that sees nothing gets zeros, as from PyTorch's own attention.
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    output += b.to(tl.int64) * output_stride_b + h.to(tl.int64) * output_stride_h
    tl.store(
        output + t.to(tl.int64)[:, None] * output_stride_t + width[None, :] * output_stride_d,
        result.to(output.dtype.element_ty),
        mask=(t < query_len)[:, None] & (width < VALUE_DIM)[None, :],
    )
    log_sum = (top + tl.log2(tl.where(total > 0, total, 1.0))) / 1.4426950408889634
    tl.store(log_sums + head.to(tl.int64) * query_len + t, log_sum, mask=t < query_len)
'''
