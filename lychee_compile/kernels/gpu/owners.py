"""Owners of GPU indexes: what holds the index of one key cache, and what graphs take for it.

For a cache of fixed size a graph takes the memory of the index itself. That memory never moves, so
that CUDA graphs can keep its address. The index of a growing cache has to grow too: a graph takes a
handle, and finds the index by it at every call.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.layout import IndexLayout, roomy, row_ends
from lychee_compile.kernels.gpu.lifecycle import IndexLifecycle
from lychee_compile.kernels.gpu.methods import layout_for, new_index
from lychee_compile.kernels.handles import new_handle


class StaticCacheIndex(IndexLifecycle):
    """The index of a cache of fixed size. Graphs take its memory, uint8 [layout.size]."""

    def __init__(self, layout: IndexLayout, device: torch.device) -> None:
        super().__init__()
        self.index: DeviceIndex
        try:
            self.index = new_index(layout, device)
        except torch.OutOfMemoryError:
            self.index = _spare(layout, device)
            self.give_up()
        self.tensor = self.index.state

    def _index_for(self, key: Tensor, use: CacheUse) -> DeviceIndex:
        return self.index

    def _ends(self, key: Tensor) -> list[int]:
        written = row_ends(self.index.parts.header, key.shape[0]).tolist()
        return [min(end, key.shape[2]) for end in written]


class GrowingCacheIndex(IndexLifecycle):
    """The index of a cache that grows. Graphs take a handle, int64 [2]."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor = new_handle(self)
        self.index: DeviceIndex | None = None
        self._written: Tensor | None = None
        """Slots written by the last call, while the index is distrusted."""

    def index_for(self, key: Tensor, positions: Tensor | None) -> DeviceIndex | None:
        """Return the index of `key` [B, Hkv, L, D], with room for all its slots.

        `positions`, int [T] or [B, T], are the slots that were just written. None means that the
        call must read all keys.
        """
        if self.trusted and self.index is not None and not self._has_room(self.index, key):
            self._revoke()
        if not self.trusted:
            self._written = self._written if positions is None else positions
            return None
        return self.index

    def _has_room(self, index: DeviceIndex, key: Tensor) -> bool:
        """True if the index fits the keys. An index that is too small is moved to a larger one."""
        now, wanted = index.layout, roomy(index.layout.of(key))
        # The graph may use the first rows of the cache only.
        fitting = wanted.resized(now.slots, now.batch) == now
        if not fitting or key.shape[0] > now.batch:
            return False
        if key.shape[2] > now.slots:
            if not now.grows_to(wanted.slots):
                return False
            try:
                self.index = _moved(index, now.resized(wanted.slots))
            except torch.OutOfMemoryError:
                self.give_up()
                return False
        return True

    def _revoke(self) -> None:
        super()._revoke()
        self.index = None

    def _index_for(self, key: Tensor, use: CacheUse) -> DeviceIndex:
        return new_index(roomy(layout_for(use.kernel, key)), key.device)

    def _ends(self, key: Tensor) -> list[int]:
        written, self._written = self._written, None
        if written is None:
            return [key.shape[2]] * key.shape[0]
        last = (written % key.shape[2]).expand(key.shape[0], -1).amax(1)
        return (last + 1).tolist()


def _moved(index: DeviceIndex, layout: IndexLayout) -> DeviceIndex:
    """Return a copy of the index in a layout with more slots."""
    larger = new_index(layout, index.state.device)
    larger.take_over(index)
    return larger


def _spare(layout: IndexLayout, device: torch.device) -> DeviceIndex:
    """Return the index shared by all caches without memory for one: nobody trusts it."""
    spare = _spares.get((layout, device))
    if spare is None:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        spare = _spares[layout, device] = new_index(layout, device)
    return spare


_spares: weakref.WeakValueDictionary[tuple[IndexLayout, torch.device], DeviceIndex] = (
    weakref.WeakValueDictionary()
)
"""Indexes of caches without memory for one, while such caches live."""
