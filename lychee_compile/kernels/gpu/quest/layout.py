"""Where the boxes around the keys of pages lie in a flat device tensor, addressed by slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.lychee.layout import PAGE, TILE, aligned


class QuestState(NamedTuple):
    """The parts of an index, views of its tensor."""

    header: Tensor
    """int32 [1 + B]: 1 where the index may be trusted, then each row's last written slot plus 1."""
    least: Tensor
    """Least key of each page, channel by channel, in the keys' dtype [B, Hkv, pages, D]."""
    greatest: Tensor
    """Greatest key of each page, likewise."""


@dataclass(frozen=True)
class QuestLayout:
    """Sizes and places of the parts of an index over `slots` slots."""

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype

    @classmethod
    def of(cls, key: Tensor) -> QuestLayout:
        """The layout for a cache `key` [B, Hkv, L, D]."""
        batch, heads, length, head_dim = key.shape
        return cls(batch, heads, head_dim, -(-length // TILE) * TILE, key.dtype)

    @property
    def pages(self) -> int:
        """Pages of every KV head, full or not."""
        return self.slots // PAGE

    def grows_to(self, slots: int) -> bool:
        """Whether what lies in it may be copied into an index of so many slots."""
        return True

    @property
    def size(self) -> int:
        """Bytes in all."""
        numbers = 2 * self.batch * self.kv_heads * self.pages * self.head_dim
        return self._header_size + numbers * self.dtype.itemsize

    @property
    def _header_size(self) -> int:
        return aligned(1 + self.batch, torch.int32)

    def views(self, state: Tensor) -> QuestState:
        """The parts of `state`, uint8 [size]."""
        header = state[: (1 + self.batch) * torch.int32.itemsize]
        boxes = state[self._header_size :].view(self.dtype)
        shape = (2, self.batch, self.kv_heads, self.pages, self.head_dim)
        least, greatest = boxes.view(shape).unbind()
        return QuestState(header.view(torch.int32), least, greatest)
