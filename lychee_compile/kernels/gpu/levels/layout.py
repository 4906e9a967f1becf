"""The memory layout of an index of levels: the fields of all groups of each level."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import (
    IndexState,
    Part,
    bytes_of,
    fingerprints_part,
    header_part,
    views_of,
)
from lychee_compile.kernels.levels.declaration import LevelStack
from lychee_compile.kernels.policies.registry import levels_of
from lychee_compile.kernels.sizes import whole_scans


@dataclass(frozen=True)
class LevelLayout:
    """Sizes of the parts of an index over `slots` slots, and where they lie.

    The parts are the header, the fingerprints, int32 [B, Hkv, slots], and each field under the name
    `summary_<name>`: in the keys' dtype [B, Hkv, groups, D], or float32 [B, Hkv, groups]. If
    estimates read some channels of keys alone, `channels`, int32 [B, Hkv, C], tells which.
    """

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype
    policy: str

    @classmethod
    def over(cls, key: Tensor, policy: str) -> LevelLayout:
        """Return the layout of a policy's index for a cache `key` [B, Hkv, L, D]."""
        batch, heads, length, head_dim = key.shape
        return cls(batch, heads, head_dim, whole_scans(length), key.dtype, policy)

    def of(self, key: Tensor) -> LevelLayout:
        """Return the layout of the same policy for a cache `key` [B, Hkv, L, D]."""
        return self.over(key, self.policy)

    @property
    def stack(self) -> LevelStack:
        """The levels of the policy."""
        return levels_of(self.policy)

    def resized(self, slots: int, batch: int | None = None) -> LevelLayout:
        """Return the layout with other `slots`, and another `batch` if one is given."""
        return replace(self, slots=slots, batch=self.batch if batch is None else batch)

    def grows_to(self, slots: int) -> bool:
        """Return True: the groups stay as they are in an index of any size."""
        return True

    @property
    def size(self) -> int:
        """Number of bytes in all."""
        return bytes_of(self._parts())

    def views(self, memory: Tensor) -> IndexState:
        """Return the parts of `memory`, uint8 [size]."""
        views = views_of(memory, self._parts())
        return _state(tuple(views))(**views)

    def _parts(self) -> Iterator[Part]:
        """Yield name, shape and dtype of each part, in order."""
        yield header_part(self.batch)
        yield fingerprints_part(self.batch, self.kv_heads, self.slots)
        for level in self.stack.levels:
            shape = (self.batch, self.kv_heads, self.slots // level.groups.size)
            for name, has_channels in level.channels.items():
                part = f"summary_{name}"
                if has_channels:
                    yield part, (*shape, self.head_dim), self.dtype
                else:
                    yield part, shape, torch.float32
        if self.stack.pairs is not None:
            channels = self.stack.pairs.channels(self.head_dim)
            yield "channels", (self.batch, self.kv_heads, channels), torch.int32


@lru_cache(maxsize=64)
def _state(names: tuple[str, ...]) -> type:
    return namedtuple("LevelState", names)  # noqa: PYI024  the fields depend on the policy
