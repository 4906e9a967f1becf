"""The index of one key cache on a device for Quest (arXiv 2406.10774): a box around each page."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.launch_common import launch
from lychee_compile.kernels.gpu.common.operands import strides
from lychee_compile.kernels.gpu.quest.layout import QuestLayout, QuestState
from lychee_compile.kernels.sizes import PAGE

RECORDED = 64
"""Slots that one program of `record_fingerprints` hashes."""


class QuestIndex(DeviceIndex):
    """Least and greatest keys of the full pages of one cache."""

    layout: QuestLayout
    parts: QuestState

    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Put a box around each full page in the slots [0, ends[b]) of `key` [B, Hkv, L, D]."""
        full = max(ends) // PAGE  # a row that ends earlier gets its boxes as it fills its pages
        if full:
            pages = key[:, :, : full * PAGE].unflatten(2, (full, PAGE))
            self.parts.least[:, :, :full] = pages.amin(3)
            self.parts.greatest[:, :, :full] = pages.amax(3)
        self._record(module, key, max(ends))
        self.trust(ends)

    def _record(self, module: ModuleType, key: Tensor, end: int) -> None:
        """Hash the keys in the slots [0, end)."""
        arguments = {
            "key": key,
            **strides("", key, "bhld"),
            "fingerprints": self.parts.fingerprints,
            "end": end,
            "slots": self.layout.slots,
            "kv_heads": self.layout.kv_heads,
        }
        grid = -(-end // RECORDED), key.shape[0] * self.layout.kv_heads
        if end:
            launch(module.record_fingerprints, grid, arguments, num_warps=4)

    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Do nothing: the keys of a page alone decide its box."""
