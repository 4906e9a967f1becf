"""Launch the kernels of a generated module: grids, scratch memory, arguments. No host sync."""

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
from lychee_compile.kernels.gpu.common.tuning import MOST_SPLITS, Tuning, tuning_for
from lychee_compile.kernels.gpu.lychee.layout import PAGE, TILE, SketchLayout, SketchState

PARTS = 1024
"""Programs among which the turns of all rows are dealt out, about."""
PAGES_OF_WARP = 128 * PAGE
"""Slots whose pages a warp ranks."""
WEIGH_REGISTERS, PAGES_REGISTERS, CHOSEN_REGISTERS = 96, 128, 96
"""Of a thread, at most: that programs of a kernel and of the next fit on the device together."""


def run_exact(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    extra: Tensor | None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Attention of `query` [B, Hq, T, D] over all visible keys: [B, Hq, T, Dv]."""
    batch, query_heads, query_len, _ = query.shape
    heads, kv_len = key.shape[1], key.shape[2]
    rows = batch * heads * query_len
    tuning = tuning or tuning_for(module, "exact", query, key, value)
    splits = max(1, min(tuning.programs // rows, -(-kv_len // tuning.keys), MOST_SPLITS))
    scratch = Scratch()
    scratch.want_parts(rows, splits, query_heads // heads, value.shape[-1])
    made = scratch.allocate(query.device)
    early = overlaps(query.device)
    module.attend_all[(rows, splits)](
        query, *query.stride(),
        key, *key.stride(),
        value, *value.stride(),
        made["partial"], made["partial_top"], made["partial_sum"],
        kv_len, heads, query_len, splits,
        *captured_arguments(captured),
        KEYS=tuning.keys, EARLY=early,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return combine(module, made, extra, query, heads, splits, early)


def run_sparse(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    layout: SketchLayout,
    state: SketchState,
    tuning: Tuning | None = None,
) -> Tensor:
    """Attention of `query` [B, Hq, T, D] over the best of `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    `positions`, int [T] or [B, T], are the slots that were just written, which are sketched here;
    None: none were.
    """
    batch, query_heads, query_len, _ = query.shape
    heads, kv_len = key.shape[1], key.shape[2]
    group, rows, blocks = query_heads // heads, batch * heads * query_len, layout.blocks
    tuning = tuning or tuning_for(module, "sparse", query, key, value)
    splits = max(1, min(tuning.programs // rows, 32))
    paged = kv_len > module.FLAT_TOKENS and hasattr(module, "scan_pages")
    tiles = blocks if paged else -(-kv_len // TILE)
    examined = min(PAGE * module.PAGE_ROOM.value, blocks * layout.block) if paged else kv_len
    scratch = Scratch()
    scratch.want_parts(rows, splits, group, value.shape[-1])
    padded, kept = power_of_two(group, 16), power_of_two(state.step.shape[-1], 16)
    scratch.want("weights", torch.bfloat16, rows, blocks, padded, kept)
    scratch.want("constants", torch.float32, rows, blocks, padded)
    scratch.want("totals", torch.float32, rows, blocks, padded)
    scratch.want("histogram", torch.int32, rows, 2, BINS)
    scratch.want("first", torch.int32, rows, tiles)
    scratch.want("end", torch.int32, rows, tiles)
    scratch.want("chosen", torch.int32, rows, splits, list_size(module))
    if paged:
        scratch.want("page_bins", torch.uint8, rows, blocks * layout.block // PAGE)
        scratch.want("page_ranks", torch.int32, rows, tiles, BINS)
        scratch.want("whole", torch.float32, rows, padded)
        turns = examined // (PAGE * module.TURN.value) + blocks
        scratch.want("page_constants", torch.float32, rows, blocks, padded)
        scratch.want("arrivals", torch.int32, rows)
        scratch.want("plan", torch.int32, rows, turns, 4)
        scratch.want("limits", torch.int32, rows, 4)
        scratch.want("candidates", torch.int32, rows, examined)
        scratch.want("count", torch.int32, rows)
    scratch.want("bins", torch.uint8, rows, examined if paged else layout.slots)
    made = scratch.allocate(query.device)
    written = written_arguments(positions, batch, made["first"])
    more = captured_arguments(captured)
    early = overlaps(query.device)
    waits = overlapping(early)
    module.weigh[(rows, blocks)](
        query, *query.stride(),
        state.axes, state.centre, state.step, state.spread,
        made["weights"], made["constants"], made["page_constants" if paged else "constants"],
        made["totals"], made["histogram"], made["arrivals" if paged else "histogram"],
        *written, state.header,
        kv_len, blocks, heads, query_len,
        *more,
        BLOCK=layout.block, PAGED=paged, **waits,
        num_warps=4, num_stages=1, maxnreg=WEIGH_REGISTERS,
    )  # fmt: skip
    common = [made["weights"], made["constants"], made["totals"], *written, state.header]
    common += [made["first"], made["end"]]
    sizes = [kv_len, layout.slots, blocks, heads, query_len, tiles]
    if paged:
        planned = made["plan"], turns, made["limits"]
        module.scan_pages[(rows, tiles)](
            state.pages, made["page_constants"], made["page_ranks"], made["whole"],
            made["arrivals"], *planned, made["count"],
            *common, made["page_bins"], made["histogram"], *sizes, *more,
            BLOCK=layout.block, BLOCKS=power_of_two(blocks), **waits,
            num_warps=max(1, layout.block // PAGES_OF_WARP), num_stages=1, maxnreg=PAGES_REGISTERS,
        )  # fmt: skip
        # One for each turn, unless there are many rows.
        module.scan_chosen[(rows, max(1, min(turns, PARTS // rows)))](
            state.fine, state.coarse, made["whole"], made["page_bins"], *planned,
            made["candidates"], examined,
            *common, made["bins"], made["histogram"], *sizes, *more,
            BLOCK=layout.block, TILES=power_of_two(tiles), **waits,
            num_warps=4, num_stages=1, maxnreg=CHOSEN_REGISTERS,
        )  # fmt: skip
    else:
        module.scan_tokens[(rows, tiles)](
            state.fine, state.coarse, *common, made["bins"], made["histogram"], *sizes, *more,
            BLOCK=layout.block, BLOCKS=power_of_two(blocks), **waits,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    module.attend[(rows, splits + 1)](
        query, *query.stride(),
        key, *key.stride(),
        value, *value.stride(),
        made["partial"], made["partial_top"], made["partial_sum"],
        kv_len, heads, query_len, splits,
        *state, layout.slots, blocks, layout.block, made["first"], made["end"], tiles, *written,
        made["histogram"], made["bins"], examined if paged else layout.slots,
        made["candidates" if paged else "chosen"], made["count" if paged else "chosen"],
        made["chosen"], list_size(module),
        *more,
        KEYS=tuning.keys, TILES=power_of_two(tiles), LANES=lanes(examined, splits),
        PAGED=paged, **waits, num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return combine(module, made, extra, query, heads, splits, early)


def lanes(examined: int, splits: int) -> int:
    """Slots that a program of `attend` examines at a time."""
    return max(256, min(power_of_two(-(-examined // splits)), 1024))


def run_encode(
    module: ModuleType, key: Tensor, layout: SketchLayout, state: SketchState, begin: int, end: int
) -> None:
    """Sketch the keys [B, Hkv, L, D] in the slots [begin, end), from a multiple of 64 on."""
    if end <= begin:
        return
    module.encode[(key.shape[0] * layout.kv_heads, -(-(end - begin) // 64))](
        key, *key.stride(),
        state.fine, state.coarse, state.pages, state.axes, state.centre, state.step,
        begin, end, layout.slots, layout.kv_heads, layout.blocks, layout.block,
        num_warps=4, num_stages=1,
    )  # fmt: skip
