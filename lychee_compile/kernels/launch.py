"""Launch the kernels of a generated module: grids, scratch memory, arguments. No host sync."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.slot_layout import BLOCK, PAGE, TILE, SlotLayout, SlotState
from lychee_compile.kernels.tuning import MOST_SPLITS, Tuning, tuning_for

BINS = 256
"""Of a histogram of shares."""
LOTS = 512
"""Programs among which the chosen pages of all rows are dealt out, about."""


class _Scratch:
    """Pieces of one uninitialised allocation, by name."""

    def __init__(self) -> None:
        self._pieces: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}

    def want(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        self._pieces[name] = dtype, shape

    def allocate(self, device: torch.device) -> dict[str, Tensor]:
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self._pieces.values()]
        places = [0, *itertools.accumulate(-(-size // 256) * 256 for size in sizes)]
        whole = torch.empty(places[-1], dtype=torch.uint8, device=device)
        return {
            name: whole[start : start + size].view(dtype).view(shape)
            for (name, (dtype, shape)), start, size in zip(
                self._pieces.items(), places[:-1], sizes, strict=True
            )
        }


def captured_arguments(captured: Sequence[Tensor]) -> list[Any]:
    """Tensors that expressions read, each with its strides."""
    return [value for each in captured for value in (each, *each.stride())]


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
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    scratch = _Scratch()
    _want_parts(scratch, rows, splits, query_heads // heads, value.shape[-1])
    made = scratch.allocate(query.device)
    early = _early(query.device)
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
    _combine(module, made, extra, query, output, heads, splits, early)
    return output


def run_sparse(
    module: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: Sequence[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    layout: SlotLayout,
    state: SlotState,
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
    parts = max(1, min(_power(LOTS // (rows * blocks)), 8)) if paged else 1
    lots, list_size = blocks * parts, -(-(module.BUDGET.value + 64) // 64) * 64
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    scratch = _Scratch()
    _want_parts(scratch, rows, splits, group, value.shape[-1])
    padded, kept = _power(max(group, 16)), _power(max(state.step.shape[-1], 16))
    scratch.want("weights", torch.bfloat16, rows, blocks, padded, kept)
    scratch.want("constants", torch.float32, rows, blocks, 2, padded)
    scratch.want("totals", torch.float32, rows, blocks, padded)
    scratch.want("histogram", torch.int32, rows, 2, BINS)
    scratch.want("first", torch.int32, rows, tiles)
    scratch.want("end", torch.int32, rows, tiles)
    scratch.want("chosen", torch.int32, rows, splits, list_size)
    if paged:
        scratch.want("page_bins", torch.uint8, rows, blocks * BLOCK // PAGE)
        scratch.want("page_list", torch.int32, rows, blocks * BLOCK // PAGE)
        scratch.want("candidates", torch.int32, rows, blocks * BLOCK)
        scratch.want("bins", torch.uint8, rows, blocks * BLOCK)
        scratch.want("counts", torch.int32, rows, lots)
    else:
        scratch.want("bins", torch.uint8, rows, layout.slots)
    made = scratch.allocate(query.device)
    if positions is None:
        where: list[Any] = [made["first"], 0, 0, 0]
    else:
        wide = positions.expand(batch, -1)
        where = [wide, *wide.stride(), wide.shape[1]]
    more = captured_arguments(captured)
    early = _early(query.device)
    waits = {"EARLY": early, **({"launch_pdl": True} if early else {})}
    module.weigh[(rows, blocks)](
        query, *query.stride(),
        state.axes, state.centre, state.step, state.spread,
        made["weights"], made["constants"], made["totals"], made["histogram"],
        *where, state.header,
        kv_len, blocks, heads, query_len,
        *more,
        EARLY=early, num_warps=4, num_stages=1,
    )  # fmt: skip
    common = [made["weights"], made["constants"], made["totals"], *where, state.header]
    common += [made["first"], made["end"]]
    sizes = [kv_len, layout.slots, blocks, heads, query_len, tiles]
    if paged:
        module.scan_pages[(rows, tiles)](
            state.pages, *common, made["page_bins"], made["histogram"], *sizes, *more,
            BLOCKS=_power(blocks), **waits, num_warps=4, num_stages=1,
        )  # fmt: skip
        module.scan_chosen[(rows, lots)](
            state.fine, state.coarse,
            made["page_bins"], made["page_list"], made["candidates"], made["counts"],
            *common, made["bins"], made["histogram"], *sizes, *more,
            TILES=_power(tiles), BLOCKS=_power(blocks), PARTS=parts, **waits,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    else:
        module.scan_tokens[(rows, tiles)](
            state.fine, state.coarse, *common, made["bins"], made["histogram"], *sizes, *more,
            BLOCKS=_power(blocks), **waits, num_warps=4, num_stages=1,
        )  # fmt: skip
    examined = PAGE * module.PAGE_ROOM.value if paged else kv_len
    module.attend[(rows, splits + 1)](
        query, *query.stride(),
        key, *key.stride(),
        value, *value.stride(),
        made["partial"], made["partial_top"], made["partial_sum"],
        kv_len, heads, query_len, splits,
        *state, layout.slots, blocks, made["first"], made["end"], tiles, *where,
        made["histogram"], made["bins"],
        made["candidates" if paged else "chosen"], made["counts" if paged else "chosen"],
        lots, BLOCK // parts, made["chosen"], list_size,
        *more,
        KEYS=tuning.keys, TILES=_power(tiles), LOTS=_power(lots),
        LANES=max(256, min(_power(examined // splits), 1024)), PAGED=paged, **waits,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    _combine(module, made, extra, query, output, heads, splits, early)
    return output


def _combine(
    module: ModuleType,
    made: Mapping[str, Tensor],
    extra: Tensor | None,
    query: Tensor,
    output: Tensor,
    heads: int,
    splits: int,
    early: bool,
) -> None:
    batch, query_heads, query_len, _ = query.shape
    # The extra logits, broadcastable to [B, Hq, T]; without any the kernel has no use for them.
    logits = query.expand(*query.shape) if extra is None else extra.expand(query.shape[:3])
    module.combine[(batch * heads * query_len, query_heads // heads)](
        made["partial"], made["partial_top"], made["partial_sum"],
        logits, *logits.stride()[:3],
        output, *output.stride(),
        heads, query_len, splits,
        SPLITS=_power(splits), EARLY=early, **({"launch_pdl": True} if early else {}),
        num_warps=4, num_stages=1,
    )  # fmt: skip


def _early(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended, as Hopper's may."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def run_encode(
    module: ModuleType, key: Tensor, layout: SlotLayout, state: SlotState, begin: int, end: int
) -> None:
    """Sketch the keys [B, Hkv, L, D] in the slots [begin, end), from a multiple of 64 on."""
    if end <= begin:
        return
    module.encode[(layout.batch * layout.kv_heads, -(-(end - begin) // 64))](
        key, *key.stride(),
        state.fine, state.coarse, state.pages, state.axes, state.centre, state.step,
        begin, end, layout.slots, layout.kv_heads, layout.blocks,
        num_warps=4, num_stages=1,
    )  # fmt: skip


def _want_parts(scratch: _Scratch, rows: int, splits: int, group: int, value_dim: int) -> None:
    """What each program of an attention kernel leaves for `combine`."""
    scratch.want("partial", torch.float32, rows, splits, group, value_dim)
    scratch.want("partial_top", torch.float32, rows, splits, group)
    scratch.want("partial_sum", torch.float32, rows, splits, group)


def _power(value: int) -> int:
    return 1 << (max(value, 1) - 1).bit_length()
