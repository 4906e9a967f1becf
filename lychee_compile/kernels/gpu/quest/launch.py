"""Launch the kernels of a module that selects as Quest does (arXiv 2406.10774). No host sync."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import (
    BINS,
    Scratch,
    captured_arguments,
    combine,
    list_size,
    overlapping,
    overlaps,
    power_of_two,
    written_arguments,
)
from lychee_compile.kernels.gpu.common.tuning import Tuning, tuning_for
from lychee_compile.kernels.gpu.lychee.launch import lanes
from lychee_compile.kernels.gpu.lychee.layout import PAGE
from lychee_compile.kernels.gpu.quest.layout import QuestLayout, QuestState

PROGRAMS = 512
"""Of the scan, about."""
MOST_STEPS = 8
"""Times that a program of the scan goes on to further pages, at most."""


def run_quest(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    layout: QuestLayout,
    state: QuestState,
    tuning: Tuning | None = None,
) -> Tensor:
    """Attention of `query` [B, Hq, T, D] over the best pages of `key` [B, Hkv, L, D].

    `positions`, int [T] or [B, T], are the slots that were just written, whose pages get their
    boxes here once they are full; None: none were. Returns [B, Hq, T, Dv].
    """
    batch, query_heads, query_len, _ = query.shape
    heads, kv_len = key.shape[1], key.shape[2]
    rows, pages, budget = batch * heads * query_len, layout.pages, module.BUDGET.value
    tuning = tuning or tuning_for(module, "sparse", query, key, value)
    splits = max(1, min(tuning.programs // rows, 32))
    parts = -(-pages // module.SCANNED.value)
    steps = min(power_of_two(-(-rows * parts // PROGRAMS)), MOST_STEPS)
    tiles, lots = -(-parts // steps), -(-pages // module.RANKED.value)
    examined = min(budget, pages * PAGE)
    scratch = Scratch()
    scratch.want_parts(rows, splits, query_heads // heads, value.shape[-1])
    scratch.want("scores", torch.float32, rows, query_heads // heads, pages)
    scratch.want("totals", torch.float32, rows, tiles, module.ROWS.value)
    scratch.want("histogram", torch.int32, rows, 2, BINS)
    scratch.want("first", torch.int32, rows, tiles)
    scratch.want("end", torch.int32, rows, tiles)
    scratch.want("page_bins", torch.uint8, rows, lots * module.RANKED.value)
    scratch.want("page_ranks", torch.int32, rows, lots, BINS)
    scratch.want("candidates", torch.int32, rows, pages * PAGE)
    scratch.want("bins", torch.uint8, rows, pages * PAGE)
    scratch.want("count", torch.int32, rows)
    scratch.want("chosen", torch.int32, rows, splits, list_size(module))
    made = scratch.allocate(query.device)
    written = written_arguments(positions, batch, made["first"])
    more, early = captured_arguments(captured), overlaps(query.device)
    waits, ends = overlapping(early), (made["first"], made["end"])
    module.scan_boxes[(rows, tiles)](
        query, *query.stride(),
        state.least, state.greatest, made["scores"], made["totals"], made["histogram"],
        *written, state.header, *ends,
        kv_len, pages, heads, query_len, tiles,
        *more,
        STEPS=steps, EARLY=early, num_warps=4, num_stages=3,
    )  # fmt: skip
    module.rank_boxes[(rows, lots)](
        made["scores"], made["totals"], made["page_bins"], made["page_ranks"], made["histogram"],
        pages, tiles,
        TILES=power_of_two(tiles), **waits, num_warps=4, num_stages=1,
    )  # fmt: skip
    module.list_boxes[(rows, lots)](
        made["page_bins"], made["page_ranks"], made["histogram"],
        made["candidates"], made["bins"], pages * PAGE, made["count"],
        *written, state.header, *ends,
        kv_len, heads, query_len, tiles,
        *more,
        TILES=power_of_two(tiles), LOTS=power_of_two(lots), **waits, num_warps=4, num_stages=1,
    )  # fmt: skip
    module.attend[(rows, splits + 1)](
        query, *query.stride(),
        key, *key.stride(),
        value, *value.stride(),
        made["partial"], made["partial_top"], made["partial_sum"],
        kv_len, heads, query_len, splits,
        *state, layout.slots, *ends, tiles, *written,
        made["histogram"], made["bins"], pages * PAGE, made["candidates"], made["count"],
        made["chosen"], list_size(module),
        *more,
        KEYS=tuning.keys, TILES=power_of_two(tiles), LANES=lanes(examined, splits),
        PAGED=True, **waits, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return combine(module, made, extra, query, heads, splits, early)
