"""Codes of pages, and the plan by which chosen pages are dealt out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from lychee_compile.codegen.triton_lib.bins import chosen_of_tiles, threshold
    from lychee_compile.codegen.triton_lib.names import (
        BINS,
        FLAT_PAGES,
        PAGE,
        PAGE_ROOM,
        TURN,
    )


@triton.jit
def plan_turns(
    histogram, ranks, plan, limits, candidate_count, tiles, TILES: tl.constexpr
):
    """Deal the best pages of a row out in turns. A turn has up to TURN pages of one block.

    Store in `plan` for each turn: its block, the number of chosen pages in all blocks and turns
    before it, the number of those in turns of its own block, and the number of its own pages. Store
    in `limits` what `choose_by_bin` needs: the cut, what is left for it, and its number of pages;
    then the number of turns. If the row sees few pages, all of them are chosen.
    """
    seen = tl.sum(tl.load(histogram + tl.arange(0, BINS)), 0)
    room = tl.where(seen <= FLAT_PAGES, seen, PAGE_ROOM)
    cut, left, at_cut = threshold(histogram, room)
    of_tile = chosen_of_tiles(ranks, cut, left, at_cut, tiles, TILES)
    tl.store(candidate_count, tl.sum(of_tile, 0) * PAGE)
    tl.store(limits, cut)
    tl.store(limits + 1, left)
    tl.store(limits + 2, at_cut)
    own = (of_tile + TURN - 1) // TURN
    through, before = tl.cumsum(own, 0), tl.cumsum(of_tile, 0) - of_tile
    planned = tl.max(through, 0)
    tl.store(limits + 3, planned)
    for start in range(0, planned, 64):
        number = start + tl.arange(0, 64)
        block = tl.sum((through[None, :] <= number[:, None]).to(tl.int32), 1)
        place = tl.minimum(block, TILES - 1)
        skipped = (number - tl.gather(through - own, place, 0)) * TURN
        count = tl.minimum(tl.gather(of_tile, place, 0) - skipped, TURN)
        entry, inside = plan + number * 4, number < planned
        tl.store(entry, block, mask=inside)
        tl.store(entry + 1, tl.gather(before, place, 0) + skipped, mask=inside)
        tl.store(entry + 2, skipped, mask=inside)
        tl.store(entry + 3, count, mask=inside)
