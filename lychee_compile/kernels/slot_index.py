"""The index of one key cache on a device: sketches by slot, built and refitted in place."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.device_index import REFIT, DeviceIndex
from lychee_compile.kernels.launch import run_encode
from lychee_compile.kernels.reference.sketch import fit_axes
from lychee_compile.kernels.slot_layout import BLOCK, PAGE, SlotLayout, SlotState

WELL_FITTED = 512
"""A block of fewer keys takes over the axes of the one before."""
BLOCKS_AT_ONCE = 4
"""Blocks fitted together: in float32 their keys take four times what a cache's do."""


class SlotIndex(DeviceIndex):
    """Sketches of the keys of one cache, by slot."""

    layout: SlotLayout
    parts: SlotState

    def build(self, module: ModuleType, key: Tensor, end: int) -> None:
        """Sketch the keys in the slots [0, end) of `key` [B, Hkv, L, D]."""
        whole = end // BLOCK
        for block in range(0, whole, BLOCKS_AT_ONCE):
            self._fit(key, block, min(BLOCKS_AT_ONCE, whole - block), BLOCK)
        if end % BLOCK:
            self._fit_last(key, whole, end % BLOCK)
        run_encode(module, key, self.layout, self.parts, 0, end)
        self._trust(end)

    def refit(self, module: ModuleType, key: Tensor, end: int) -> None:
        """Find the axes of the block that holds slot `end` - 1 anew, and sketch its keys again."""
        block = (end - 1) // BLOCK
        self._fit_last(key, block, end - block * BLOCK)
        run_encode(module, key, self.layout, self.parts, block * BLOCK, end)

    def refit_after(self, end: int) -> int:
        """As many keys as the newest block has, or all that fill it and some of the next.

        So a block is fitted each time its keys double.
        """
        count = (end - 1) % BLOCK + 1
        return max(count if 2 * count <= BLOCK else BLOCK - count + REFIT, REFIT)

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
        parts, which = self.parts, slice(first, first + blocks)
        keys = key[:, :, first * BLOCK : (first + blocks - 1) * BLOCK + count].float()
        centre, axes, step, coordinates = fit_axes(keys.unflatten(2, (blocks, count)))
        parts.centre[:, :, which] = centre
        parts.axes[:, :, which] = axes.mT
        parts.step[:, :, which] = step
        fine, whole = parts.spread.shape[-1], count // PAGE * PAGE
        if whole:
            level = coordinates[..., :whole, :fine] / step[..., None, :fine].clamp(min=1e-30)
            pages = level.clamp(-8, 8).unflatten(-2, (-1, PAGE))
            parts.spread[:, :, which] = pages.var(-2, correction=0).mean(-2)
