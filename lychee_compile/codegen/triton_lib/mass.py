"""Budgets by mass: the fewest of the best tokens that hold a share of the softmax.

Shares count in units of a row's estimated denominators, as bins do. The first bin of a histogram,
which is for what cannot be chosen, keeps the mass that no other bin tells: that of the items in the
second bin, which holds all small ones, and that of pages whose tokens were not looked into.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.bins import threshold
    from lychee_compile.codegen.triton_lib.names import BINS, GROUP, LAST_BIN, MAY_MISS, ROWS


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
def mass_of_bins(counts):
    """Return the mass of the items in each bin, by their numbers; 0 for the first two bins."""
    place = tl.arange(0, BINS)
    middle = ((place + (LAST_BIN - BINS + 1)) << 20 | 1 << 19).to(tl.float32, bitcast=True)
    return tl.where(place > 1, counts.to(tl.float32) * middle, 0.0)


@triton.jit
def note_left_out(histogram, limits, each: tl.constexpr):
    """Store the mass of the pages that are not looked into as what no bin of their tokens tells.

    `histogram` is that of pages, followed by that of tokens. `limits` are the cut, the number of
    pages at the cut that are chosen, and that of all pages there. A page is `each` tokens.
    """
    place = tl.arange(0, BINS)
    cut, left, at_cut = tl.load(limits), tl.load(limits + 1), tl.load(limits + 2)
    at_cut = tl.maximum(at_cut, 1)
    rest = (at_cut - left).to(tl.float32) / at_cut
    out = tl.where(place < cut, 1.0, tl.where(place == cut, rest, 0.0))
    mass = tl.sum(mass_of_bins(tl.load(histogram + place)) * out, 0) * each
    small = tl.load(histogram + BINS) * tl.sum(tl.where(place == 1, out, 0.0), 0)
    mass = tl.minimum(mass, 1024.0) * 1048576.0 + small
    tl.store(histogram + BINS, tl.minimum(mass, 1073741824.0).to(tl.int32))


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
