"""Functions of levels: queries by channels, and groups that differ in length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.bins import written_slots
    from lychee_compile.codegen.triton_lib.names import (
        BINS,
        CHANNELS,
        GATHERED,
        GROUP,
        LONGEST,
        LOOK,
        ROWS,
        SHORTEST,
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
def unread_before(span, fresh, positions, stride_b, stride_t, written, b, kv_len):
    """Return what `unread_slot` does, where chunks that this step decides do not count.

    A slot that this step has written, before `fresh`, may be hidden from the query. It may decide a
    chunk before or after another program looks.
    """
    number = tl.maximum(fresh - 2 * LONGEST, 0) // SHORTEST + tl.arange(0, LOOK)
    low, high = span_bounds(span + number, number, number * SHORTEST < fresh)
    slot = written_slots(positions, stride_b, stride_t, written, b, kv_len, -1)
    is_new = tl.max((low[:, None] + LONGEST == slot[None, :]).to(tl.int32), 1)
    return tl.max(tl.where((high > low) & (low + LONGEST < fresh) & (is_new == 0), high, 0), 0)


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
