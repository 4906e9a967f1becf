"""The kernel that attends to what a tile of a whole sequence reads."""

from __future__ import annotations

from lychee_compile.codegen.parts.common import emit_softmax_step, precision
from lychee_compile.codegen.parts.terms import captured, indented, sees_range
from lychee_compile.codegen.parts.tiles import tile_place, wide_index
from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.kernels.sizes import power_of_two


def emit_attend(spec: AttentionSpec) -> str:
    """`attend`: attention of a tile over what it reads."""
    names, wide = captured(spec), wide_index(spec)
    sink = """
    logit = tl.load(extra + b * extra_stride_b + h * extra_stride_h + q * extra_stride_t)
    logit = logit.to(tl.float32) * LOG2E
    most = tl.maximum(top, logit)
    fade = tl.where(top == float("-inf"), 0.0, tl.exp2(top - most))
    result, total = result * fade[:, None], total * fade + tl.exp2(logit - most)
    top = most"""
    listed = f"""read_listed(
        %s, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
        key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
        ROWS, KEYS,
    )"""
    reading = f"    top, total, result = {listed % 0}"
    if sees_range(spec):
        reading = f"""    full = count // KEYS * KEYS
    top, total, result = {listed % "full"}
    base = tl.where(top == float("-inf"), 0.0, top)
    for start in range(0, full, KEYS):
        slot = tl.load(chosen + start + tl.arange(0, KEYS))
        total, result = weigh(
            slot, base, asking, total, result, b, h, q,
            key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
        )
    from_slot, to_slot = seen_range(b, q, kv_len{names})
    sighted = to_slot - from_slot + tl.zeros([ROWS], tl.int32) > 0
    lost = sighted & ((top == float("-inf")) | ((total < MOST) == 0))
    if tl.max(lost.to(tl.int32), 0) > 0:
        top, total, result = {indented(listed % 0, 4).strip()}
    result, total = tl.where(sighted[:, None], result, 0.0), tl.where(sighted, total, 0.0)"""
    return f'''
{_weigh(spec)}@triton.jit
def read_listed(
    from_place, chosen, count, first, begin, own, own_end, stop, end, asking, b, h, q, kv_len,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):
    """Online softmax over the chosen keys from a place in their list on, and all read in any case.

    Those are the three stretches [first, begin), [own, own_end) and [stop, end).
    """
    d, width = tl.arange(0, DIM), tl.arange(0, WIDTH)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    sinks = count + begin - first
    near = sinks + own_end - own
    items = near + end - stop
    for start in range(from_place, items, KEYS):
        place = start + tl.arange(0, KEYS)
        slot = tl.where(place < near, own + place - sinks, stop + place - near)
        slot = tl.where(place < sinks, first + place - count, slot)
        slot = tl.where(
            place < count, tl.load(chosen + place, mask=place < count, other=0), slot
        )
        inside = (place < items)[None, :]
        seen = visible(b, h, q[:, None], slot[None, :]{wide}, kv_len, inside{names})
        seen = seen & (q >= 0)[:, None]  # a row for each query, also where all see the same
        held = (tl.max(seen.to(tl.int32), 0) > 0)[:, None]  # what nobody sees may hold anything
        line = slot.to(tl.int64)[:, None]
        keys = tl.load(
            key + line * key_stride_l + d[None, :] * key_stride_d,
            mask=held & (d < HEAD_DIM)[None, :], other=0.0,
        )
        values = tl.load(
            value + line * value_stride_l + width[None, :] * value_stride_d,
            mask=held & (width < VALUE_DIM)[None, :], other=0.0,
        )
        s = tl.dot(asking, tl.trans(keys){precision(spec)})
        bits = score(s, b, h, q[:, None], slot[None, :]{wide}, inside{names})
        top, total, result = softmax_step(bits, seen, values, top, total, result)
    return top, total, result


@triton.jit
def softmax_step(bits, seen, values, top, total, result):
    """One step of online softmax: the scores `bits` [ROWS, N], where `seen`, weigh `values`."""
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
    {tile_place(spec, "row")}
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
    chosen += number.to(tl.int64) * capacity
    count = tl.load(counts + number)
{reading}{sink if spec.extra else ""}
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


def _weigh(spec: AttentionSpec) -> str:
    """`weigh`: a step of softmax over keys that all queries see, where masks have no holes."""
    if not sees_range(spec):
        return ""
    names, wide = captured(spec), wide_index(spec)
    most = 15 if spec.dtype == "float16" else 100
    place = "key + line * key_stride_l + d[None, :] * key_stride_d"
    value_place = "value + line * value_stride_l + width[None, :] * value_stride_d"
    return f'''
MOST = tl.constexpr(2.0**{most})  # of what a query's keys weigh in all: far from overflow


@triton.jit
def weigh(
    slot, base, asking, total, result, b, h, q,
    key, key_stride_l, key_stride_d, value, value_stride_l, value_stride_d{names},
):
    """One step of softmax over the keys in the slots [N], all of which all queries see.

    Weights are relative to `base`, the largest score [ROWS] of what was read first: sinks and what
    is near. No larger one has to be looked for, and nothing that was summed up is scaled again.
    """
    d, width, line = tl.arange(0, DIM), tl.arange(0, WIDTH), slot.to(tl.int64)[:, None]
    keys = tl.load({place}{_padding("d", "HEAD_DIM", spec.head_dim)})
    s = tl.dot(asking, tl.trans(keys){precision(spec)})
    bits = score(s, b, h, q[:, None], slot[None, :]{wide}, (slot >= 0)[None, :]{names})
    weight = tl.exp2(bits - base[:, None])
    total += tl.sum(weight, 1)
    values = tl.load({value_place}{_padding("width", "VALUE_DIM", spec.value_dim)})
    return total, tl.dot(weight.to(values.dtype), values, result{precision(spec)})

'''


def _padding(index: str, size: str, given: int) -> str:
    """The mask of a load, where a head is padded."""
    padded = power_of_two(given, 16) > given
    return f", mask=({index} < {size})[None, :], other=0.0" if padded else ""
