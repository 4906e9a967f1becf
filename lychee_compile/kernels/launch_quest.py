"""Launch the kernels of a module that selects as Quest does (arXiv 2406.10774). No host sync."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.box_layout import BoxLayout, BoxState
from lychee_compile.kernels.launch import (
    BINS,
    LOTS,
    _combine,
    _early,
    _power,
    _Scratch,
    _want_parts,
    captured_arguments,
)
from lychee_compile.kernels.slot_layout import PAGE
from lychee_compile.kernels.tuning import Tuning, tuning_for

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
    layout: BoxLayout,
    state: BoxState,
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
    steps = min(_power(-(-rows * parts // LOTS)), MOST_STEPS)
    tiles, lots = -(-parts // steps), -(-pages // module.RANKED.value)
    lot_size, list_size = module.RANKED.value * PAGE, -(-(budget + 64) // 64) * 64
    scratch = _Scratch()
    _want_parts(scratch, rows, splits, query_heads // heads, value.shape[-1])
    scratch.want("scores", torch.float32, rows, query_heads // heads, pages)
    scratch.want("totals", torch.float32, rows, tiles, module.ROWS.value)
    scratch.want("histogram", torch.int32, rows, 2, BINS)
    scratch.want("first", torch.int32, rows, tiles)
    scratch.want("end", torch.int32, rows, tiles)
    scratch.want("page_bins", torch.uint8, rows, lots * module.RANKED.value)
    scratch.want("candidates", torch.int32, rows, lots * lot_size)
    scratch.want("bins", torch.uint8, rows, lots * lot_size)
    scratch.want("counts", torch.int32, rows, lots)
    scratch.want("chosen", torch.int32, rows, splits, list_size)
    made = scratch.allocate(query.device)
    where: list[Any] = [made["first"], 0, 0, 0]
    if positions is not None:
        wide = positions.expand(batch, -1)
        where = [wide, *wide.stride(), wide.shape[1]]
    more, early = captured_arguments(captured), _early(query.device)
    waits = {"EARLY": early, **({"launch_pdl": True} if early else {})}
    ends = made["first"], made["end"]
    module.scan_boxes[(rows, tiles)](
        query, *query.stride(),
        state.least, state.greatest, made["scores"], made["totals"], made["histogram"],
        *where, state.header, *ends,
        kv_len, pages, heads, query_len, tiles,
        *more,
        STEPS=steps, EARLY=early, num_warps=4, num_stages=3,
    )  # fmt: skip
    module.rank_boxes[(rows, lots)](
        made["scores"], made["totals"], made["page_bins"], made["histogram"], pages, tiles,
        TILES=_power(tiles), **waits, num_warps=4, num_stages=1,
    )  # fmt: skip
    module.list_boxes[(rows, lots)](
        made["page_bins"], made["histogram"], made["candidates"], made["bins"], made["counts"],
        *where, state.header, *ends,
        kv_len, heads, query_len, tiles,
        *more,
        TILES=_power(tiles), **waits, num_warps=4, num_stages=1,
    )  # fmt: skip
    module.attend[(rows, splits + 1)](
        query, *query.stride(),
        key, *key.stride(),
        value, *value.stride(),
        made["partial"], made["partial_top"], made["partial_sum"],
        kv_len, heads, query_len, splits,
        *state, layout.slots, *ends, tiles, *where,
        made["histogram"], made["bins"], made["candidates"], made["counts"],
        lots, lot_size, made["chosen"], list_size,
        *more,
        KEYS=tuning.keys, TILES=_power(tiles), LOTS=_power(lots),
        LANES=max(256, min(_power(budget // splits), 1024)), PAGED=True, **waits,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    _combine(module, made, extra, query, output, heads, splits, early)
    return output
