"""Generated prefill kernels: the module, the keys that tiles choose, times of each kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from types import ModuleType

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.decode_kernels import load_module
from benchmarks.common.timing import milliseconds
from benchmarks.prefill.tensors import HEAD_DIM, HEADS, KV_HEADS
from benchmarks.prefill.truth import SCALE
from lychee_compile.codegen.specification import KV, AttentionSpec, Q, S, TileSpec
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import PREFILL, TileTuning, candidates
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget, PrefillLaunch
from lychee_compile.kernels.gpu.prefill.listed import (
    ListedPrefill,
    chooses_in_pytorch,
    listed_config,
)
from lychee_compile.kernels.gpu.prefill.lists import PrefillByLists
from lychee_compile.kernels.gpu.prefill.ranked import RankedPrefill, run_by_kernels
from lychee_compile.kernels.sizes import QUERY_TILE, SLOT_BITS

SINKS, RECENT = 16, 64
KERNELS = (
    "deal_luck", "summarise_queries", "scan", "select_keys", "store_edges", "count_levels",
    "list_groups", "list_last", "attend",
)  # fmt: skip
"""Kernels of a prefill, in the order in which they run."""


def kernels(query: Tensor, policy: str = "lychee") -> ModuleType:
    """Return the generated module of a policy for causal attention of this shape."""
    dtype = str(query.dtype).removeprefix("torch.")
    group, tiles = HEADS // KV_HEADS, TileSpec(policy, SINKS, RECENT)
    spec = AttentionSpec(dtype, group, HEAD_DIM, HEAD_DIM, SCALE * S, KV <= Q, tiles=tiles)
    return load_module(spec)


def attention(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> Callable[[], Tensor]:
    """Return a call of sparse attention by a module of `kernels`, choosing included."""
    given = AttentionOperands(*operands)
    if chooses_in_pytorch(module):
        config = listed_config(module, share)
        return lambda: ListedPrefill(module, given, config).run()[0]
    return lambda: run_by_kernels(module, given, PrefillBudget(share))[0]


def share_listed(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> float:
    """Return the share of the pairs that any policy reads."""
    if hasattr(module, "select_keys"):
        return read_by_tiles(module, operands, share)[1]
    query, context = operands[0], operands[1].shape[2]
    given = AttentionOperands(*operands)
    launch: PrefillByLists
    if chooses_in_pytorch(module):
        launch = ListedPrefill(module, given, listed_config(module, share))
    else:
        launch = RankedPrefill(module, given, PrefillBudget(share))
    read = seen = 0
    for first_tile, tiles in launch.slices():
        lists = launch.lists(first_tile, tiles)
        begin, end = lists.edge[:, 0:6:2].sum(-1), lists.edge[:, 1:6:2].sum(-1)
        read += int((lists.counts + end - begin).sum())
        last = range(first_tile + 1, first_tile + tiles + 1)
        seen += query.shape[1] * sum(min(tile * QUERY_TILE, context) for tile in last)
    return read / seen


def read_by_tiles(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> tuple[Tensor, float]:
    """Return keys that tiles chose by block of 128, int32 [Hq, tiles, blocks]; share of pairs."""
    query, key, _ = operands
    launch = PrefillLaunch(module, AttentionOperands(*operands), PrefillBudget(share))
    context, heads = key.shape[2], query.shape[1]
    tiles, blocks = launch.tiles, -(-context // QUERY_TILE)
    counts_by_block = torch.zeros(heads * tiles, blocks, dtype=torch.int32, device=query.device)
    read = 0
    for first, count in launch.slices():
        launch.select(first, count)
        counts, edge = (launch.scratch[name][:count].long() for name in ("counts", "edge"))
        always = edge[:, 1] - edge[:, 0] + edge[:, 3] - edge[:, 2] + edge[:, 5] - edge[:, 4]
        read += int((counts + always).sum())
        for row in range(count):
            slots = launch.scratch["chosen"][row, : int(counts[row])].long() % (1 << SLOT_BITS)
            counts_by_block[first + row].scatter_add_(
                0, slots // QUERY_TILE, torch.ones_like(slots).int()
            )
    seen = heads * sum(min((tile + 1) * QUERY_TILE, context) for tile in range(blocks))
    return counts_by_block.view(heads, tiles, blocks)[:, :blocks], read / seen


def breakdown(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> dict[str, float]:
    """Return the milliseconds of each kernel, by a profile of one call; empty off a GPU.

    PyTorch's own kernels are added up.
    """
    if operands[0].device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_by_kernels(module, AttentionOperands(*operands), PrefillBudget(share))
        torch.cuda.synchronize()
    times = {each.key: each.device_time_total / 1e3 for each in profiler.key_averages()}
    ours = {name: times.pop(name) for name in KERNELS if name in times}
    return ours | {"PyTorch": sum(times.values())}


def table_of_tunings(
    module: ModuleType, operands: tuple[Tensor, Tensor, Tensor], share: float
) -> Table:
    """Return a table of milliseconds of `attend` by tuning, over the tiles that run first."""
    attended, budget = AttentionOperands(*operands), PrefillBudget(share)
    table = Table(
        "queries", "keys", "warps", "stages", "registers", "ms", title=f"attend, share {share:g}"
    )
    for tuning in candidates(module, PREFILL, attended):
        assert isinstance(tuning, TileTuning)
        launch = PrefillLaunch(module, attended, budget, tuning)
        first = next(launch.slices())
        launch.select(*first)
        try:
            took = f"{milliseconds(partial(launch.attend, *first)):.2f}"
        except Exception as error:  # noqa: BLE001  the device refuses such tiles
            took = type(error).__name__
        table.add_row(*map(str, astuple(tuning)), took)
    return table
