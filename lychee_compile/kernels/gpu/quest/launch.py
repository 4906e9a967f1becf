"""Launch the kernels of a module that selects as Quest does (arXiv 2406.10774). No host sync."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.quest.layout import QuestLayout
from lychee_compile.kernels.sizes import BINS, PAGE, power_of_two

PROGRAMS = 512
"""About how many programs the scan of the boxes has."""
MOST_STEPS = 8
"""Times that a program of the scan goes on to further pages, at most."""


def run_quest(
    module: ModuleType,
    operands: AttentionOperands,
    index: IndexOperands,
    tuning: Tuning | None = None,
) -> Tensor:
    """Return attention over the best pages, [B, Hq, T, Dv].

    Pages that the slots just written have filled get their boxes. Raises TypeError for an index of
    another method.
    """
    layout = index.layout
    if not isinstance(layout, QuestLayout):
        raise TypeError(f"Quest's kernels read the index of a QuestLayout, got {layout!r}")
    step = SparseStep(module, operands, index, tuning)
    sizes = _Sizes.of(module, layout, step.rows)
    arguments = _arguments(step, sizes)
    _rank_pages(step, sizes, arguments)
    return step.attend(arguments, min(module.BUDGET.value, layout.pages * PAGE), paged=True)


@dataclass(frozen=True)
class _Sizes:
    """Shares of the pages of a row among programs."""

    pages: int
    """Pages of a row."""
    steps: int
    """Times that a program of the scan takes `SCANNED` pages."""
    tiles: int
    """Programs of the scan."""
    lots: int
    """Programs that rank `RANKED` pages each."""

    @classmethod
    def of(cls, module: ModuleType, layout: QuestLayout, rows: int) -> _Sizes:
        """Return the shares for an index of this layout; `rows` are scanned at the same time."""
        scans = -(-layout.pages // module.SCANNED.value)
        steps = min(power_of_two(-(-rows * scans // PROGRAMS)), MOST_STEPS)
        lots = -(-layout.pages // module.RANKED.value)
        return cls(layout.pages, steps, -(-scans // steps), lots)


def _arguments(step: SparseStep, sizes: _Sizes) -> dict[str, object]:
    """Return the arguments of all kernels by name."""
    rows, module, slots = step.rows, step.module, sizes.pages * PAGE
    want = step.wanted.want
    want("scores", torch.float32, rows, step.operands.group, sizes.pages)
    want("totals", torch.float32, rows, sizes.tiles, module.ROWS.value)
    want("page_bins", torch.uint8, rows, sizes.lots * module.RANKED.value)
    want("ranks", torch.int32, rows, sizes.lots, BINS)
    want("candidates", torch.int32, rows, slots)
    want("bins", torch.uint8, rows, slots)
    want("candidate_count", torch.int32, rows)
    return {
        **step.arguments(sizes.tiles),
        "pages": sizes.pages,
        "candidate_room": slots,
        "bin_room": slots,
        "STEPS": sizes.steps,
        "LOTS": power_of_two(sizes.lots),
    }


def _rank_pages(step: SparseStep, sizes: _Sizes, arguments: dict[str, object]) -> None:
    """Score all pages, find the bins of their shares, and list the slots of the best pages."""
    module, rows = step.module, step.rows
    grid = rows, sizes.tiles + 1  # the last programs compare some keys
    launch(module.scan_boxes, grid, arguments, num_warps=4, num_stages=3)
    for kernel in (module.rank_boxes, module.list_boxes):
        launch(kernel, (rows, sizes.lots), arguments, num_warps=4, num_stages=1, **step.waits)
