"""A policy of levels on a GPU, as `gpu/methods.py` knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import IndexLayout
from lychee_compile.kernels.gpu.levels.chunk_index import ChunkDeviceIndex
from lychee_compile.kernels.gpu.levels.index import LevelDeviceIndex
from lychee_compile.kernels.gpu.levels.launch import run_levels
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.gpu.levels.page_index import PageDeviceIndex
from lychee_compile.kernels.gpu.levels.token_cluster_index import TokenClusterDeviceIndex
from lychee_compile.kernels.levels.groups import Chunks, TokenClusters
from lychee_compile.kernels.policies.registry import levels_of

_INDEXES: dict[type, type[LevelDeviceIndex]] = {
    Chunks: ChunkDeviceIndex,
    TokenClusters: TokenClusterDeviceIndex,
}
"""Indexes by the groups of the last level; pages have another."""


@dataclass(frozen=True)
class LevelMethod:
    """Groups of keys ranked by the estimates that a policy declares, level by level."""

    policy: str
    multiple: ClassVar[int] = 1
    notices_writes: ClassVar[bool] = True
    covers_mass: ClassVar[bool] = True
    computes_keys: ClassVar[bool] = True
    run = staticmethod(run_levels)

    @property
    def certifies(self) -> bool:
        """True if the groups that are read whole have a bound."""
        return levels_of(self.policy).has_bound

    def layout_of(self, key: Tensor) -> LevelLayout:
        """Return the layout of an index for a cache `key` [B, Hkv, L, D], by default settings."""
        return LevelLayout.over(key, self.policy)

    def new_index(self, layout: IndexLayout, device: torch.device) -> LevelDeviceIndex:
        """Return an empty index, which is not trusted. Raises TypeError for another's layout."""
        if not isinstance(layout, LevelLayout):
            raise TypeError(f"an index of levels has a LevelLayout, got {layout!r}")
        levels = layout.stack.levels
        kind = _INDEXES.get(type(levels[-1].groups) if levels else object, PageDeviceIndex)
        return kind(layout, device)
