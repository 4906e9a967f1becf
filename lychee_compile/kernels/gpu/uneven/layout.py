"""The memory layout of an index of uneven groups: tables of chunks, labels and clusters."""

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
from lychee_compile.kernels.levels.groups import Chunks, Clusters, GroupSettings, TokenClusters
from lychee_compile.kernels.policies.registry import levels_of
from lychee_compile.kernels.sizes import whole_scans


@dataclass(frozen=True)
class UnevenLayout:
    """Sizes of the parts of an index over `slots` slots, and where they lie.

    After header and fingerprints there are, for chunks, `strength`, uint8 [B, Hkv, slots], and
    `span`, int32 [B, Hkv, N], see `reference/chunk_table.py`; for clusters of tokens `label`, int32
    [B, Hkv, slots], and `waiting`, int32 [B, Hkv, 1], the first token that waits. Then come, for
    each level n, `label_<n>`, int32 [B, Hkv, N], if clusters are above it: 1 + the cluster of each
    of its groups, 0 for none; `tokens_<n>`, `first_<n>` and `end_<n>`, int32 [B, Hkv, C], if it has
    clusters, see `reference/clustered.py`; and each field as `summary_<name>`: in the keys' dtype
    [B, Hkv, N, D], or float32 [B, Hkv, N].
    """

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype
    policy: str
    settings: GroupSettings

    @classmethod
    def over(cls, key: Tensor, policy: str, settings: GroupSettings) -> UnevenLayout:
        """Return the layout of a policy's index for a cache `key` [B, Hkv, L, D]."""
        batch, heads, length, head_dim = key.shape
        return cls(batch, heads, head_dim, whole_scans(length), key.dtype, policy, settings)

    def of(self, key: Tensor) -> UnevenLayout:
        """Return the layout of the same policy for a cache `key` [B, Hkv, L, D]."""
        return self.over(key, self.policy, self.settings)

    @property
    def stack(self) -> LevelStack:
        """The levels of the policy."""
        return levels_of(self.policy)

    @property
    def of_chunks(self) -> bool:
        """True if the last level is one of chunks, False for clusters of tokens."""
        return isinstance(self.stack.levels[-1].groups, Chunks)

    def resized(self, slots: int, batch: int | None = None) -> UnevenLayout:
        """Return the layout with other `slots`, and another `batch` if one is given."""
        return replace(self, slots=slots, batch=self.batch if batch is None else batch)

    def grows_to(self, slots: int) -> bool:
        """Return True: groups keep their numbers in an index of any size."""
        return True

    @property
    def groups(self) -> list[int]:
        """Number of groups that there is room for at each level, in a row of a KV head."""
        found: list[int] = []
        for level in reversed(self.stack.levels):
            if isinstance(level.groups, Chunks):
                count = self.settings.chunks_in(self.slots)
            elif isinstance(level.groups, Clusters):
                count = self.settings.most_clusters(level.groups.limited, found[0])
            else:
                assert isinstance(level.groups, TokenClusters)
                count = 2 * (self.slots // level.groups.size) + 8
            found.insert(0, count)
        return found

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
        rows = (self.batch, self.kv_heads)
        groups = self.groups
        yield header_part(self.batch)
        yield fingerprints_part(*rows, self.slots)
        if self.of_chunks:
            yield "strength", (*rows, self.slots), torch.uint8
            yield "span", (*rows, groups[-1]), torch.int32
        else:
            yield "label", (*rows, self.slots), torch.int32
            yield "waiting", (*rows, 1), torch.int32
        for number, (level, count) in enumerate(zip(self.stack.levels, groups, strict=True)):
            shape = (*rows, count)
            if number > 0:
                yield f"label_{number}", shape, torch.int32
            if not isinstance(level.groups, Chunks):
                for name in ("tokens", "first", "end"):
                    yield f"{name}_{number}", shape, torch.int32
            for name, has_channels in level.channels.items():
                part = f"summary_{name}"
                if has_channels:
                    yield part, (*shape, self.head_dim), self.dtype
                else:
                    yield part, shape, torch.float32


@lru_cache(maxsize=64)
def _state(names: tuple[str, ...]) -> type:
    return namedtuple("UnevenState", names)  # noqa: PYI024  the fields depend on the policy
