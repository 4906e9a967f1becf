"""Counts of items in each bin, which a program adds up before it adds them to a histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.names import BINS, IN_SHARED


@triton.jit
def no_counts():
    """Return counters of bins, all 0: their place in shared memory if IN_SHARED, else int32 [BINS].

    Triton's own histograms take many more instructions for each item.
    """
    if IN_SHARED:
        tl.static_assert(BINS <= 256)
        counters = tl.inline_asm_elementwise(
            "{ .shared .align 16 .b32 bin_counts[256]; mov.u32 $0, bin_counts; }", "=r", [],
            dtype=tl.int32, is_pure=False, pack=1,
        )
        tl.inline_asm_elementwise(
            "st.shared.b32 [$1], 0; mov.b32 $0, 0;", "=r,r", [counters + 4 * tl.arange(0, BINS)],
            dtype=tl.int32, is_pure=False, pack=1,
        )
        tl.debug_barrier()
    else:
        counters = tl.zeros([BINS], tl.int32)
    return counters


@triton.jit
def count_items(counters, entry):
    """Count the items in the bins `entry` [N], and return the counters.

    There must be no fewer items than threads: an item that several threads have counts for each.
    """
    if IN_SHARED:
        tl.inline_asm_elementwise(
            "red.shared.add.u32 [$1], 1; mov.b32 $0, 0;", "=r,r", [counters + 4 * entry],
            dtype=tl.int32, is_pure=False, pack=1,
        )
    else:
        counters += tl.histogram(entry, BINS)
    return counters


@triton.jit
def add_counts(histogram, counters):
    """Add the counts of all bins but the first to a histogram, and return them, int32 [BINS]."""
    place = tl.arange(0, BINS)
    if IN_SHARED:
        tl.debug_barrier()
        counters = tl.inline_asm_elementwise(
            "ld.shared.b32 $0, [$1];", "=r,r", [counters + 4 * place],
            dtype=tl.int32, is_pure=False, pack=1,
        )
    counts = tl.where(place > 0, counters, 0)
    tl.atomic_add(histogram + place, counts, mask=counts > 0, sem="relaxed")
    return counts
