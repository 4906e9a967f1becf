"""Weigh the codes of sketches by the queries, before any of them is scored."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep
from lychee_compile.kernels.sizes import power_of_two

WEIGHTS_REGISTERS = 96
"""Most registers of a thread: programs of a kernel and of the next fit on the device together."""


def want_weights(step: SparseStep, blocks: int) -> None:
    """Ask for the scratch memory of `query_weights`."""
    rows, want = step.rows, step.wanted.want
    heads = power_of_two(step.operands.group, 16)
    want("weights", torch.int8, rows, blocks, heads, step.module.WEIGHT_COLUMNS.value)
    want("scales", torch.float32, rows, blocks, heads)
    want("constants", torch.float32, rows, blocks, heads)
    want("totals", torch.float32, rows, blocks, heads)


def with_stand_ins(arguments: Mapping[str, object]) -> dict[str, object]:
    """Return `arguments`, with any pointer for those that not all kernels read."""
    return {
        "page_constants": arguments["constants"],
        "arrivals": arguments["histogram"],
        "luck": arguments["histogram"],
        "candidates": arguments["chosen_list"],
        "candidate_count": arguments["chosen_list"],
        **arguments,
    }


def query_weights(step: SparseStep, blocks: int, arguments: Mapping[str, object]) -> None:
    """Weigh the codes of each block by the query, and clear what later kernels count."""
    launch(
        step.module.query_weights,
        (step.rows, blocks),
        arguments,
        num_warps=4,
        num_stages=1,
        maxnreg=WEIGHTS_REGISTERS,
        **step.waits,
    )
