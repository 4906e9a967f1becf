"""Fine clusters of chunks and coarse units of clusters, kept balanced while chunks arrive."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.clustering import cluster, halves
from lychee_compile.kernels.reference.nodes import (
    Nodes,
    furthest,
    max_by_label,
    merge,
    rounding_slack,
    take_rows,
)

GroupKeys = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Gives the keys of the chunks at columns int64 [B, M], as `GroupedIndex.group_keys` does."""
WIDE = 2.0
"""Ratio of radii that splits a cluster: its own to the root mean square of all."""
_BLOCK = 2048
"""Number of chunks whose keys are gathered at a time, to bound the memory of building."""


class ClusterTree:
    """Two levels of nodes above the chunks of each row and KV head.

    A prompt is clustered at once (`build`). Chunks that decoding completes are grafted one by one
    onto their nearest cluster. As in a B-tree, a cluster that is too full or too wide is split in
    two, and so is a unit of too many clusters. So the work per chunk is bounded by the size of one
    cluster and one unit, and nodes stay as tight as those of a prompt.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        self.config = config
        self.chunk_cluster = torch.zeros(batch, kv_heads, 0, dtype=torch.int64, device=device)
        """Cluster of each chunk, int64 [B, Hkv, C]."""
        self.clusters = Nodes.empty(batch, kv_heads, head_dim, device)
        self.cluster_unit = self.chunk_cluster.clone()
        """Unit of each cluster, int64 [B, Hkv, N]."""
        self.units = Nodes.empty(batch, kv_heads, head_dim, device)

    def build(self, chunks: Nodes, keys_of: GroupKeys) -> None:
        """Cluster all chunks anew and take the radii of clusters and units from the keys."""
        config = self.config
        labels, count = cluster(chunks, config.cluster_chunks, None, config.seed)
        self.chunk_cluster, self.clusters = labels, merge(chunks, labels, count)
        units, unit_count = cluster(
            self.clusters, config.cluster_chunks, config.coarse_units, config.seed
        )
        self.cluster_unit, self.units = units, merge(self.clusters, units, unit_count)
        chunk_unit = units.gather(2, labels)
        reach_cluster = torch.zeros_like(chunks.radius)
        reach_unit = torch.zeros_like(chunks.radius)
        columns = torch.arange(chunks.count, device=labels.device).expand(labels.shape[0], -1)
        for part in range(0, chunks.count, _BLOCK):
            block = slice(part, part + _BLOCK)
            keys, valid = keys_of(columns[:, block])
            centre = take_rows(self.clusters.mean, labels[:, :, block])
            reach_cluster[:, :, block] = furthest(keys, valid, centre)
            centre = take_rows(self.units.mean, chunk_unit[:, :, block])
            reach_unit[:, :, block] = furthest(keys, valid, centre)
        self.clusters.radius = max_by_label(reach_cluster, labels, count)
        self.units.radius = max_by_label(reach_unit, chunk_unit, unit_count)

    def refresh(self, chunks: Nodes) -> None:
        """Take clusters and units anew from their chunks; one that has no tokens is gone."""
        if self.clusters.count == 0:
            return
        self.clusters = merge(chunks, self.labels_of(chunks), self.clusters.count)
        self.units = merge(self.clusters, self.cluster_unit, self.units.count)

    def labels_of(self, chunks: Nodes) -> Tensor:
        """Return `chunk_cluster`, with room for all `chunks`."""
        more = chunks.count - self.chunk_cluster.shape[2]
        if more > 0:
            self.chunk_cluster = F.pad(self.chunk_cluster, (0, more))
        return self.chunk_cluster[:, :, : chunks.count]

    def graft(self, chunks: Nodes, keys_of: GroupKeys, column: Tensor, rows: Tensor) -> None:
        """Attach the chunk at `column`, int64 [B], to its nearest cluster, in the rows bool [B].

        Chunks behind `column` are not attached yet.
        """
        labels = self.labels_of(chunks)
        column = torch.where(rows, column, 0)
        chosen = column[:, None, None].expand(-1, labels.shape[1], 1)
        chunk = chunks.gather(chosen)
        label = self._nearest_cluster(chunk)
        unit = self.cluster_unit.gather(2, label)
        keys, valid = keys_of(column[:, None])
        _absorb(self.clusters, label, chunk, keys, valid, rows)
        _absorb(self.units, unit, chunk, keys, valid, rows)
        applied = rows[:, None, None]
        labels.scatter_(2, chosen, torch.where(applied, label, labels.gather(2, chosen)))
        attached = torch.arange(chunks.count, device=column.device) <= column[:, None]
        attached = (attached[:, None] & (chunks.tokens > 0)).expand_as(labels)
        if self.config.repair:
            self._split_clusters(chunks, labels, attached, label, applied)
            self._split_units(self.cluster_unit.gather(2, label), applied)

    def _nearest_cluster(self, chunk: Nodes) -> Tensor:
        """Return the cluster whose centred mean is most like that of `chunk`: int64 [B, Hkv, 1]."""
        weight = self.clusters.tokens.float()[..., None]
        common = (weight * self.clusters.mean).sum(2, keepdim=True)
        common = common / weight.sum(2, keepdim=True).clamp(min=1)
        direction = F.normalize(self.clusters.mean - common, dim=-1)
        likeness = ((chunk.mean - common) * direction).sum(-1)
        likeness = likeness.masked_fill(self.clusters.tokens == 0, -torch.inf)
        return likeness.argmax(-1, keepdim=True)

    def _split_clusters(
        self, chunks: Nodes, labels: Tensor, attached: Tensor, label: Tensor, applied: Tensor
    ) -> None:
        """Split the cluster `label`, int64 [B, Hkv, 1], if it is too full or too wide."""
        members = ((labels == label) & attached).sum(-1, keepdim=True)
        usual = self.clusters.radius.square().sum(-1, keepdim=True)
        usual = usual / (self.clusters.tokens > 0).sum(-1, keepdim=True).clamp(min=1)
        wide = self.clusters.radius.gather(2, label).square() > WIDE**2 * usual
        full = members > 2 * self.config.cluster_chunks
        due = applied & (members > 1) & (full | wide)
        if not bool(due.any()):
            return
        if bool((self.clusters.tokens > 0).all(-1).any()):
            more = self.clusters.count // 4 + 1
            self.cluster_unit = F.pad(self.cluster_unit, (0, more))
            self.clusters = self.clusters.resized(self.clusters.count + more)
        fresh = _split(chunks, labels, attached, self.clusters, label, due)
        unit = self.cluster_unit.gather(2, label)
        self.cluster_unit.scatter_(
            2, fresh, torch.where(due, unit, self.cluster_unit.gather(2, fresh))
        )

    def _split_units(self, unit: Tensor, applied: Tensor) -> None:
        """Split the unit, int64 [B, Hkv, 1], if it has far more clusters than others have."""
        used = self.clusters.tokens > 0
        if self.units.count < self.config.coarse_units:
            self.units = self.units.resized(self.config.coarse_units)
        members = ((self.cluster_unit == unit) & used).sum(-1, keepdim=True)
        usual = used.sum(-1, keepdim=True) / self.config.coarse_units
        free = (self.units.tokens == 0).any(-1, keepdim=True)
        due = applied & free & (members > 2 * usual.clamp(min=self.config.cluster_chunks))
        if bool(due.any()):
            _split(self.clusters, self.cluster_unit, used, self.units, unit, due)


def _split(
    children: Nodes, labels: Tensor, attached: Tensor, parents: Nodes, label: Tensor, due: Tensor
) -> Tensor:
    """Split the parents `label`, int64 [B, Hkv, 1], in two where `due`, bool [B, Hkv, 1].

    Changes `labels`, int64 [B, Hkv, N], and `parents` in place. One half goes to an unused parent,
    which must exist. Returns that parent, int64 [B, Hkv, 1].
    """
    member = (labels == label) & attached
    most = int(member.sum(-1).max())
    used, column = member.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    used, column = used[..., :most].bool(), column[..., :most]
    mine = children.gather(column)
    mine.tokens = torch.where(used, mine.tokens, 0)
    side = halves(mine)
    fresh = (parents.tokens == 0).long().argmax(-1, keepdim=True)
    parts = merge(mine, side, 2)
    for half, where in ((0, label), (1, fresh)):
        parents.put(where, parts.gather(torch.full_like(where, half)), due)
    moved = used & (side == 1) & due
    labels.scatter_(2, column, torch.where(moved, fresh, labels.gather(2, column)))
    return fresh


def _absorb(
    nodes: Nodes, label: Tensor, chunk: Nodes, keys: Tensor, valid: Tensor, rows: Tensor
) -> None:
    """Add the keys of a chunk to the nodes `label`, int64 [B, Hkv, 1], in place, where `rows`.

    The centre moves to the new mean. The radius grows by the distance that the centre moved, which
    keeps the old keys within it, or to the furthest new key.
    """
    old = nodes.gather(label)
    size, added = old.tokens.float()[..., None], chunk.tokens.float()[..., None]
    total = (size + added).clamp(min=1)
    mean = torch.where(size > 0, old.mean + (chunk.mean - old.mean) * (added / total), chunk.mean)
    moved = mean - old.mean
    variance = size * (old.variance + moved.square())
    variance = (variance + added * (chunk.variance + (chunk.mean - mean).square())) / total
    slack = 1 + rounding_slack(mean.shape[-1])
    stretched = (old.radius + torch.linalg.vector_norm(moved, dim=-1)) * slack
    radius = torch.where(size[..., 0] > 0, stretched, 0)
    radius = torch.maximum(radius, furthest(keys, valid, mean))
    new = Nodes(mean, variance, radius, old.tokens + chunk.tokens)
    nodes.put(label, new, rows[:, None, None].expand_as(label))
