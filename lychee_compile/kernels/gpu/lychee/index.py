"""The sketches of the keys of one cache on a device, and in long caches chunks; built in place."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import REFIT, DeviceIndex
from lychee_compile.kernels.gpu.common.layout import row_ends
from lychee_compile.kernels.gpu.levels.chunk_index import ChunkTables
from lychee_compile.kernels.gpu.lychee.launch import run_encode
from lychee_compile.kernels.gpu.lychee.layout import SketchLayout, SketchState
from lychee_compile.kernels.reference.clustered import refit_after
from lychee_compile.kernels.reference.sketch_axes import fit_axes
from lychee_compile.kernels.sizes import PAGE

WELL_FITTED = 512
"""Least number of keys that a block has axes of its own for; one with fewer takes those before."""
FITTED_AT_ONCE = 65536
"""Slots of the blocks that are fitted together, to bound the memory of their keys in float32."""
LEAST_REFIT = 32
"""Least number of keys that follow the first few before these are fitted anew."""


class SketchIndex(DeviceIndex):
    """Sketches of the keys of one cache, and its chunks if they narrow a choice."""

    layout: SketchLayout
    parts: SketchState

    def __init__(self, layout: SketchLayout, device: torch.device) -> None:
        super().__init__(layout, device)
        self.chunks: ChunkTables | None = None
        """Chunks and their clusters; None: they do not narrow a choice."""
        if layout.chunks is not None:
            self.chunks = ChunkTables(layout.chunks, self.parts.chunks)
        self._clustered = 0
        """Number of keys, in the longest row, when chunks were last put into clusters."""

    def _take_counts(self, other: DeviceIndex) -> None:
        if self.chunks is not None and isinstance(other, SketchIndex) and other.chunks is not None:
            self._clustered = max(self._clustered, other._clustered)
            self.chunks.clustered = max(self.chunks.clustered, other.chunks.clustered)

    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Sketch the keys in the slots [0, ends[b]) of each row of `key` [B, Hkv, L, D]."""
        size, end = self.layout.block, max(ends)
        whole, at_once = end // size, max(FITTED_AT_ONCE // size, 1)
        rows = range(len(ends))
        for block in range(0, whole, at_once):
            self._fit(key, ends, rows, block, min(at_once, whole - block), size)
        if end % size:
            self._fit(key, ends, rows, whole, 1, end % size)
        run_encode(module, key, self.layout, self.parts, 0, end)
        if self.chunks is not None:
            for part in self.parts.chunks.values():
                part.zero_()
            self.chunks.build(key, ends)
            self._clustered = end
        self.trust(ends)

    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Find the axes of each row's newest block anew, and sketch its keys again.

        Chunks that have come since are added to clusters if they are many.
        """
        size = self.layout.block
        newest = [(end - 1) // size for end in ends]
        for block in sorted(set(newest) - {-1}):
            rows = [row for row, mine in enumerate(newest) if mine == block]
            begin, last = block * size, max(ends[row] for row in rows)
            self._fit(key, ends, rows, block, 1, last - begin)
            # Up to the longest row: rows that are longer get the sketches that they have already.
            end = min(begin + size, max(ends))
            run_encode(module, key, self.layout, self.parts, begin, end)
        self._clustered = min(self._clustered, max(ends))  # fewer after a rewind
        if self.chunks is not None and max(ends) >= self._clustered + refit_after(self._clustered):
            self.chunks.refit(key, row_ends(self.parts.header, len(ends)))
            self._clustered = max(ends)

    def refit_after(self, end: int) -> int:
        """Return how many keys may follow those in the slots [0, end) before the next `refit`.

        They are as many as the newest block has, or those that fill it and some of the next block.
        A block is thus fitted each time its keys double. The first is fitted from few keys on, as
        later blocks begin with its axes. Chunks are put into clusters as often as
        `reference/clustered.py` says.
        """
        if end < REFIT:
            return max(end, LEAST_REFIT)
        size = self.layout.block
        count = (end - 1) % size + 1
        after = max(count if 2 * count <= size else size - count + REFIT, REFIT)
        return after if self.chunks is None else min(after, refit_after(end))

    def _fit(
        self,
        key: Tensor,
        ends: Sequence[int],
        rows: Sequence[int],
        first: int,
        blocks: int,
        count: int,
    ) -> None:
        """Find centre, axes, steps and spread of blocks of some rows.

        `blocks` follow each other from `first` on; at most `count` keys of each are looked at. A
        row with few keys in a block takes over what the block before has.
        """
        parts, size = self.parts, self.layout.block
        counts = [
            [min(max(ends[row] - block * size, 0), count) for block in range(first, first + blocks)]
            for row in rows
        ]
        if first == 0 or max(map(max, counts)) >= WELL_FITTED:
            keys = key[:, :, first * size : (first + blocks - 1) * size + count]
            if len(rows) < key.shape[0]:
                keys = torch.stack([keys[row] for row in rows])
            self._find_axes(keys.float().unflatten(2, (blocks, count)), rows, first, counts)
        for row, of_row in zip(rows, counts, strict=True):
            for block, number in enumerate(of_row, first):
                if block > 0 and 0 < number < WELL_FITTED:
                    for part in (parts.axes, parts.centre, parts.step, parts.spread):
                        part[row, :, block] = part[row, :, block - 1]

    def _find_axes(
        self, keys: Tensor, rows: Sequence[int], first: int, counts: Sequence[Sequence[int]]
    ) -> None:
        """Fit the S blocks `keys` [R, Hkv, S, T, D]; the first `counts` [R][S] of each are keys."""
        blocks, count = keys.shape[2], keys.shape[3]
        numbers = mask = None
        if min(map(min, counts)) < count:
            numbers = torch.tensor(counts, device="cpu").to(keys.device, non_blocking=True)[
                :, None, :, None
            ]
            mask = (torch.arange(count, device=keys.device) < numbers)[..., None]
        centre, axes, step = fit_axes(keys, mask)
        parts, fine, pages = self.parts, self.parts.spread.shape[-1], count // PAGE
        fitted = [(parts.centre, centre), (parts.axes, axes.mT), (parts.step, step)]
        if pages:
            centred = keys[..., : pages * PAGE, :] - centre[..., None, :]
            level = centred.nan_to_num(0.0, 0.0, 0.0) @ axes[..., :fine]
            level = level / step[..., None, :fine].clamp(1e-30)
            spread = level.clamp(-8, 8).unflatten(-2, (-1, PAGE)).var(-2, correction=0)
            if numbers is None:
                mean = spread.mean(-2)
            else:
                full = (torch.arange(pages, device=keys.device) < numbers // PAGE)[..., None]
                mean = torch.where(full, spread, 0).sum(-2) / full.sum(-2).clamp(min=1)
            fitted.append((parts.spread, mean))
        for part, values in fitted:
            for row, value in zip(rows, values, strict=True):
                part[row, :, first : first + blocks] = value
