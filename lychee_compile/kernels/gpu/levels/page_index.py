"""The index of one key cache on a device for policies of pages: summaries of the full ones."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import REFIT
from lychee_compile.kernels.gpu.levels.index import LevelDeviceIndex
from lychee_compile.kernels.reference.dominant_pairs import (
    REFIT_GROWTH,
    channels_of,
    fitted_tokens,
)
from lychee_compile.kernels.reference.level_values import summaries

SUMMARISED_AT_ONCE = 8192
"""Number of keys of a row that are summarised at a time, to bound the memory of building."""


class PageDeviceIndex(LevelDeviceIndex):
    """Summaries of the full groups of one cache, at each level."""

    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Summarise each full group in the slots [0, ends[b]) of `key` [B, Hkv, L, D].

        A row that ends earlier than others gets its summaries as it fills its groups.
        """
        for level in self.layout.stack.levels:
            size = level.groups.size
            full, at_once = max(ends) // size, max(SUMMARISED_AT_ONCE // size, 1)
            stored = key.dtype if level.rounds_fields else torch.float32
            for begin in range(0, full if level.fields else 0, at_once):
                end = min(begin + at_once, full)
                keys = key[:, :, begin * size : end * size].unflatten(2, (end - begin, size))
                every = keys.new_ones(size, dtype=bool)
                for name, value in summaries(level, keys, every, stored).items():
                    part = self.named[f"summary_{name}"][: len(ends), :, begin:end]
                    part.copy_(value if level.channels[name] else value[..., 0])
        self._fit(key, ends)
        self.record(module, key, ends)

    def refit_after(self, end: int) -> int:
        """Return how many keys may follow until channels are chosen anew."""
        if self.layout.stack.pairs is None:
            return super().refit_after(end)
        return max(REFIT_GROWTH * int(fitted_tokens(torch.tensor(end, device="cpu"))) - end, REFIT)

    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Choose the channels anew. Summaries stay: the keys of a group alone decide them."""
        self._fit(key, ends)

    def _fit(self, key: Tensor, ends: Sequence[int]) -> None:
        """Choose the channels that estimates read, from the keys in the slots [0, ends[b])."""
        pairs = self.layout.stack.pairs
        if pairs is not None:
            tokens = fitted_tokens(torch.tensor(ends, device="cpu"))
            found = channels_of(key[: len(ends)], tokens, pairs)
            self.named["channels"][: len(ends)] = found
