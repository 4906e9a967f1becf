"""Launch the kernels of certificates, behind `attend` of a step. No launch waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import Scratch, launch, of_rows
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.sizes import power_of_two

PROGRAMS = 512
"""About how many programs `bound_unread` has."""
MOST_TILES = 128
"""Most programs of it for one row: `certify` loads what each has left at once."""


def certifies(module: ModuleType) -> bool:
    """Return True if the kernels of a module bound the share of the softmax that is not read."""
    return hasattr(module, "EPSILON")


def want_certificate(
    wanted: Scratch, module: ModuleType, operands: AttentionOperands, splits: int, slots: int
) -> None:
    """Ask for the scratch memory of certificates, of an index over `slots`."""
    rows = operands.rows
    _, tiles = _shares(module, operands)
    wanted.want("marks", torch.uint8, rows, slots)
    wanted.want("longest", torch.float32, rows, splits)
    wanted.want("unread", torch.float32, rows, tiles, module.ROWS.value)
    wanted.want("missed", torch.float32, rows, operands.group)
    wanted.want("failing", torch.int32, rows)


def certify(
    module: ModuleType,
    operands: AttentionOperands,
    arguments: Mapping[str, object],
    scratch: Mapping[str, Tensor],
    tuning: Tuning,
) -> None:
    """Bound what `attend` has not read; let rows that may miss too much read all keys.

    `scratch["missed"]` has the certificates afterwards, see `missed_of`.
    """
    rows, splits = operands.rows, scratch["list_count"].shape[1]
    steps, tiles = _shares(module, operands)
    scratch["marks"].zero_()
    own = {
        **arguments,
        "bound_tiles": tiles,
        "STEPS": steps,
        "SPLITS": power_of_two(splits),
        "BOUND_TILES": power_of_two(tiles),
        "KEYS": tuning.keys,
    }
    launch(module.mark_read, (rows, splits), own, num_warps=4, num_stages=1)
    launch(module.bound_unread, (rows, tiles), own, num_warps=4, num_stages=1)
    launch(module.certify, (rows,), own, num_warps=4, num_stages=1)
    if hasattr(module, "read_uncertified"):
        options = {"num_warps": tuning.warps, "num_stages": tuning.stages}
        launch(module.read_uncertified, (rows, splits), own, **options)


def missed_of(operands: AttentionOperands, scratch: Mapping[str, Tensor]) -> Tensor:
    """Return the certificates of a step: upper bounds of the share not read, [B, Hq, T]."""
    return of_rows(operands, scratch["missed"]).movedim(-1, 2).flatten(1, 2)


def _shares(module: ModuleType, operands: AttentionOperands) -> tuple[int, int]:
    """Return how often a program of `bound_unread` takes its slots, and its programs for a row."""
    scans = max(-(-operands.kv_len // module.BOUNDED), 1)
    steps = power_of_two(-(-operands.rows * scans // PROGRAMS))
    steps = max(steps, power_of_two(-(-scans // MOST_TILES)))
    return steps, -(-scans // steps)
