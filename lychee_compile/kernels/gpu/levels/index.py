"""Base of the indexes of levels on a device: fingerprints, and views by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.layout import row_ends
from lychee_compile.kernels.gpu.common.record import record_fingerprints
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.levels.declaration import LevelStack
from lychee_compile.kernels.reference.clustered import Columns


class LevelDeviceIndex(DeviceIndex):
    """An index of levels, whose memory is built by the functions of the plain form."""

    layout: LevelLayout

    def __init__(self, layout: LevelLayout, device: torch.device) -> None:
        super().__init__(layout, device)
        self.named = self.parts._asdict()
        """Views of the memory, by name."""

    def clear(self) -> None:
        """Forget all that the index holds, but for who may trust it."""
        for part in self.parts[1:]:
            part.zero_()

    def columns(self, number: int, rows: int) -> Columns:
        """Return the numbers of the groups of a level, as `reference/clustered.py` has them."""
        return columns_of(self.layout.stack, self.named, number, rows)

    def record(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Hash the keys in the slots [0, ends[b]), and trust the index."""
        record_fingerprints(module, key, self.named["fingerprints"], max(ends))
        self.trust(ends)

    def written(self, rows: int) -> Tensor:
        """Return the slot after the last one written in each row, int64 [rows]."""
        return row_ends(self.parts.header, rows)


def columns_of(stack: LevelStack, named: Mapping[str, Tensor], number: int, rows: int) -> Columns:
    """Return the numbers of the groups of level `number`, of the first `rows` rows.

    They are views of parts of an index, `named` as `LevelLayout` says.
    """
    found = {name: named[f"summary_{name}"][:rows] for name in stack.levels[number].fields}
    if f"tokens_{number}" in named:
        found |= {name: named[f"{name}_{number}"][:rows] for name in ("tokens", "first", "end")}
    return found
