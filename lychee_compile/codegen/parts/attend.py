"""The kernel that reads keys and values: those selected, or all that are visible."""

from __future__ import annotations

from typing import NamedTuple

from lychee_compile.codegen.parts.common import emit_softmax_step, precision
from lychee_compile.codegen.parts.terms import captured, indented, sees_range
from lychee_compile.codegen.specification import AttentionSpec

KEYS = 64
"""Keys that a program reads at a time when it reads all."""

_OPERANDS = """query, query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key, key_stride_b, key_stride_h, key_stride_l, key_stride_d,
    value, value_stride_b, value_stride_h, value_stride_l, value_stride_d,
    partial, partial_top, partial_sum,
    kv_len, kv_heads, query_len, splits"""


class IndexUpdate(NamedTuple):
    """How a step brings the index of a policy up to date."""

    parameters: str
    """Of `attend`, that are the parts of the index and their sizes."""
    call: str
    """What does it, for the KV head `kv_head` of row `b`."""


def emit_attention_steps(spec: AttentionSpec) -> str:
    """One step of online softmax, what a program leaves, and `combine`, which sums that up."""
    names = captured(spec)
    sink = """
    logit = tl.load(extra + b * extra_stride_b + h * extra_stride_h + t * extra_stride_t)
    logit = logit.to(tl.float32) * LOG2E
    base = tl.maximum(most, logit)
    mean = mean * tl.exp2(most - base)
    whole = whole * tl.exp2(most - base) + tl.exp2(logit - base)"""
    return f'''
@triton.jit
def attend_to(
    slot, inside, queries, heads, top, total, result, b, t, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
):
    """One step of online softmax over the keys in the slots [N] that are `inside`."""
    seen = visible(b, heads[:, None], t, slot[None, :], kv_len, inside[None, :]{names})
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
    s = tl.dot(queries, tl.trans(keys){precision(spec)})
    bits = score(s, b, heads[:, None], t, slot[None, :], inside[None, :]{names})
{emit_softmax_step(spec)}


@triton.jit
def store_part(top, total, result, head_row, split, splits, partial, partial_top, partial_sum):
    """Leave what one program has of a group's attention for `combine`."""
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
    mean = tl.sum(parts * fade[:, None], 0){sink if spec.extra else ""}
    # A query that sees nothing gets zeros, as from PyTorch's own attention.
    mean = mean / tl.where(whole > 0, whole, 1.0)
    place = output + b.to(tl.int64) * output_stride_b + h * output_stride_h
    place = place + t * output_stride_t + width * output_stride_d
    tl.store(place, mean.to(output.dtype.element_ty), mask=width < VALUE_DIM)
'''


def emit_exact(spec: AttentionSpec) -> str:
    """`attend_all`: exact attention, the keys split among programs."""
    names = captured(spec)
    return f'''
@triton.jit
def read_all(
    queries, heads, top, total, result, b, t, kv_len, split, splits,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
    KEYS: tl.constexpr,
):
    """Every splits-th tile of KEYS keys; a tile of hidden keys is not read."""
{_slots(spec)}
{_hidden_tiles(spec)}
    return top, total, result


@triton.jit
def attend_all(
    {_OPERANDS}{names},
    KEYS: tl.constexpr, EARLY: tl.constexpr,
):
    """Attention over all visible keys, for the heads of one group at one position."""
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
        key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
        KEYS,
    )
    store_part(
        top, total, result, head_row, split, splits, partial, partial_top, partial_sum
    )
'''


def _slots(spec: AttentionSpec) -> str:
    """The loop over a program's tiles, within what is seen where that is a range."""
    if sees_range(spec):
        return f"""    first, end = seen_range(b, t, kv_len{captured(spec)})
    for start in range(first // KEYS * KEYS + split * KEYS, end, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = (slot >= first) & (slot < end)"""
    return """    for start in range(split * KEYS, kv_len, splits * KEYS):
        slot = start + tl.arange(0, KEYS)
        inside = slot < kv_len"""


def _hidden_tiles(spec: AttentionSpec) -> str:
    names = captured(spec)
    step = f"""top, total, result = attend_to(
    slot, inside, queries, heads, top, total, result, b, t, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
)"""
    if sees_range(spec):
        return indented(step, 8)
    check = f"""seen = visible(b, heads[:, None], t, slot[None, :], kv_len, inside[None, :]{names})
if tl.max(seen.to(tl.int32)) > 0:
"""
    return indented(check + indented(step, 4), 8)


def emit_sparse(spec: AttentionSpec, upkeep: IndexUpdate) -> str:
    """`attend`: sinks, recent and selected tokens; all of them while the index is not trusted."""
    names, update = captured(spec), indented(upkeep.call, 12)
    return f'''
@triton.jit
def attend(
    {_OPERANDS},
    {upkeep.parameters},
    tile_first, tile_end, tiles, positions, position_stride_b, position_stride_t, written,
    histogram, bins, bin_room, candidates, candidate_count, chosen_list, capacity{names},
    KEYS: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, PAGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention over the selected keys, for the heads of one group at one position.

    Every program finds the threshold itself, and the tokens above it in its share of the slots.
    One program more sketches the newest keys, which nothing selects from yet.
    """
    head_row, split = tl.program_id(0), tl.program_id(1)
    kv_head, row = head_row % kv_heads, head_row // kv_heads
    b, t = row // query_len, row % query_len
    if split == splits:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        if t == 0:
{update}
    else:
        queries, heads = load_queries(
            query, b, kv_head, t, query_stride_b, query_stride_h, query_stride_t, query_stride_d
        )
        key += b.to(tl.int64) * key_stride_b + kv_head.to(tl.int64) * key_stride_h
        value += b.to(tl.int64) * value_stride_b + kv_head.to(tl.int64) * value_stride_h
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        result = tl.zeros([ROWS, WIDTH], tl.float32)
        trusted = tl.load(header) != 0
        fresh = fresh_from(
            positions, position_stride_b, position_stride_t, written, header, b, kv_len
        )
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
            tl.extra.cuda.gdc_wait()
        first, begin, stop, end = always_read(
            tile_first, tile_end, head_row, tiles, b, t, kv_len, fresh{names}, TILES
        )
        sinks = begin - first
        always = sinks + end - stop
        if trusted & (end > 0) & (always <= capacity):
            # Slots that are examined: candidates, or all between those that are always read.
            # Sixteen at a time go to each program in turn.
            lane = tl.arange(0, LANES)
            item = (lane // 16 * splits + split) * 16 + lane % 16
            origin, items = begin // 16 * 16, stop - begin // 16 * 16
            bins += head_row.to(tl.int64) * bin_room
            candidates += head_row.to(tl.int64) * bin_room
            if PAGED:
                origin, items = origin * 0, tl.load(candidate_count + head_row)
            inside = (item < bin_room) if PAGED else (origin + item < stop)
            entry = tl.load(bins + origin + item, mask=inside, other=0)
            room = tl.maximum(-(always - BUDGET), 0)
{_threshold(spec)}
            chosen_list += (head_row.to(tl.int64) * splits + split) * capacity
            count = tl.maximum(always - split + splits - 1, 0) // splits
            for start in range(0, count, 32):
                own = start + tl.arange(0, 32)
                which = split + own * splits
                slot = tl.where(which < sinks, first + which, stop + which - sinks)
                tl.store(chosen_list + own, slot, mask=own < count)
            for start in range(0, items, splits * LANES):
                slot = origin + item
                inside = item < items
                if PAGED:
                    slot = tl.load(candidates + item, mask=inside, other=0)
                else:
                    inside &= slot >= begin
                entry = tl.where(inside, entry, 0)
                chosen, place, more = choose(entry.to(tl.int32), cut, left, at_cut)
                tl.store(chosen_list + count + place, slot, mask=chosen)
                count += more
                item += splits * LANES
                entry = tl.load(bins + origin + item, mask=item < items, other=0)
            tl.debug_barrier()
            for start in range(0, count, KEYS):
                number = start + tl.arange(0, KEYS)
                slot = tl.load(chosen_list + number, mask=number < count, other=0)
                top, total, result = attend_to(
                    slot, number < count, queries, heads, top, total, result, b, t, kv_len,
                    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
                )
        else:
            top, total, result = read_all(
                queries, heads, top, total, result, b, t, kv_len, split, splits,
                key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
                KEYS,
            )
        store_part(
            top, total, result, head_row, split, splits, partial, partial_top, partial_sum
        )
'''


def _threshold(spec: AttentionSpec) -> str:
    """The bin that the budget ends in; of all tokens, those read anyway may have been counted."""
    pages = "cut, left, at_cut = threshold(histogram + head_row * (2 * BINS) + PAGED * BINS, room)"
    if sees_range(spec):
        return indented(pages, 12)
    tokens = """known = tl.minimum(end, fresh)
read = bins_read(bins, first, begin, stop, known)
cut, left, at_cut = threshold(histogram + head_row * (2 * BINS), room, read)"""
    return indented(f"if PAGED:\n{indented(pages, 4)}\nelse:\n{indented(tokens, 4)}", 12)
