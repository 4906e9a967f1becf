"""The three-level index over the keys of one cache: chunks, fine clusters, coarse units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.chunking import cut_chunks
from lychee_compile.kernels.reference.clustering import cluster
from lychee_compile.kernels.reference.nodes import (
    Nodes,
    max_by_label,
    merge,
    rounding_slack,
    take_rows,
)
from lychee_compile.kernels.reference.strengths import StrengthTrack

PROMPT_CHUNKS = 32
"""An update that closes at least this many chunks is a prompt's, and clusters anew; one that closes
fewer, as decoding does, grafts them one by one."""
GATHER_CHUNKS = 2048
"""Chunks whose keys are gathered at a time, to bound the memory of building."""


class KVIndex:
    """Index over keys [B, Hkv, L, D], rows of any length (LycheeCluster, arXiv 2603.08453).

    Row b is cut into chunks from `start[b]` to `tail[b]`; tokens from the tail on are in no chunk
    yet. Chunks are shared by the heads of a row, clusters are per KV head. `radius` of every node
    covers each key below it, after any sequence of updates.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        def nodes() -> Nodes:
            return Nodes.empty(batch, kv_heads, head_dim, device)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        self.config = config
        self.strengths = StrengthTrack(batch, config.boundaries, device)
        self.start = numbers(batch)
        """First token of each row, int64 [B]."""
        self.tail = numbers(batch)
        """First token of each row that is in no chunk, int64 [B]."""
        self.end = numbers(batch)
        """Tokens of each row that the last update saw, int64 [B]."""
        self.compared = numbers(batch)
        """Tokens of each row whose keys the strengths have seen, int64 [B]."""
        self.chunk_start = numbers(batch, 0)
        self.chunk_length = numbers(batch, 0)
        """First token and length of each chunk, int64 [B, C]; length 0: unused slot."""
        self.chunks = nodes()
        self.chunk_cluster = numbers(batch, kv_heads, 0)
        self.clusters = nodes()
        self.cluster_unit = numbers(batch, kv_heads, 0)
        self.units = nodes()

    @property
    def batch(self) -> int:
        """Rows."""
        return self.start.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.chunks.mean.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self.chunks.mean.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the index lives."""
        return self.start.device

    @property
    def chunk_count(self) -> Tensor:
        """Chunks of each row, int64 [B]."""
        return (self.chunk_length > 0).sum(1)

    def partition(self) -> tuple[Tensor, Tensor]:
        """Every token indexed, as chunks in order: (starts, lengths), int64 [B, C + 1].

        A row's last chunk is its tail, whose end is not decided yet. Length 0: no chunk.
        """
        rest = (self.end - self.tail).clamp(min=0)
        starts = torch.cat((self.chunk_start, self.tail[:, None]), 1)
        lengths = torch.cat((self.chunk_length, rest[:, None]), 1)
        order = torch.argsort((lengths == 0).to(torch.uint8), dim=1, stable=True)
        lengths = lengths.gather(1, order)
        return torch.where(lengths > 0, starts.gather(1, order), 0), lengths

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Index the tokens up to `end`, int64 [B], of `key` [B, Hkv, L, D].

        Keys before `tail` must be those that were indexed. A prompt is clustered at once; the few
        chunks a decoding step closes are grafted onto their nearest cluster.
        """
        self.end = end.clone()
        due = self.tail + self.config.chunk[1] < end
        if not bool(due.any()):
            return
        begin, last = int(self.tail[due].min()), int(end[due].max())
        self.strengths.compare_keys(key, max(int(self.compared[due].min()) - 1, 0), last)
        self.compared = torch.where(due, torch.maximum(self.compared, end), self.compared)
        starts, lengths = cut_chunks(
            self.strengths.strength[:, begin:last],
            torch.where(due, self.tail, last) - begin,
            torch.where(due, end - begin, 0),
            self.config.chunk,
        )
        if starts.shape[1] == 0:
            return
        starts = torch.where(lengths > 0, starts + begin, 0)
        known = int(self.chunk_count.max())
        columns = self._append(key, starts, lengths)
        if known == 0 or starts.shape[1] >= PROMPT_CHUNKS:
            self._cluster(key)
        else:
            for column in range(starts.shape[1]):
                self._graft(key, columns[:, column], lengths[:, column] > 0)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on. Bounds stay true.

        Chunks whose cut a forgotten token took part in go too, so that what follows is cut as if
        the forgotten tokens had never been there.
        """
        self.strengths.forget(keep)
        self.compared = torch.minimum(self.compared, keep)
        self.end = torch.minimum(self.end, keep)
        self._drop_chunks(self.chunk_start + self.config.chunk[1] >= keep[:, None])

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        self._drop_chunks(rows[:, None])
        self.start = torch.where(rows, start, self.start)
        self.tail = torch.where(rows, start, self.tail)

    def _drop_chunks(self, which: Tensor) -> None:
        """Drop the chunks `which`, bool [B, 1 or C], none of them before one that is kept."""
        dropped = (self.chunk_length > 0) & which
        if not bool(dropped.any()):
            return
        self.chunk_length = torch.where(dropped, 0, self.chunk_length)
        self.chunks.tokens = torch.where(dropped[:, None], 0, self.chunks.tokens)
        self.clusters = merge(self.chunks, self.chunk_cluster, self.clusters.count)
        self.units = merge(self.clusters, self.cluster_unit, self.units.count)
        left = torch.where(self.chunk_length > 0, self.chunk_start + self.chunk_length, 0).amax(1)
        self.tail = torch.maximum(left, self.start)

    def _append(self, key: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """Add chunks as leaves; the column each went to, int64 [B, C]."""
        used = lengths > 0
        count = self.chunk_count
        columns = count[:, None] + used.long().cumsum(1) - 1
        needed = int(columns.max()) + 1
        if needed > self.chunks.count:
            self._reserve_chunks(needed + needed // 4)
        row, slot = used.nonzero(as_tuple=True)
        column = columns[row, slot]
        self.chunk_start[row, column] = starts[row, slot]
        self.chunk_length[row, column] = lengths[row, slot]
        for part in range(0, starts.shape[1], GATHER_CHUNKS):
            block = slice(part, part + GATHER_CHUNKS)
            self._summarise(key, columns[:, block], used[:, block])
        ends = (starts + lengths).max(1).values
        self.tail = torch.maximum(self.tail, ends)
        return columns

    def _reserve_chunks(self, count: int) -> None:
        more = count - self.chunks.count
        self.chunk_start = F.pad(self.chunk_start, (0, more))
        self.chunk_length = F.pad(self.chunk_length, (0, more))
        self.chunk_cluster = F.pad(self.chunk_cluster, (0, more))
        self.chunks = self.chunks.resized(count)

    def _summarise(self, key: Tensor, columns: Tensor, used: Tensor) -> None:
        """Mean, variance and radius of the chunks in `columns`, int64 [B, M], where `used`."""
        keys, valid = self._chunk_keys(key, columns.clamp(min=0))
        weight = valid[:, None, :, :, None].float()
        tokens = valid.sum(-1).clamp(min=1)[:, None, :, None]
        mean = (keys * weight).sum(3) / tokens
        variance = ((keys - mean[:, :, :, None]).square() * weight).sum(3) / tokens
        radius = _reach(keys, valid, mean)
        row, slot = used.nonzero(as_tuple=True)
        column = columns[row, slot]
        self.chunks.mean[row, :, column] = mean[row, :, slot]
        self.chunks.variance[row, :, column] = variance[row, :, slot]
        self.chunks.radius[row, :, column] = radius[row, :, slot]
        self.chunks.tokens[row, :, column] = self.chunk_length[row, column][:, None]

    def _chunk_keys(self, key: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of the chunks in `columns` [B, M], padded to the longest chunk, T tokens.

        Float32 [B, Hkv, M, T, D], and which of them are in the chunk, bool [B, M, T].
        """
        offset = torch.arange(self.config.chunk[1], device=key.device)
        valid = offset < self.chunk_length.gather(1, columns)[..., None]
        position = self.chunk_start.gather(1, columns)[..., None] + offset
        position = position.clamp(max=key.shape[2] - 1)
        row = torch.arange(key.shape[0], device=key.device)[:, None, None]
        return key[row, :, position].permute(0, 3, 1, 2, 4).float(), valid

    def _cluster(self, key: Tensor) -> None:
        """Cluster all chunks anew and take the radii of clusters and units from the keys."""
        config = self.config
        labels, count = cluster(self.chunks, config.cluster_chunks, None, config.seed)
        self.chunk_cluster, self.clusters = labels, merge(self.chunks, labels, count)
        units, unit_count = cluster(
            self.clusters, config.cluster_chunks, config.coarse_units, config.seed
        )
        self.cluster_unit, self.units = units, merge(self.clusters, units, unit_count)
        chunk_unit = units.gather(2, labels)
        reach_cluster = torch.zeros_like(self.chunks.radius)
        reach_unit = torch.zeros_like(self.chunks.radius)
        columns = torch.arange(self.chunks.count, device=key.device).expand(self.batch, -1)
        for part in range(0, self.chunks.count, GATHER_CHUNKS):
            block = slice(part, part + GATHER_CHUNKS)
            keys, valid = self._chunk_keys(key, columns[:, block])
            centre = take_rows(self.clusters.mean, labels[:, :, block])
            reach_cluster[:, :, block] = _reach(keys, valid, centre)
            centre = take_rows(self.units.mean, chunk_unit[:, :, block])
            reach_unit[:, :, block] = _reach(keys, valid, centre)
        self.clusters.radius = max_by_label(reach_cluster, labels, count)
        self.units.radius = max_by_label(reach_unit, chunk_unit, unit_count)

    def _graft(self, key: Tensor, column: Tensor, rows: Tensor) -> None:
        """Attach the chunk at `column`, int64 [B], to its nearest cluster where `rows`, bool [B].

        A cluster that is full, at twice the mean number of chunks, is not widened: the chunk founds
        a new one beside it, in the same unit.
        """
        column = torch.where(rows, column, 0)
        chosen = column[:, None, None].expand(-1, self.kv_heads, 1)
        chunk = self.chunks.gather(chosen)
        nearest = self._nearest_cluster(chunk)
        unit = self.cluster_unit.gather(2, nearest)
        # Chunks appended after this one have no cluster yet.
        grafted = torch.arange(self.chunks.count, device=key.device) <= column[:, None]
        joined = (self.chunk_cluster == nearest) & (grafted & (self.chunk_length > 0))[:, None]
        full = joined.sum(-1, keepdim=True) - joined.gather(2, chosen).long()
        full = full >= 2 * self.config.cluster_chunks
        label = torch.where(full, self._free_cluster(bool(full.any())), nearest)
        keys, valid = self._chunk_keys(key, column[:, None])
        _absorb(self.clusters, label, chunk, keys, valid, rows)
        _absorb(self.units, unit, chunk, keys, valid, rows)
        applied = rows[:, None, None]
        self.cluster_unit = self.cluster_unit.scatter(
            2, label, torch.where(applied, unit, self.cluster_unit.gather(2, label))
        )
        self.chunk_cluster = self.chunk_cluster.scatter(
            2, chosen, torch.where(applied, label, self.chunk_cluster.gather(2, chosen))
        )

    def _nearest_cluster(self, chunk: Nodes) -> Tensor:
        """Cluster whose centred mean is most like the chunk's: int64 [B, Hkv, 1]."""
        weight = self.clusters.tokens.float()[..., None]
        common = (weight * self.clusters.mean).sum(2, keepdim=True)
        common = common / weight.sum(2, keepdim=True).clamp(min=1)
        direction = F.normalize(self.clusters.mean - common, dim=-1)
        likeness = ((chunk.mean - common) * direction).sum(-1)
        likeness = likeness.masked_fill(self.clusters.tokens == 0, -torch.inf)
        return likeness.argmax(-1, keepdim=True)

    def _free_cluster(self, needed: bool) -> Tensor:
        """An unused cluster slot per head, int64 [B, Hkv, 1], making room where `needed`."""
        if needed and bool((self.clusters.tokens > 0).all(-1).any()):
            count = self.clusters.count + self.clusters.count // 4 + 1
            self.cluster_unit = F.pad(self.cluster_unit, (0, count - self.clusters.count))
            self.clusters = self.clusters.resized(count)
        return (self.clusters.tokens == 0).long().argmax(-1, keepdim=True)


def _reach(keys: Tensor, valid: Tensor, centre: Tensor) -> Tensor:
    """Distance from `centre` [B, Hkv, M, D] that no key [B, Hkv, M, T, D] exceeds: [B, Hkv, M]."""
    distance = torch.linalg.vector_norm(keys - centre[:, :, :, None], dim=-1)
    furthest = distance.masked_fill(~valid[:, None], 0).amax(-1)
    slack = rounding_slack(keys.shape[-1])
    return furthest * (1 + slack) + slack * torch.linalg.vector_norm(centre, dim=-1)


def _absorb(
    nodes: Nodes, label: Tensor, chunk: Nodes, keys: Tensor, valid: Tensor, rows: Tensor
) -> None:
    """Add a chunk's keys to the nodes `label`, int64 [B, Hkv, 1], in place, where `rows`.

    The centre moves to the new mean; the radius grows by the way it moved, so that the old keys
    stay within it, or to the furthest new key.
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
    new = Nodes(
        mean,
        variance,
        torch.maximum(radius, _reach(keys, valid, mean)),
        old.tokens + chunk.tokens,
    )
    applied = rows[:, None, None]
    vectors = label[..., None].expand_as(mean)
    nodes.mean.scatter_(2, vectors, torch.where(applied[..., None], new.mean, old.mean))
    nodes.variance.scatter_(2, vectors, torch.where(applied[..., None], new.variance, old.variance))
    nodes.radius.scatter_(2, label, torch.where(applied, new.radius, old.radius))
    nodes.tokens.scatter_(2, label, torch.where(applied, new.tokens, old.tokens))
