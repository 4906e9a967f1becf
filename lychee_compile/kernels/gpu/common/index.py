"""The base of all indexes that kernels read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import IndexLayout

REFIT = 256
"""Least number of keys after which the newest part of an index is fitted anew."""


class DeviceIndex(ABC):
    """The index of the keys of one cache [B, Hkv, L, D], in one flat tensor that kernels read.

    It is built here from the keys that a prefill left; the kernels of each step keep it up to date.
    While the first number of its header is 0 the index is not trusted: attention reads every key.
    A row may be distrusted alone (`lose_rows`), as when it was given to another request; kernels do
    so themselves if they notice that a key is not the one that was indexed.
    """

    def __init__(self, layout: IndexLayout, device: torch.device) -> None:
        self.layout = layout
        self.state = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        """The memory of the index, uint8 [layout.size]; it never moves."""
        self.parts = layout.views(self.state)
        """Views of the memory."""

    def distrust(self) -> None:
        """Let attention read every key until the index is built anew: the keys may have changed."""
        self.parts.header[0].zero_()

    def trust(self, ends: Sequence[int]) -> None:
        """Note that the keys in the slots [0, ends[b]) of each row are indexed: `build` ends so."""
        header = torch.tensor([1, *ends], dtype=torch.int32, device="cpu")
        self.parts.header[: len(header)] = header.to(self.state.device, non_blocking=True)

    def lose_rows(self, first: Tensor) -> None:
        """Distrust each row that has indexed a key in the slot `first` [b], int64 [B], or later.

        Attention reads all keys of the row until `take_row`.
        """
        ends = self.parts.header[1 : 1 + len(first)]
        ends.copy_(torch.where(first[: len(ends)] < ends, ~ends, ends))

    def take_row(self, row: int, other: DeviceIndex) -> None:
        """Copy all that an index of one row holds, of a layout that differs in batch alone.

        The row is trusted from then on.
        """
        for mine, its in zip(self.parts[1:], other.parts[1:], strict=True):
            mine[row].copy_(its[0])
        self.parts.header[1 + row].copy_(other.parts.header[1])
        self._take_counts(other)

    def take_over(self, smaller: DeviceIndex) -> None:
        """Copy all that an index of the same cache holds, which has fewer slots."""
        self.parts.header.copy_(smaller.parts.header)
        for old, new in zip(smaller.parts[1:], self.parts[1:], strict=True):
            new[:, :, : old.shape[2]] = old
        self._take_counts(smaller)

    def _take_counts(self, other: DeviceIndex) -> None:  # noqa: B027  most count nothing
        """Take over what the host counts, from an index whose memory was just copied."""

    @abstractmethod
    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Index the keys in the slots [0, ends[b]) of each row of `key` [B, Hkv, L, D].

        It ends with `self.trust(ends)`: from then on the index is trusted.
        """

    def refit_after(self, end: int) -> int:
        """Return how many keys may follow those in the slots [0, end) before the next `refit`."""
        return REFIT

    @abstractmethod
    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Fit the newest part anew to the keys in the slots [0, ends[b]) of each row."""
