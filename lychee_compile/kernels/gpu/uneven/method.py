"""A policy of uneven groups on a GPU, as `gpu/methods.py` knows it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import IndexLayout, IndexOperands
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import Tuning
from lychee_compile.kernels.gpu.uneven.chunk_index import ChunkDeviceIndex
from lychee_compile.kernels.gpu.uneven.launch import run_uneven
from lychee_compile.kernels.gpu.uneven.layout import UnevenLayout
from lychee_compile.kernels.gpu.uneven.token_cluster_index import TokenClusterDeviceIndex
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.policies.registry import levels_of


@dataclass(frozen=True)
class UnevenMethod:
    """Chunks or clusters ranked by the estimates that a policy declares, level by level."""

    policy: str
    multiple: int = 1
    prefill: bool = False
    notices_writes: bool = True

    @property
    def certifies(self) -> bool:
        """True if the groups that are read whole have a bound."""
        return levels_of(self.policy).has_bound

    def layout_of(self, key: Tensor) -> UnevenLayout:
        """Return the layout of an index for a cache `key` [B, Hkv, L, D], by default settings."""
        return self.layout_with(GroupSettings(), key)

    def layout_with(self, settings: GroupSettings, key: Tensor) -> UnevenLayout:
        """Return the layout of an index for a cache `key` [B, Hkv, L, D]."""
        return UnevenLayout.over(key, self.policy, settings)

    def new_index(
        self, layout: IndexLayout, device: torch.device
    ) -> ChunkDeviceIndex | TokenClusterDeviceIndex:
        """Return an empty index, which is not trusted. Raises TypeError for another's layout."""
        if not isinstance(layout, UnevenLayout):
            raise TypeError(f"an index of uneven groups has an UnevenLayout, got {layout!r}")
        index = ChunkDeviceIndex if layout.of_chunks else TokenClusterDeviceIndex
        return index(layout, device)

    def run(
        self,
        module: ModuleType,
        operands: AttentionOperands,
        index: IndexOperands,
        tuning: Tuning | None = None,
    ) -> Tensor:
        """Return attention over the best groups, [B, Hq, T, Dv], and index new keys."""
        return run_uneven(module, operands, index, tuning)
