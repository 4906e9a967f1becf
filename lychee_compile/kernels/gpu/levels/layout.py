"""The memory layout of an index of levels: tables of groups, and the fields of all of them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
from lychee_compile.kernels.levels.declaration import Level, LevelStack
from lychee_compile.kernels.levels.groups import Chunks, Clusters, GroupSettings, TokenClusters
from lychee_compile.kernels.policies.registry import levels_of
from lychee_compile.kernels.sizes import whole_scans


@dataclass(frozen=True)
class LevelLayout:
    """Sizes of the parts of an index over `slots` slots, and where they lie.

    All but the header are [B, Hkv, ...]. First come those that say which keys a group of the last
    level has: none for pages, `strength`, uint8 [slots], and `span`, int32 [N], for chunks (see
    `reference/chunk_table.py`), `label`, int32 [slots], and `waiting`, int32 [1], the first token
    that waits, for clusters of tokens. Then, for each level n of N groups:

    - `tokens_<n>`, `first_<n>` and `end_<n>`, int32 [N], if it has clusters of any kind: see
      `reference/clustered.py`;
    - `begin_<n>` and `children_<n>`, int32 [N], if it has clusters of groups: place and number of
      those of a cluster in the `order_<n + 1>`, int32, of all below: see `ChildLists`;
    - `label_<n>` and `order_<n>`, int32 [N], if it lies below clusters: 1 + the cluster of each
      group, 0 for none; and `open_<n>`, int32 [1], the first group that may be in none;
    - each field as `summary_<name>`: in the keys' dtype [N, D], or float32 [N].

    If estimates read some channels of keys alone, `channels`, int32 [C], tells which.
    """

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype
    policy: str
    settings: GroupSettings = field(default_factory=GroupSettings)

    @classmethod
    def over(cls, key: Tensor, policy: str, settings: GroupSettings | None = None) -> LevelLayout:
        """Return the layout of a policy's index for a cache `key` [B, Hkv, L, D]."""
        batch, heads, length, head_dim = key.shape
        sizes = batch, heads, head_dim, whole_scans(length)
        return cls(*sizes, key.dtype, policy, settings or GroupSettings())

    def of(self, key: Tensor) -> LevelLayout:
        """Return the layout of the same policy for a cache `key` [B, Hkv, L, D]."""
        return self.over(key, self.policy, self.settings)

    @property
    def stack(self) -> LevelStack:
        """The levels of the policy."""
        return levels_of(self.policy)

    def resized(self, slots: int, batch: int | None = None) -> LevelLayout:
        """Return the layout with other `slots`, and another `batch` if one is given."""
        return replace(self, slots=slots, batch=self.batch if batch is None else batch)

    def grows_to(self, slots: int) -> bool:
        """Return True: groups keep their numbers in an index of any size."""
        return True

    def in_clusters(self, number: int) -> bool:
        """Return True if the groups of a level are those of the clusters above it."""
        return number > 0 and isinstance(self.stack.levels[number - 1].groups, Clusters)

    @property
    def groups(self) -> list[int]:
        """Number of groups that there is room for at each level, in a row of a KV head."""
        found: list[int] = []
        for level in reversed(self.stack.levels):
            groups = level.groups
            if isinstance(groups, Chunks):
                count = self.settings.chunks_in(self.slots)
            elif isinstance(groups, Clusters):
                count = self.settings.most_clusters(groups.limited, found[0])
            else:
                count = self.slots // groups.size
                count = 2 * count + 8 if isinstance(groups, TokenClusters) else count
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
        yield header_part(self.batch)
        yield fingerprints_part(self.batch, self.kv_heads, self.slots)
        yield from self.tables()

    def tables(self) -> Iterator[Part]:
        """Yield the parts that describe groups: all but the header and the fingerprints."""
        groups, levels = self.groups, self.stack.levels
        last = levels[-1].groups if levels else None
        if isinstance(last, Chunks):
            yield self._part("strength", self.slots, dtype=torch.uint8)
            yield self._part("span", groups[-1])
        elif isinstance(last, TokenClusters):
            yield self._part("label", self.slots)
            yield self._part("waiting", 1)
        for number, (level, count) in enumerate(zip(levels, groups, strict=True)):
            yield from self._of_level(number, level, count)
        if self.stack.pairs is not None:
            yield self._part("channels", self.stack.pairs.channels(self.head_dim))

    def _of_level(self, number: int, level: Level, count: int) -> Iterator[Part]:
        """Yield the parts of a level of `count` groups."""
        if self.in_clusters(number):
            yield self._part(f"label_{number}", count)
            yield self._part(f"order_{number}", count)
            yield self._part(f"open_{number}", 1)
        if isinstance(level.groups, Clusters | TokenClusters):
            for name in ("tokens", "first", "end"):
                yield self._part(f"{name}_{number}", count)
        if isinstance(level.groups, Clusters):
            yield self._part(f"begin_{number}", count)
            yield self._part(f"children_{number}", count)
        for name, has_channels in level.channels.items():
            if has_channels:
                yield self._part(f"summary_{name}", count, self.head_dim, dtype=self.dtype)
            else:
                yield self._part(f"summary_{name}", count, dtype=torch.float32)

    def _part(self, name: str, *sizes: int, dtype: torch.dtype = torch.int32) -> Part:
        """Return a part that each KV head of each row has."""
        return name, (self.batch, self.kv_heads, *sizes), dtype


@lru_cache(maxsize=64)
def _state(names: tuple[str, ...]) -> type:
    return namedtuple("LevelState", names)  # noqa: PYI024  the fields depend on the policy
