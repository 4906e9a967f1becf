"""Launch the kernels by which an index of sketches bounds the keys that are not read."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch

from lychee_compile.kernels.gpu.common.launch_common import Scratch, launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep


def want_bound_weights(wanted: Scratch, module: ModuleType, rows: int, blocks: int) -> None:
    """Ask for the scratch memory of `weigh_blocks`."""
    heads, kept = module.ROWS.value, module.KEPT_COLUMNS.value
    wanted.want("bound_weights", torch.float32, rows, blocks, heads, kept)
    wanted.want("bound_reach", torch.float32, rows, blocks, 4, heads)


def weigh_blocks(step: SparseStep, arguments: Mapping[str, object], blocks: int) -> None:
    """Weigh the axes of each block by the queries, as exactly as bounds need it."""
    launch(step.module.weigh_blocks, (step.rows, blocks), arguments, num_warps=4, num_stages=1)


def measure_new(step: SparseStep, arguments: Mapping[str, object]) -> None:
    """Measure the sketches of the keys that this step has written."""
    if step.index.positions is not None:
        grid = (step.operands.query.shape[0] * step.operands.kv_heads,)
        launch(step.module.measure_new, grid, arguments, num_warps=4, num_stages=1)
