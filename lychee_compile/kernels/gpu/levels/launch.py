"""Launch the kernels of a policy of levels: scan, rank and list, level by level. No host sync."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.shares import Shares, shares_of_levels
from lychee_compile.kernels.sizes import BINS, power_of_two

WINDOW = 4096
"""Slots that a program of `scan_window` looks at."""


def run_levels(
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
    if not isinstance(layout, LevelLayout):
        raise TypeError(f"kernels of levels read the index of a LevelLayout, got {layout!r}")
    step = SparseStep(module, operands, index, tuning)
    shares = shares_of_levels(module, layout, step.rows)
    looks = hasattr(module, "scan_window")
    tiles = -(-layout.slots // WINDOW) if looks or layout.stack.uneven else shares[0].tiles
    arguments = _arguments(step, shares, tiles)
    rank_levels(step, shares, arguments, tiles)
    return _attend(step, shares, arguments)


def rank_levels(
    step: SparseStep, shares: list[Shares], arguments: Mapping[str, object], tiles: int
) -> None:
    """Rank the groups of all levels, and list what is in the best.

    `tiles` programs look which slots are seen, if that takes a kernel of its own.
    """
    looks = hasattr(step.module, "scan_window")
    if looks:
        grid, own = (step.rows, tiles + 1), {**arguments, "SEEN": WINDOW}
        launch(step.module.scan_window, grid, own, num_warps=4, num_stages=1)
    for number in range(len(shares)):
        _rank(step, shares, number, arguments, checks=number == 0 and not looks)


def _arguments(step: SparseStep, shares: list[Shares], tiles: int) -> dict[str, object]:
    """Return the arguments that the kernels of all levels share, by name."""
    rows, want = step.rows, step.wanted.want
    want("candidate_count", torch.int32, rows)
    want_levels(step, shares)
    spreads = hasattr(step.module, "spread_0")
    room = step.index.layout.slots if spreads else shares[-1].room if shares else 0
    want("bins", torch.uint8, rows, room)
    arguments = {**step.arguments(tiles), "numbers": shares[-1].groups if shares else 0}
    return arguments | _for_attend(step, shares)


def want_levels(step: SparseStep, shares: list[Shares]) -> None:
    """Ask for the scratch memory of all levels."""
    rows, want = step.rows, step.wanted.want
    for number, share in enumerate(shares):
        want(f"scores_{number}", torch.float32, rows, step.operands.group, share.items)
        want(f"totals_{number}", torch.float32, rows, share.tiles, step.module.ROWS.value)
        want(f"bins_{number}", torch.uint8, rows, share.lots * step.module.RANKED.value)
        for name in ("ranks", "child_ranks"):
            want(f"{name}_{number}", torch.int32, rows, share.lots if share.room else 0, BINS)
        want(f"counts_{number}", torch.int32, rows, BINS)
        want(f"child_counts_{number}", torch.int32, rows, BINS)
        want(f"candidates_{number}", torch.int32, rows, share.room)
        want(f"count_{number}", torch.int32, rows)


def _for_attend(step: SparseStep, shares: list[Shares]) -> dict[str, object]:
    """Return where `attend` finds the bins of what may be chosen, by the names that it has."""
    scratch, last = step.scratch, len(shares) - 1
    of_tokens = bool(shares) and not (shares[-1].room or hasattr(step.module, "spread_0"))
    listed = last - of_tokens  # the level whose list holds the slots to choose from
    bins = scratch[f"bins_{last}"] if of_tokens else scratch["bins"]
    found = {"bins": bins, "bin_room": bins.shape[1], "candidates": scratch["chosen_list"]}
    if listed >= 0:
        found["candidates"] = scratch[f"candidates_{listed}"]
        found["candidate_count"] = scratch[f"count_{listed}"]
    return found


def _rank(
    step: SparseStep,
    shares: list[Shares],
    number: int,
    arguments: Mapping[str, object],
    checks: bool,
) -> None:
    """Score the groups of a level, find the bins of their shares, and list what is in the best."""
    module, scratch, share = step.module, step.scratch, shares[number]
    of_tokens = number + 1 == len(shares) and not share.room
    counts = scratch["histogram"][:, int(number > 0)] if of_tokens else scratch[f"counts_{number}"]
    named = ("scores", "totals", "ranks", "child_ranks", "child_counts", "candidates")
    own: dict[str, object] = {
        **arguments,
        **{name: scratch[f"{name}_{number}"] for name in named},
        "candidate_count": scratch[f"count_{number}"],
        "candidate_room": share.room,
        "group_bins": scratch[f"bins_{number}"],
        "counts": counts,
        "counts_stride": counts.stride(0),
        "groups": share.groups,
        "items": share.items,
        "scan_tiles": share.tiles,
        "SCAN_TILES": power_of_two(share.tiles),
        "STEPS": share.steps,
        "lots": share.lots,
        "LISTS": share.lists,
        "LOTS": power_of_two(share.lots),
    }
    if number:
        own["listed"] = scratch[f"candidates_{number - 1}"]
        own["listed_room"] = shares[number - 1].room
        own["listed_count"] = scratch[f"count_{number - 1}"]
    if number + 1 < len(shares):
        own["child_groups"] = shares[number + 1].groups
    scan, grid = getattr(module, f"scan_{number}"), (step.rows, share.tiles + checks)
    waits = {} if checks else step.waits  # one more program compares some keys
    launch(scan, grid, own, num_warps=4, num_stages=3, **waits)
    kernels = {f"rank_{number}": share.programs}
    kernels |= {} if share.lists else {f"list_{number}": share.listers}
    for name, programs in kernels.items():
        if hasattr(module, name):
            kernel, grid = getattr(module, name), (step.rows, programs)
            launch(kernel, grid, own, num_warps=4, num_stages=1, **step.waits)


def _attend(step: SparseStep, shares: list[Shares], arguments: Mapping[str, object]) -> Tensor:
    """Return attention over what the last level has chosen, or may choose."""
    module, slots = step.module, step.index.layout.slots
    if not shares:
        return step.attend(arguments, 1, paged=True)
    if not hasattr(module, "spread_0"):
        examined = shares[-1].room or shares[-1].items
        return step.attend(arguments, examined, paged=bool(len(shares) > 1 or shares[-1].room))
    clusters = step.scratch["bins_0"]
    own = {**arguments, "group_bins": clusters, "group_room": clusters.shape[1]}
    grid = (step.rows, -(-slots // module.SPREAD.value))
    launch(module.spread_0, grid, own, num_warps=4, num_stages=1, **step.waits)
    return step.attend(arguments, slots, paged=False)
