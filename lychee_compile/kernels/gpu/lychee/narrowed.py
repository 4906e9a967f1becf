"""Launch the kernels by which chunks narrow a long context, and sketches rank their tokens."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep
from lychee_compile.kernels.gpu.levels.launch import WINDOW, rank_levels, want_levels
from lychee_compile.kernels.gpu.levels.shares import shares_of_levels
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout, SketchState
from lychee_compile.kernels.gpu.lychee.weights import query_weights, want_weights, with_stand_ins
from lychee_compile.kernels.sizes import power_of_two

LISTED_PROGRAMS = 2048
"""About how many programs of `scan_listed` share the candidates of all rows."""


def narrows(module: ModuleType, layout: SketchLayout, kv_len: int) -> bool:
    """Return True if chunks narrow a choice among `kv_len` slots, by kernels of a module."""
    has_chunks = layout.settings is not None and hasattr(module, "scan_listed")
    return has_chunks and kv_len > module.FLAT_TOKENS


def follow_chunks(step: SparseStep, layout: SketchLayout) -> None:
    """Cut and summarise the chunks that the keys just written close, if an index has chunks."""
    chunks, operands = layout.chunks, step.operands
    if chunks is None or step.index.positions is None:
        return
    arguments = {
        **operands.key_arguments(),
        **step.index.state._asdict(),
        **step.written(),
        "slots": layout.slots,
        "numbers": chunks.groups[-1],
        "kv_heads": layout.kv_heads,
        "kv_len": operands.kv_len,
    }
    grid = (operands.key.shape[0] * layout.kv_heads,)
    launch(step.module.index_chunks, grid, arguments, num_warps=4, num_stages=1)


def run_narrowed(step: SparseStep, layout: SketchLayout, state: SketchState) -> Tensor:
    """Return attention over the best tokens of the best chunks, [B, Hq, T, Dv]."""
    chunks = layout.chunks
    assert chunks is not None
    module, rows, blocks = step.module, step.rows, layout.blocks
    shares = shares_of_levels(module, chunks, rows)
    room, tiles = shares[-1].room, -(-layout.slots // WINDOW)
    want_weights(step, blocks)
    want_levels(step, shares)
    step.wanted.want("bins", torch.uint8, rows, room)
    step.wanted.want("candidate_count", torch.int32, rows)
    arguments = {
        **with_stand_ins(step.arguments(tiles)),
        "blocks": blocks,
        "BLOCK": layout.block,
        "BLOCKS": power_of_two(blocks),
        "PAGED": False,
        "DEALT": False,
        "numbers": shares[-1].groups,
    }
    query_weights(step, blocks, arguments)
    rank_levels(step, shares, arguments, tiles)
    last = len(shares) - 1
    arguments |= {
        "candidates": step.scratch[f"candidates_{last}"],
        "listed_count": step.scratch[f"count_{last}"],
        "candidate_room": room,
        "bin_room": room,
    }
    programs = max(1, min(-(-room // module.LISTED.value), LISTED_PROGRAMS // rows))
    launch(module.scan_listed, (rows, programs), arguments, num_warps=4, num_stages=1, **step.waits)
    usual = module.OVERFETCH.value * module.BUDGET.value
    return step.attend(arguments, min(usual, room), paged=True)
