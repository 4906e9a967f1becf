"""The beginning and the end of a sparse step, which all methods share.

In between a method ranks the tokens, by kernels of its own. It leaves, for each row, bins of the
tokens' shares and a histogram of them; `attend` finds the threshold and reads the best tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.certificate import certifies, certify, want_certificate
from lychee_compile.kernels.gpu.common.device import overlapping, overlaps
from lychee_compile.kernels.gpu.common.launch_common import (
    Scratch,
    combine,
    launch,
    log_weight,
    of_rows,
)
from lychee_compile.kernels.gpu.common.layout import IndexOperands, row_ends
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning, lists_apart, tuning_for
from lychee_compile.kernels.sizes import BINS, MOST_DRAWN_FROM, power_of_two

MOST_SPARSE_SPLITS = 32
"""Programs that may share one row of a sparse step, at most."""
USUAL_LANES, LISTED_LANES = 1024, 2048
"""Most slots that a program of `attend`, or of `choose`, examines at a time."""
LISTED_REGISTERS = 128
"""Most registers of a thread of `attend` if the keys are listed."""


class SparseStep:
    """One step of decoding over an index: its operands, scratch memory and arguments by name.

    A method asks for scratch memory of its own (`wanted`), takes the arguments (`arguments`),
    launches what ranks the tokens, and ends with `attend`.
    """

    def __init__(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        index: IndexOperands,
        tuning: Tuning | None = None,
    ) -> None:
        self.module, self.operands, self.index = module, operands, index
        self.tuning = tuning or tuning_for(module, "sparse", operands)
        self.rows = operands.rows
        self.lists = lists_apart(module, operands)
        """True if a kernel of its own lists the keys to read."""
        self.splits = max(1, min(self.tuning.programs // self.rows, MOST_SPARSE_SPLITS))
        """Programs of `attend` that share a row."""
        self.early = overlaps(operands.query.device)
        self.waits = overlapping(self.early)
        """Options of kernels that begin before the one before them has ended."""
        self.wanted = Scratch()
        self.scratch: Mapping[str, Tensor] = {}
        self._own: Mapping[str, object] = {}

    def arguments(self, tiles: int) -> dict[str, object]:
        """Allocate the scratch memory and return the arguments that all methods have, by name.

        `tiles` are the programs that the scan has for each row; each notes the first and the last
        slot that it saw.
        """
        capacity = list_size(self.module)
        self.wanted.want_parts(self.operands, self.splits)
        self.wanted.want("histogram", torch.int32, self.rows, 2, BINS)
        self.wanted.want("tile_first", torch.int32, self.rows, tiles)
        self.wanted.want("tile_end", torch.int32, self.rows, tiles)
        if covers_mass(self.module):
            heads = self.module.ROWS.value
            self.wanted.want("whole", torch.float32, self.rows, heads)
            self.wanted.want("head_mass", torch.int64, self.rows, heads)
        self.wanted.want("chosen_list", torch.int32, self.rows, self.splits, capacity)
        self.wanted.want("list_count", torch.int32, self.rows, self.splits)
        if certifies(self.module):
            slots = self.index.layout.slots
            want_certificate(self.wanted, self.module, self.operands, self.splits, slots)
        self.scratch = self.wanted.allocate(self.operands.query.device)
        if _watchers:
            self.scratch["chosen_list"].fill_(-1)
            _watchers[-1].append(self)
        return {
            **self.operands.arguments(self.module),
            **self.index.state._asdict(),
            **self.scratch,
            **self.written(),
            "slots": self.index.layout.slots,
            "tiles": tiles,
            "splits": self.splits,
            "capacity": capacity,
            "TILES": power_of_two(tiles),
            "EARLY": self.early,
        }

    def attend(self, arguments: Mapping[str, object], examined: int, paged: bool) -> Tensor:
        """Return attention [B, Hq, T, Dv] over the best tokens.

        `examined` are the slots whose bins each row has. They are those of a list of candidates if
        `paged`, else all slots in order.
        """
        tuning = self.tuning
        own = {
            **arguments,
            "KEYS": tuning.keys,
            "LANES": lanes(examined, self.splits, LISTED_LANES if self.lists else USUAL_LANES),
            "PAGED": paged,
            "LISTED": self.lists,
        }
        self._own = own
        options = {"num_warps": tuning.warps, "num_stages": tuning.stages, **self.waits}
        if self.lists:
            grid = self.rows, self.splits
            launch(self.module.choose, grid, own, num_warps=4, num_stages=1, **self.waits)
            options["maxnreg"] = LISTED_REGISTERS
        launch(self.module.attend, (self.rows, self.splits + 1), own, **options)
        if certifies(self.module):
            certify(self.module, self.operands, arguments, self.scratch, tuning)
        return combine(self.module, self.operands, self.scratch, self.splits, self.early)

    def log_read(self) -> Tensor:
        """Return log2 of the sum of the weights of the keys read, each once: [B, Hq, T].

        The step must have been watched. If it has drawn keys, each of which it added up as often as
        it counts, they are read once more.
        """
        if not draws(self.module):
            return log_weight(self.operands, self.scratch)
        items = self.scratch["chosen_list"]
        everything = (items < 0).all(-1) & (self.scratch["partial_sum"] > 0).any(-1)
        once = {name: torch.empty_like(each) for name, each in self.scratch.items()}
        once["chosen_list"] = torch.where(items < 0, items, items % MOST_DRAWN_FROM)
        once["list_count"] = torch.where(everything, -1, (items >= 0).sum(-1, dtype=torch.int32))
        again = {**self._own, **once, "LISTED": True, "EARLY": False}
        grid, tuning = (self.rows, self.splits), self.tuning  # without the one that indexes
        options = {"num_warps": tuning.warps, "num_stages": tuning.stages}
        launch(self.module.attend, grid, again, **options)
        return log_weight(self.operands, once)

    def written(self) -> dict[str, object]:
        """Return the slots just written, with strides and number; a stand-in if none were."""
        positions, names = self.index.positions, ("position_stride_b", "position_stride_t")
        if positions is None:
            unused = self.scratch["tile_first"]
            return {"positions": unused, **dict.fromkeys(names, 0), "written": 0}
        wide = positions.expand(self.operands.query.shape[0], -1)
        strides = dict(zip(names, wide.stride(), strict=True))
        return {"positions": wide, **strides, "written": wide.shape[1]}


def lanes(examined: int, splits: int, most: int) -> int:
    """Return how many slots a program examines at a time, at most `most`."""
    return max(256, min(power_of_two(-(-examined // splits)), most))


@contextmanager
def watch() -> Iterator[list[SparseStep]]:
    """Collect the steps that run within the context. Lists of what they read are filled with -1."""
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


_watchers: list[list[SparseStep]] = []
"""Steps that run within each context of `watch`."""


def has_chosen(step: SparseStep) -> bool:
    """Return True if some row of a watched step has chosen keys, be it that it then read all keys.

    This waits for the device.
    """
    if certifies(step.module):
        return bool((step.scratch["list_count"] >= 0).any())
    return bool((step.scratch["chosen_list"] >= 0).any())


def slots_read(step: SparseStep) -> Tensor:
    """Return the slots that a watched step has read, int64 [B, Hkv, T, S]; -1 pads rows.

    A row that reads all visible keys has the slots up to the end of its keys, hidden ones included;
    so have sinks and recent tokens of every row. This waits for the device.
    """
    operands, header = step.operands, step.index.state.header
    slots = of_rows(operands, step.scratch["chosen_list"].flatten(1).long())
    if draws(step.module):  # above SLOT_BITS, how many tokens one stands for
        slots = torch.where(slots < 0, slots, slots % MOST_DRAWN_FROM)
    weight = of_rows(operands, step.scratch["partial_sum"].flatten(1))
    all_keys = (slots < 0).all(-1) & (weight > 0).any(-1)
    count = int((slots >= 0).sum(-1).max())
    slots = _in_order(slots)[..., :count]
    if bool(all_keys.any()):
        held = row_ends(header, len(slots)).clamp(max=operands.kv_len)
        slot = torch.arange(max(int(held.max()), count), device=slots.device)
        everything = torch.where(slot < held[:, None], slot, -1)[:, None, None]
        padded = torch.nn.functional.pad(slots, (0, len(slot) - count), value=-1)
        slots = torch.where(all_keys[..., None], everything, padded)
    return _in_order(slots)


def _in_order(slots: Tensor) -> Tensor:
    """Return slots [..., S] in order, with -1 behind them."""
    last = torch.iinfo(slots.dtype).max
    ordered = torch.where(slots < 0, last, slots).sort(-1).values
    return torch.where(ordered == last, -1, ordered)


def covers_mass(module: ModuleType) -> bool:
    """Return True if a choice of the module ends at a share of the softmax."""
    return hasattr(module, "MAY_MISS")


def draws(module: ModuleType) -> bool:
    """Return True if the kernels of a module draw tokens by chance."""
    return hasattr(module, "SLOT_BITS")


def list_size(module: ModuleType) -> int:
    """Return how many slots the list of a program of `attend` has room for."""
    most = module.BUDGET.value + max(2 * module.PAGE.value, 64) if hasattr(module, "PAGE") else 0
    most = max(most, module.BUDGET.value + 64)
    most = max(most, module.ALWAYS.value if hasattr(module, "ALWAYS") else 0)
    return -(-most // 64) * 64
