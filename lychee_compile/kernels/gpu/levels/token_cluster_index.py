"""The index of one key cache on a device for policies that read clusters of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.levels.index import LevelDeviceIndex
from lychee_compile.kernels.levels.groups import TokenClusters
from lychee_compile.kernels.reference.clustered import write_columns
from lychee_compile.kernels.reference.token_clusters import cluster_tokens


class TokenClusterDeviceIndex(LevelDeviceIndex):
    """Clusters of the tokens of one cache. Those that steps append wait for the next refit."""

    @property
    def groups(self) -> TokenClusters:
        """The sizes of clusters."""
        groups = self.layout.stack.levels[0].groups
        assert isinstance(groups, TokenClusters)
        return groups

    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Cluster the keys in the slots [0, ends[b]) of each row of `key` [B, Hkv, L, D]."""
        self.clear()
        self._fit(key, torch.tensor(ends, device=key.device))
        self.record(module, key, ends)

    def refit_after(self, end: int) -> int:
        """Return how many keys make clusters of their own."""
        return self.groups.window

    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Cluster the tokens that wait, once there are enough; all of them if there is no room."""
        end, tokens = self.written(len(ends)), self.named["tokens_0"]
        if bool((tokens[:, :, -1 - int(end.max()) // self.groups.size :] > 0).any()):
            self.clear_clusters()
        self._fit(key, end)

    def clear_clusters(self) -> None:
        """Let all tokens wait for clusters."""
        for name in ("label", "waiting", "tokens_0"):
            self.named[name].zero_()

    def _fit(self, key: Tensor, end: Tensor) -> None:
        """Cluster the waiting tokens of each row up to `end`, int64 [B], if they are enough."""
        rows, groups = len(end), self.groups
        first = self.layout.stack.always_read(self.layout.settings.sinks, 0, None)[0]
        waiting = self.named["waiting"][:rows, 0, 0].long()
        begin = waiting.clamp(min=first)
        enough = torch.where(waiting > first, groups.window, groups.size)
        count = torch.where(end - begin >= enough, end - begin, 0)
        if not bool(count.any()):
            return
        label = self.named["label"][:rows]
        held = self.named["tokens_0"][:rows] > 0
        number = torch.arange(1, held.shape[2] + 1, device=key.device)
        taken = torch.where(held, number, 0).amax(-1)
        found = label.long() - 1
        cluster_tokens(key, found, begin, count, groups.size, taken)
        last = int((begin + count).max())
        write_columns(
            self.layout.stack.levels[0], key, found[:, :, :last], self.columns(0, rows), taken
        )
        label.copy_(found + 1)
        moved = torch.where(count > 0, end, waiting)
        self.named["waiting"][:rows] = moved[:, None, None].to(torch.int32)
