"""Launch the kernels of a policy of levels: scan, rank and list, level by level. No host sync."""

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
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.levels.declaration import LevelStack
from lychee_compile.kernels.sizes import BINS, power_of_two

PROGRAMS = 512
"""About how many programs a scan has."""
USUAL_STEPS = 8
"""Times that a program of a scan goes on to further groups, unless rows are very long."""
MOST_TILES = 1024
"""Most programs of a scan for one row, as later kernels load what each has left at once."""
WINDOW = 4096
"""Slots that a program of `scan_window` looks at."""


def run_levels(
    module: ModuleType,
    operands: AttentionOperands,
    index: IndexOperands,
    tuning: Tuning | None = None,
) -> Tensor:
    """Return attention over the best groups of the last level, [B, Hq, T, Dv].

    Groups that the slots just written have filled are summarised. Raises TypeError for an index of
    another method.
    """
    layout = index.layout
    if not isinstance(layout, LevelLayout):
        raise TypeError(f"kernels of levels read the index of a LevelLayout, got {layout!r}")
    step = SparseStep(module, operands, index, tuning)
    if not layout.stack.levels:
        return _attend_to_window(step)
    sizes = _sizes(module, layout.stack, layout.slots, step.rows)
    arguments = _arguments(step, layout.stack, sizes)
    for number in range(len(sizes)):
        _rank(step, layout.stack, sizes, number, arguments)
    last, of_tokens = sizes[-1], layout.stack.last_size == 1
    examined = last.items if of_tokens else last.room
    return step.attend(arguments, examined, paged=len(sizes) > 1 or not of_tokens)


@dataclass(frozen=True)
class _Sizes:
    """Shares of the groups of one level of a row among programs."""

    items: int
    """Groups that are scored, at most."""
    steps: int
    """Times that a program of the scan takes its groups."""
    tiles: int
    """Programs of the scan."""
    lots: int
    """Programs that rank groups."""
    room: int
    """Children of the chosen groups, at most; 0: tokens have none."""


def _sizes(module: ModuleType, stack: LevelStack, slots: int, rows: int) -> list[_Sizes]:
    """Return the shares of each level, for an index of `slots`; `rows` are scanned together."""
    found: list[_Sizes] = []
    for number, level in enumerate(stack.levels):
        size = level.groups.size
        items = found[-1].room if found else slots // size
        scans = -(-items // getattr(module, f"SCANNED_{number}").value)
        steps = min(power_of_two(-(-rows * scans // PROGRAMS)), USUAL_STEPS)
        steps = max(steps, power_of_two(-(-scans // MOST_TILES)))
        lots = -(-items // module.RANKED.value)
        if number + 1 < len(stack.levels):
            kept = min(getattr(module, f"KEPT_{number}").value, items)
            room = kept * (size // stack.levels[number + 1].groups.size)
            # A row of children is as long as a row of the bins that they get.
            room = -(-room // module.RANKED.value) * module.RANKED.value
        else:
            room = 0 if size == 1 else min(items * size, (module.BUDGET.value // size + 2) * size)
        found.append(_Sizes(items, steps, -(-scans // steps), lots, room))
    return found


def _arguments(step: SparseStep, stack: LevelStack, sizes: list[_Sizes]) -> dict[str, object]:
    """Return the arguments that the kernels of all levels share, by name."""
    rows, want = step.rows, step.wanted.want
    for number, (level, size) in enumerate(zip(stack.levels, sizes, strict=True)):
        want(f"scores_{number}", torch.float32, rows, step.operands.group, size.items)
        want(f"totals_{number}", torch.float32, rows, size.tiles, step.module.ROWS.value)
        want(f"bins_{number}", torch.uint8, rows, size.lots * step.module.RANKED.value)
        if size.room:
            want(f"ranks_{number}", torch.int32, rows, size.lots, BINS)
            want(f"counts_{number}", torch.int32, rows, BINS)
            want(f"candidates_{number}", torch.int32, rows, size.room)
            want(f"count_{number}", torch.int32, rows)
            if level is stack.levels[-1]:
                want("bins", torch.uint8, rows, size.room)
    arguments = step.arguments(sizes[0].tiles)
    return {**arguments, **_for_attend(step, stack, sizes)}


def _for_attend(step: SparseStep, stack: LevelStack, sizes: list[_Sizes]) -> dict[str, object]:
    """Return where `attend` finds the bins of what may be chosen, by the names that it has."""
    scratch, last = step.scratch, len(sizes) - 1
    of_tokens = stack.last_size == 1
    listed = last - of_tokens  # the level whose list holds the slots to choose from
    bins = scratch[f"bins_{last}"] if of_tokens else scratch["bins"]
    stand_in = scratch["chosen_list"]
    return {
        "bins": bins,
        "bin_room": bins.shape[1],
        "candidates": scratch[f"candidates_{listed}"] if listed >= 0 else stand_in,
        "candidate_count": scratch[f"count_{listed}"] if listed >= 0 else stand_in,
    }


def _rank(
    step: SparseStep,
    stack: LevelStack,
    sizes: list[_Sizes],
    number: int,
    arguments: Mapping[str, object],
) -> None:
    """Score the groups of a level, find the bins of their shares, and list the best."""
    module, scratch, size = step.module, step.scratch, sizes[number]
    is_last = number + 1 == len(sizes)
    of_tokens = is_last and stack.last_size == 1
    counts = scratch["histogram"][:, int(number > 0)] if of_tokens else scratch[f"counts_{number}"]
    own = {
        **arguments,
        "scores": scratch[f"scores_{number}"],
        "totals": scratch[f"totals_{number}"],
        "group_bins": scratch[f"bins_{number}"],
        "counts": counts,
        "counts_stride": counts.stride(0),
        "items": size.items,
        "scan_tiles": size.tiles,
        "SCAN_TILES": power_of_two(size.tiles),
        "STEPS": size.steps,
        "LOTS": power_of_two(size.lots),
    }
    if number:
        own["listed"] = scratch[f"candidates_{number - 1}"]
        own["listed_count"] = scratch[f"count_{number - 1}"]
    if size.room:
        own["ranks"] = scratch[f"ranks_{number}"]
        own["candidates"] = scratch[f"candidates_{number}"]
        own["candidate_count"] = scratch[f"count_{number}"]
        own["candidate_room"] = size.room
    extra = 0 if number else 1  # the last programs compare some keys
    waits = step.waits if number else {}
    scan = getattr(module, f"scan_{number}")
    tiles = {"tiles": size.tiles} if number else {}
    launch(
        scan, (step.rows, size.tiles + extra), {**own, **tiles}, num_warps=4, num_stages=3, **waits
    )
    kernels = [getattr(module, f"rank_{number}")]
    kernels += [getattr(module, f"list_{number}")] if size.room else []
    for kernel in kernels:
        launch(kernel, (step.rows, size.lots), own, num_warps=4, num_stages=1, **step.waits)


def _attend_to_window(step: SparseStep) -> Tensor:
    """Return attention over the first and the last tokens."""
    tiles = -(-step.index.layout.slots // WINDOW)
    step.wanted.want("candidate_count", torch.int32, step.rows)
    arguments = step.arguments(tiles)
    arguments |= {"SEEN": WINDOW, "bin_room": 1, "bins": step.scratch["histogram"]}
    arguments |= {"candidates": step.scratch["chosen_list"]}
    launch(step.module.scan_window, (step.rows, tiles + 1), arguments, num_warps=4, num_stages=1)
    return step.attend(arguments, 1, paged=True)
