"""Launch the kernels of a policy of uneven groups: scan, rank and keep, level by level.

No launch waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.uneven.layout import UnevenLayout
from lychee_compile.kernels.sizes import BINS, power_of_two

PROGRAMS = 512
"""About how many programs a scan has."""
USUAL_STEPS = 8
"""Times that a program of a scan goes on to further groups, unless rows are very long."""
MOST_TILES = 1024
"""Most programs of a scan for one row, as later kernels load what each has left at once."""
WINDOW = 4096
"""Slots that a program of `scan_window` looks at."""


@dataclass(frozen=True)
class _Sizes:
    """Shares of the groups of one level of a row among programs."""

    items: int
    """Groups that there is room for."""
    steps: int
    """Times that a program of the scan takes its groups."""
    tiles: int
    """Programs of the scan."""
    lots: int
    """Programs that rank groups."""


def run_uneven(
    module: ModuleType,
    operands: AttentionOperands,
    index: IndexOperands,
    tuning: Tuning | None = None,
) -> Tensor:
    """Return attention over the best groups of the last level, [B, Hq, T, Dv].

    What the slots just written have completed is indexed. Raises TypeError for an index of another
    method.
    """
    layout = index.layout
    if not isinstance(layout, UnevenLayout):
        raise TypeError(f"kernels of uneven groups read the index of an UnevenLayout: {layout!r}")
    step = SparseStep(module, operands, index, tuning)
    sizes = [_sizes(module, number, items, step.rows) for number, items in enumerate(layout.groups)]
    arguments = _arguments(step, layout, sizes)
    if hasattr(module, "scan_window"):
        grid = (step.rows, -(-layout.slots // WINDOW) + 1)
        own = {**arguments, "SEEN": WINDOW}
        launch(module.scan_window, grid, own, num_warps=4, num_stages=1)
    for number in range(len(sizes)):
        _rank(step, sizes, number, arguments)
    if layout.of_chunks:
        return step.attend(arguments, step.scratch["bins"].shape[1], paged=True)
    return _attend_to_clusters(step, arguments)


def _sizes(module: ModuleType, number: int, items: int, rows: int) -> _Sizes:
    """Return the shares of a level of `items` groups; `rows` are scanned together."""
    scans = -(-items // getattr(module, f"SCANNED_{number}").value)
    steps = min(power_of_two(-(-rows * scans // PROGRAMS)), USUAL_STEPS)
    steps = max(steps, power_of_two(-(-scans // MOST_TILES)))
    return _Sizes(items, steps, -(-scans // steps), -(-items // module.RANKED.value))


def _arguments(step: SparseStep, layout: UnevenLayout, sizes: list[_Sizes]) -> dict[str, object]:
    """Return the arguments that the kernels of all levels share, by name."""
    rows, want = step.rows, step.wanted.want
    for number, size in enumerate(sizes):
        want(f"scores_{number}", torch.float32, rows, step.operands.group, size.items)
        want(f"totals_{number}", torch.float32, rows, size.tiles, step.module.ROWS.value)
        want(f"bins_{number}", torch.uint8, rows, size.lots * step.module.RANKED.value)
        want(f"ranks_{number}", torch.int32, rows, size.lots, BINS)
        want(f"counts_{number}", torch.int32, rows, BINS)
    room = -(-step.module.BUDGET.value // 16) * 16 if layout.of_chunks else layout.slots
    want("bins", torch.uint8, rows, room)
    want("candidates", torch.int32, rows, room if layout.of_chunks else 1)
    want("candidate_count", torch.int32, rows)
    arguments = step.arguments(-(-layout.slots // WINDOW))
    arguments |= {"bin_room": room, "candidate_room": room, "numbers": sizes[-1].items}
    if layout.of_chunks and len(sizes) > 1:
        arguments["label"] = arguments[f"label_{len(sizes) - 1}"]
    return arguments


def _rank(
    step: SparseStep, sizes: list[_Sizes], number: int, arguments: Mapping[str, object]
) -> None:
    """Score the groups of a level, find the bins of their shares, and keep or list the best."""
    module, scratch, size = step.module, step.scratch, sizes[number]
    own = {
        **arguments,
        "scores": scratch[f"scores_{number}"],
        "totals": scratch[f"totals_{number}"],
        "group_bins": scratch[f"bins_{number}"],
        "ranks": scratch[f"ranks_{number}"],
        "counts": scratch[f"counts_{number}"],
        "counts_stride": BINS,
        "items": size.items,
        "scan_tiles": size.tiles,
        "SCAN_TILES": power_of_two(size.tiles),
        "STEPS": size.steps,
        "LOTS": power_of_two(size.lots),
    }
    if number:
        own["parents"] = scratch[f"bins_{number - 1}"]
        own["parent_room"] = scratch[f"bins_{number - 1}"].shape[1]
    checks = number == 0 and not hasattr(module, "scan_window")
    grid = (step.rows, size.tiles + checks)
    waits = {} if checks else step.waits
    launch(getattr(module, f"scan_{number}"), grid, own, num_warps=4, num_stages=3, **waits)
    for name in (f"rank_{number}", f"keep_{number}", f"list_{number}"):
        if hasattr(module, name):
            kernel = getattr(module, name)
            launch(kernel, (step.rows, size.lots), own, num_warps=4, num_stages=1, **step.waits)


def _attend_to_clusters(step: SparseStep, arguments: Mapping[str, object]) -> Tensor:
    """Give slots the bins of their clusters of tokens, and return attention by these."""
    module, slots = step.module, step.index.layout.slots
    clusters = step.scratch["bins_0"]
    own = {**arguments, "group_bins": clusters, "group_room": clusters.shape[1]}
    grid = (step.rows, -(-slots // module.SPREAD.value))
    launch(module.spread_0, grid, own, num_warps=4, num_stages=1, **step.waits)
    return step.attend(arguments, slots, paged=False)
