"""The index of one key cache on a device: sketches by slot, built and refitted in place."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.device_index import REFIT, DeviceIndex
from lychee_compile.kernels.launch import run_encode
from lychee_compile.kernels.reference.sketch import fit_axes
from lychee_compile.kernels.slot_layout import PAGE, SlotLayout, SlotState

WELL_FITTED = 512
"""A block of fewer keys takes over the axes of the one before."""
FITTED_AT_ONCE = 65536
"""Slots of blocks fitted together: in float32 their keys take four times what a cache's do."""
LEAST_REFIT = 32
"""Keys that follow the first few, before they are fitted anew."""


class SlotIndex(DeviceIndex):
    """Sketches of the keys of one cache, by slot."""

    layout: SlotLayout
    parts: SlotState

    def build(self, module: ModuleType, key: Tensor, end: int) -> None:
        """Sketch the keys in the slots [0, end) of `key` [B, Hkv, L, D]."""
        size = self.layout.block
        whole, at_once = end // size, max(FITTED_AT_ONCE // size, 1)
        for block in range(0, whole, at_once):
            self._fit(key, block, min(at_once, whole - block), size)
        if end % size:
            self._fit_last(key, whole, end % size)
        run_encode(module, key, self.layout, self.parts, 0, end)
        self._trust(end)

    def refit(self, module: ModuleType, key: Tensor, end: int) -> None:
        """Find the axes of the block that holds slot `end` - 1 anew, and sketch its keys again."""
        size = self.layout.block
        block = (end - 1) // size
        self._fit_last(key, block, end - block * size)
        run_encode(module, key, self.layout, self.parts, block * size, end)

    def refit_after(self, end: int) -> int:
        """As many keys as the newest block has, or all that fill it and some of the next.

        So a block is fitted each time its keys double: from few on where it is the first, for the
        next take over what its axes are.
        """
        if end < REFIT:
            return max(end, LEAST_REFIT)
        size = self.layout.block
        count = (end - 1) % size + 1
        return max(count if 2 * count <= size else size - count + REFIT, REFIT)

    def _fit_last(self, key: Tensor, block: int, count: int) -> None:
        """Fit a block that is not full, or let it take over the axes of the one before."""
        if block == 0 or count >= WELL_FITTED:
            self._fit(key, block, 1, count)
            return
        parts = self.parts
        for part in (parts.axes, parts.centre, parts.step, parts.spread):
            part[:, :, block] = part[:, :, block - 1]

    def _fit(self, key: Tensor, first: int, blocks: int, count: int) -> None:
        """Centre, axes, steps and spread of some blocks, from `count` keys of each."""
        parts, which, size = self.parts, slice(first, first + blocks), self.layout.block
        keys = key[:, :, first * size : (first + blocks - 1) * size + count].float()
        centre, axes, step, coordinates = fit_axes(keys.unflatten(2, (blocks, count)))
        parts.centre[:, :, which] = centre
        parts.axes[:, :, which] = axes.mT
        parts.step[:, :, which] = step
        fine, whole = parts.spread.shape[-1], count // PAGE * PAGE
        if whole:
            level = coordinates[..., :whole, :fine] / step[..., None, :fine].clamp(min=1e-30)
            pages = level.clamp(-8, 8).unflatten(-2, (-1, PAGE))
            parts.spread[:, :, which] = pages.var(-2, correction=0).mean(-2)
