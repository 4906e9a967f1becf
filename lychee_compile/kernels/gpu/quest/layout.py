"""The memory layout of an index for Quest: boxes around the keys of pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import (
    Part,
    bytes_of,
    fingerprints_part,
    header_part,
    views_of,
)
from lychee_compile.kernels.sizes import PAGE, whole_scans


class QuestState(NamedTuple):
    """The parts of an index, views of its memory. Kernels take them by these names."""

    header: Tensor
    """int32 [1 + B]: 1 if the index may be trusted, 2 if the next step must not trust it, 0 if it
    is not trusted; then the last written slot + 1 of each row."""
    fingerprints: Tensor
    """Hashes of the indexed keys, int32 [B, Hkv, slots]."""
    least: Tensor
    """Least key of each page, channel by channel, in the keys' dtype [B, Hkv, pages, D]."""
    greatest: Tensor
    """Greatest key of each page, channel by channel, in the keys' dtype [B, Hkv, pages, D]."""


@dataclass(frozen=True)
class QuestLayout:
    """Sizes of the parts of an index over `slots` slots, and where they lie."""

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype
    policy: str = "quest"

    @classmethod
    def of(cls, key: Tensor) -> QuestLayout:
        """Return the layout for a cache `key` [B, Hkv, L, D]."""
        batch, heads, length, head_dim = key.shape
        return cls(batch, heads, head_dim, whole_scans(length), key.dtype)

    @property
    def pages(self) -> int:
        """Number of pages of every KV head, full or not."""
        return self.slots // PAGE

    def resized(self, slots: int, batch: int | None = None) -> QuestLayout:
        """Return the layout with other `slots`, and another `batch` if one is given."""
        return replace(self, slots=slots, batch=self.batch if batch is None else batch)

    def grows_to(self, slots: int) -> bool:
        """Return True: the boxes stay as they are in an index of any size."""
        return True

    @property
    def size(self) -> int:
        """Number of bytes in all."""
        return bytes_of(self._parts())

    def views(self, memory: Tensor) -> QuestState:
        """Return the parts of `memory`, uint8 [size]."""
        return QuestState(**views_of(memory, self._parts()))

    def _parts(self) -> tuple[Part, ...]:
        shape = (self.batch, self.kv_heads, self.pages, self.head_dim)
        corners = (("least", shape, self.dtype), ("greatest", shape, self.dtype))
        marks = fingerprints_part(self.batch, self.kv_heads, self.slots)
        return header_part(self.batch), marks, *corners
