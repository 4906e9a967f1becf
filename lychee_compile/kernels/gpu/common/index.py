"""What the indexes that kernels read have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.lychee.layout import SketchLayout, SketchState
from lychee_compile.kernels.gpu.quest.layout import QuestLayout, QuestState

REFIT = 256
"""Keys after which the newest part of an index is fitted anew to those it holds, at least."""


class DeviceIndex(ABC):
    """The index of the keys of one cache [B, Hkv, L, D], in one flat tensor that kernels read.

    Steps keep it up to date; it is built here, from the keys that a prefill left. While the first
    number of its header is 0 it may not be trusted, and attention reads every key.
    """

    parts: SketchState | QuestState

    def __init__(self, layout: SketchLayout | QuestLayout, device: torch.device) -> None:
        self.layout = layout
        self.state = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        self.parts = layout.views(self.state)

    def distrust(self) -> None:
        """The keys may have changed: read all of them until the index is built anew."""
        self.parts.header[0].zero_()

    def _trust(self, ends: Sequence[int]) -> None:
        """The keys in the slots [0, ends[b]) of each row are indexed."""
        told = torch.tensor([1, *ends], dtype=torch.int32)
        self.parts.header[: len(told)] = told.to(self.state.device, non_blocking=True)

    @abstractmethod
    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Index the keys in the slots [0, ends[b]) of each row of `key` [B, Hkv, L, D].

        From then on the index is trusted.
        """

    def refit_after(self, end: int) -> int:
        """How many keys may follow those in the slots [0, end) before the next `refit`."""
        return REFIT

    @abstractmethod
    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Bring the newest part up to what the keys in the slots [0, ends[b]) have become."""
