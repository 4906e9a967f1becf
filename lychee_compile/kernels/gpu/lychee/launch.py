"""Launch the kernels of a module that selects by sketches. No host sync."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.launch_sparse import SparseStep, draws
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands, key_arguments
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.lychee.certificate import (
    measure_new,
    want_bound_weights,
    weigh_blocks,
)
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout, SketchState
from lychee_compile.kernels.gpu.lychee.narrowed import follow_chunks, narrows, run_narrowed
from lychee_compile.kernels.gpu.lychee.weights import query_weights, want_weights, with_stand_ins
from lychee_compile.kernels.sizes import BINS, PAGE, SCAN_SLOTS, power_of_two

CHOSEN_PROGRAMS = 1024
"""About how many programs of `scan_chosen` share the turns of all rows."""
SCAN_PROGRAMS, MOST_STEPS = 1024, 8
"""Least number of programs of `scan_tokens` that are left if they take several tiles each, and most
tiles of one."""
PAGES_OF_WARP = 128 * PAGE
"""Slots whose pages one warp ranks."""
PAGES_REGISTERS, CHOSEN_REGISTERS, SCAN_REGISTERS = 128, 128, 128
"""Most registers of a thread: programs of a kernel and of the next fit on the device together."""
ENCODED = 64
"""Slots that one program of `encode` sketches."""
DEALT = 2**16
"""Size of a table of luck. If rows are many, each step makes one for all of them."""
MOST_PROGRAMS = 65535
"""Most programs of a launch along its second axis, by CUDA's limit."""


def run_lychee(
    module: ModuleType,
    operands: AttentionOperands,
    index: IndexOperands,
    tuning: Tuning | None = None,
) -> Tensor:
    """Return attention over the best tokens, [B, Hq, T, Dv].

    The keys in the slots just written are sketched. Raises TypeError for an index of another
    method.
    """
    layout, state = index.layout, index.state
    if not (isinstance(layout, SketchLayout) and isinstance(state, SketchState)):
        raise TypeError(f"lychee's kernels read the index of a SketchLayout, got {layout!r}")
    step = SparseStep(module, operands, index, tuning)
    follow_chunks(step, layout)
    if narrows(module, layout, operands.kv_len):
        return run_narrowed(step, layout, state)
    sizes = _Sizes.of(module, layout, operands.kv_len)
    arguments = _arguments(step, layout, state, sizes)
    if layout.measured:
        weigh_blocks(step, arguments, layout.blocks)
    query_weights(step, sizes.blocks, arguments)
    if sizes.paged:
        _rank_pages(step, layout, sizes, arguments)
    else:
        steps = scan_steps(step.rows * sizes.tiles, layout.block)
        grid = step.rows, -(-sizes.tiles // steps) + 1  # the last programs compare some keys
        own = {**arguments, "STEPS": steps}
        launch(
            module.scan_tokens,
            grid,
            own,
            num_warps=4,
            num_stages=1,
            maxnreg=SCAN_REGISTERS,
            **step.waits,
        )
    output = step.attend(arguments, sizes.examined, sizes.paged)
    if layout.measured:
        measure_new(step, arguments)
    return output


def scan_steps(tiles: int, block: int) -> int:
    """Return how many tiles of one block a program of `scan_tokens` takes, of `tiles` in all rows.

    It loads the weights of its block once. Some programs for each multiprocessor must be left.
    """
    steps = 1
    while tiles >= 2 * steps * SCAN_PROGRAMS and 2 * steps * SCAN_SLOTS <= block:
        steps *= 2
    return min(steps, MOST_STEPS)


@dataclass(frozen=True)
class _Sizes:
    """Shares of the tokens of a row among programs."""

    paged: bool
    """True if pages are ranked first, and then the tokens of the best pages alone."""
    blocks: int
    """Blocks that share their axes."""
    tiles: int
    """Programs of the scan."""
    examined: int
    """Tokens whose bins `attend` looks at, of a long context."""
    room: int
    """Most tokens whose bins `attend` looks at."""
    turns: int
    """Turns in which `scan_chosen` ranks the tokens of chosen pages; 0: there is none."""

    @classmethod
    def of(cls, module: ModuleType, layout: SketchLayout, kv_len: int) -> _Sizes:
        """Return the shares of `kv_len` tokens in an index of this layout."""
        blocks = layout.blocks
        if not (module.RANKS_PAGES and kv_len > module.FLAT_TOKENS):
            return cls(False, blocks, -(-kv_len // SCAN_SLOTS), kv_len, layout.slots, 0)
        whole, pages = blocks * layout.block, module.PAGE_ROOM.value
        examined = min(PAGE * pages, whole)
        room = min(PAGE * max(pages, module.FLAT_PAGES.value), whole)
        return cls(
            True, blocks, blocks, examined, room, room // (PAGE * module.TURN.value) + blocks
        )


def _arguments(
    step: SparseStep, layout: SketchLayout, state: SketchState, sizes: _Sizes
) -> dict[str, object]:
    """Return the arguments of all kernels by name."""
    rows, blocks, want = step.rows, sizes.blocks, step.wanted.want
    heads = power_of_two(step.operands.group, 16)
    want_weights(step, blocks)
    want("bins", torch.uint8, rows, sizes.room)
    if sizes.paged:
        _want_pages(step, layout, sizes, heads)
    deals = draws(step.module) and step.lists
    if deals:
        want("luck", torch.uint8, DEALT)
    if layout.measured:
        want_bound_weights(step.wanted, step.module, rows, layout.blocks)
    return {
        **with_stand_ins(step.arguments(sizes.tiles)),
        "blocks": blocks,
        "BLOCK": layout.block,
        "BLOCKS": power_of_two(blocks),
        "PAGED": sizes.paged,
        "turns": sizes.turns,
        "bin_room": sizes.room,
        "candidate_room": sizes.room,
        "DEALT": deals,
    }


def _want_pages(step: SparseStep, layout: SketchLayout, sizes: _Sizes, heads: int) -> None:
    """Ask for the scratch memory of kernels that rank pages; `heads` are padded."""
    rows, blocks, want = step.rows, sizes.blocks, step.wanted.want
    want("page_bins", torch.uint8, rows, blocks * layout.block // PAGE)
    want("ranks", torch.int32, rows, sizes.tiles, BINS)
    want("whole", torch.float32, rows, heads)
    want("page_constants", torch.float32, rows, blocks, heads)
    want("arrivals", torch.int32, rows)
    want("plan", torch.int32, rows, sizes.turns, 4)
    want("limits", torch.int32, rows, 4)
    want("candidates", torch.int32, rows, sizes.room)
    want("candidate_count", torch.int32, rows)


def _rank_pages(
    step: SparseStep, layout: SketchLayout, sizes: _Sizes, arguments: Mapping[str, object]
) -> None:
    """Rank all pages, and then the tokens of the best: one turn a program, or several.

    Programs of many rows have fewer warps, which wait for each other less.
    """
    launch(
        step.module.scan_pages,
        (step.rows, sizes.tiles + 1),
        {**arguments, "bins": arguments["page_bins"]},
        num_warps=max(1, layout.block // PAGES_OF_WARP // (2 if step.lists else 1)),
        num_stages=1,
        maxnreg=PAGES_REGISTERS,
        **step.waits,
    )
    launch(
        step.module.scan_chosen,
        (step.rows, max(1, min(sizes.turns, CHOSEN_PROGRAMS // step.rows))),
        arguments,
        num_warps=2 if step.lists else 4,
        num_stages=1,
        maxnreg=CHOSEN_REGISTERS,
        **step.waits,
    )


def run_encode(
    module: ModuleType, key: Tensor, layout: SketchLayout, state: SketchState, begin: int, end: int
) -> None:
    """Sketch the keys [B, Hkv, L, D] in the slots [begin, end); `begin` is a multiple of 64."""
    arguments = {
        **key_arguments(key),
        **state._asdict(),
        "end": end,
        "slots": layout.slots,
        "kv_heads": layout.kv_heads,
        "blocks": layout.blocks,
        "BLOCK": layout.block,
    }
    rows = key.shape[0] * layout.kv_heads
    for start in range(begin, end, MOST_PROGRAMS * ENCODED):
        programs = min(-(-(end - start) // ENCODED), MOST_PROGRAMS)
        grid, own = (rows, programs), {**arguments, "begin": start}
        launch(module.encode, grid, own, num_warps=4, num_stages=1)
        if layout.measured:
            launch(module.measure, grid, own, num_warps=4, num_stages=1)
