"""LycheeCluster (arXiv 2603.08453), extended by sketches that tell the tokens of a chunk apart."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.grouped import GroupedIndex
from lychee_compile.kernels.reference.nodes import Nodes, furthest, log_count
from lychee_compile.kernels.reference.own_slots import own_slots
from lychee_compile.kernels.reference.question import Question, Runs, group_mass, take_by_rank
from lychee_compile.kernels.reference.sketch import BLOCK, KeySketches
from lychee_compile.kernels.reference.sketch_axes import sketch_bits
from lychee_compile.kernels.reference.tree import ClusterTree

PROMPT_CHUNKS = 32
"""Least number of chunks that an update must close to cluster all anew, as a prompt does.

An update that closes fewer, as decoding does, grafts them one by one.
"""
REBUILD = 2
"""Part of all chunks, as 1 / REBUILD, that may be rewritten before all are clustered anew."""
NEGLIGIBLE_SHARE = 1e-4
"""Share of the softmax mass: nodes proved to hold less than it together are not looked into."""


class LycheeIndex(GroupedIndex):
    """LycheeCluster: boundary-aware chunks below fine clusters below coarse units, per KV head.

    Each node has the mean, the diagonal variance and the radius of its keys, and every key has a
    sketch (`KeySketches`). The mass of a node is estimated by second-order cumulants, the score of
    a token by its sketch. The triangle inequality, q.k <= q.c + |q| r, bounds scores by the balls
    of all three levels, and Cauchy-Schwarz bounds what a sketch leaves out; the least bound holds.
    Sinks and recent tokens are always read. While decoding, finished chunks are sketched and
    grafted onto their nearest cluster; a cluster or unit that grows too full or too wide is split.
    There are at most 64 coarse units.

    Not as in the paper: the paper chooses whole chunks, this chooses tokens. The best choice of
    chunks holds less of the mass than a choice of tokens by a sketch of 48 bits per 16 channels
    (measured: see benchmarks/results/summaries.md), which takes fewer bytes than the moments of
    chunks. A context of up to `flat_tokens` is scanned by sketches alone. In a longer one units,
    clusters and chunks narrow the tokens down to `overfetch` times those that are read. Chunks,
    clusters and units are made when a long context or a certificate first asks for them.
    """

    summarised_late = True

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.tree = ClusterTree(batch, kv_heads, head_dim, config, device)
        self.sketches = KeySketches(batch, kv_heads, head_dim, device, repair=config.repair)
        self.clustered = self.start.clone()
        """Number of groups of each row, the first ones, that are in the tree, int64 [B]."""
        self.stale = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        """Groups in the tree whose keys were written since, bool [B, C']."""
        self.rewritten = 0
        """Number of groups summarised again since all were clustered."""

    @property
    def chunks(self) -> Nodes:
        """The groups as nodes; one that is not in the tree yet has no tokens."""
        number = torch.arange(self.group_length.shape[1], device=self.device)
        tokens = torch.where(number < self.clustered[:, None], self.group_length, 0)
        tokens = tokens[:, None].expand(-1, self.kv_heads, -1)
        summary = self.summaries
        return Nodes(summary["mean"], summary["variance"], summary["radius"], tokens)

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Return mean, variance and radius of each chunk."""
        weight = valid[:, None, :, :, None].float()
        keys = torch.where(valid[:, None, :, :, None], keys, 0)
        tokens = valid.sum(-1).clamp(min=1)[:, None, :, None]
        mean = keys.sum(3) / tokens
        variance = ((keys - mean[:, :, :, None]).square() * weight).sum(3) / tokens
        return {"mean": mean, "variance": variance, "radius": furthest(keys, valid, mean)}

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Return the estimate of each chunk's mass: see `Nodes.log_estimate`."""
        return self.chunks.log_estimate(query, scale)

    def score_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """Return the least of the bounds of a token's sketch, chunk, cluster and unit.

        Before `complete` it is the bound of the sketch.
        """
        tree, count = self.tree, self.group_start.shape[1]
        if count == 0:
            return None
        if not (self._is_complete() and tree.cluster_unit.shape[2]):
            return self.sketches.score_bound(query, scale, int(self.tail.max()))
        bound = self.chunks.score_bound(query, scale)
        label = tree.labels_of(self.chunks)
        unit = tree.cluster_unit.gather(2, label)
        for nodes, above in ((tree.clusters, label), (tree.units, unit)):
            wide = above[:, :, None].expand(-1, -1, bound.shape[2], -1)
            bound = torch.minimum(bound, nodes.score_bound(query, scale).gather(-1, wide))
        bound = self.spread(bound)
        return torch.minimum(bound, self.sketches.score_bound(query, scale, bound.shape[-1]))

    def choose(self, question: Question) -> Runs:
        """Return the tokens of most estimated mass, by their sketches."""
        within = self._candidates(question)
        own = own_slots(question) if within is None else None
        if own is not None:
            query = question.split(question.query)
            raw = self.sketches.scores_at(query, question.scale, own.slot, own.count)
            return question.take_own(raw, own.slot, own.held)
        slots = int(self.tail.max())
        rank = question.token_share(self.sketches.scores(question.query, question.scale, slots))
        return question.take_tokens(rank, within)

    def on_append(self, key: Tensor, columns: Tensor, used: Tensor) -> None:
        """Sketch the keys of the new chunks."""
        first = torch.where(used, columns, self.group_start.shape[1]).amin(1, keepdim=True)
        begin = self.group_start.gather(1, first.clamp(max=self.group_start.shape[1] - 1))[:, 0]
        begin = torch.where(used.any(1), begin, self.tail)
        self.sketches.encode(key, self.start, begin, self.tail)

    def on_rewrite(self, key: Tensor, slots: Tensor, columns: Tensor) -> None:
        """Sketch the keys in the slots anew. Their chunks in the tree become stale."""
        self.sketches.rewrite(key, self.start, self.tail, slots)
        more = self.group_start.shape[1] - self.stale.shape[1]
        stale = F.pad(self.stale, (0, more))
        row, place = ((slots >= 0) & (columns < self.clustered[:, None])).nonzero(as_tuple=True)
        stale[row, columns[row, place]] = True
        self.stale = stale

    def on_drop(self) -> None:
        """Forget dropped chunks in all levels."""
        self.clustered = torch.minimum(self.clustered, self.group_count)
        number = torch.arange(self.stale.shape[1], device=self.device)
        self.stale = self.stale & (number < self.clustered[:, None])
        self.tree.refresh(self.chunks)
        self.sketches.forget(self.start, self.tail)

    def complete(self, key: Tensor) -> None:
        """Summarise the chunks that are new or were rewritten, and add them to the tree."""

        def keys_of(which: Tensor) -> tuple[Tensor, Tensor]:
            return self.group_keys(key, which)

        rebuild = self._renew(key)
        count = self.group_count
        begin, last = int(self.clustered.min()), int(count.max())
        columns = torch.arange(begin, last, device=self.device).expand(self.batch, -1)
        used = (columns >= self.clustered[:, None]) & (columns < count[:, None])
        if bool(used.any()):
            self.summarise_groups(key, columns, used)
        rebuild |= self.tree.clusters.count == 0 or int(used.sum(1).max()) >= PROMPT_CHUNKS
        self.clustered = count
        if rebuild and last > 0:
            self.tree.build(self.chunks, keys_of)
            self.rewritten = 0
            return
        for place in range(columns.shape[1]):
            if bool(used[:, place].any()):
                self.tree.graft(self.chunks, keys_of, columns[:, place], used[:, place])

    def _renew(self, key: Tensor) -> bool:
        """Summarise stale chunks anew, and return if so many were that the tree has aged."""
        if not bool(self.stale.any()):
            return False
        row, column = self.stale.nonzero(as_tuple=True)
        place = self.stale.cumsum(1)[row, column] - 1
        columns = torch.zeros(self.batch, int(place.max()) + 1, dtype=torch.int64)
        columns = columns.to(self.device)
        used = torch.zeros_like(columns, dtype=torch.bool)
        columns[row, place], used[row, place] = column, True
        self.summarise_groups(key, columns, used)
        self.stale = torch.zeros_like(self.stale)
        self.tree.refresh(self.chunks)
        self.rewritten += columns.shape[1]
        return REBUILD * self.rewritten >= int(self.clustered.max())

    def _is_complete(self) -> bool:
        """True if the tree holds all chunks as they are now."""
        return torch.equal(self.clustered, self.group_count) and not bool(self.stale.any())

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count sketches and their axes; in a long context nodes, and fewer sketches."""
        bits, node = sketch_bits(self.head_dim), 2 * 2 * self.head_dim
        per_block = 2 * (self.head_dim * (len(bits) + 1) + len(bits))
        axes = -(-tokens // BLOCK) * per_block
        if tokens <= self.config.flat_tokens:
            return axes + tokens * sum(bits) // 8
        usual = sum(self.config.chunk) / 2
        quota = self.config.overfetch * budget
        clusters = tokens / usual / self.config.cluster_chunks
        nodes = self.config.coarse_units + clusters + 2 * quota / usual
        return axes + int(nodes * node) + quota * sum(bits) // 8

    def _candidates(self, question: Question) -> Tensor | None:
        """Return the tokens whose sketches are worth a look, bool [B, Hkv, Tq, N]; None: all."""
        tokens = question.held(self.group_start, self.group_length)
        if (
            int(tokens.sum(-1).max()) <= self.config.flat_tokens
            or question.visible.bias is not None
        ):
            return None
        if question.key is not None:
            self.complete(question.key)
        if not self._is_complete():
            return None  # without the keys nothing can be built: all sketches are read
        tree, chunks = self.tree, self.chunks
        labels = tree.labels_of(chunks)
        quota = self.config.overfetch * question.room
        by_chunk = tokens[:, None].expand(-1, self.kv_heads, -1, -1)
        by_cluster = _sum_into(by_chunk, labels, tree.clusters.count)
        by_unit = _sum_into(by_cluster, tree.cluster_unit, tree.units.count)
        unit = self._shortlist(question, tree.units, by_unit, 4 * quota)
        by_cluster = torch.where(_below(unit, tree.cluster_unit), by_cluster, 0)
        kept = self._shortlist(question, tree.clusters, by_cluster, 2 * quota)
        by_chunk = torch.where(_below(kept, labels), by_chunk, 0)
        chosen = self._shortlist(question, chunks, by_chunk, quota)
        total = tokens.sum(-1)[:, None]
        short = (total <= self.config.flat_tokens) | (total <= question.room)
        return self.spread(chosen | short[..., None])

    def _shortlist(self, question: Question, nodes: Nodes, tokens: Tensor, quota: Tensor) -> Tensor:
        """Return the nodes of most mass that hold `quota` tokens, bool [B, Hkv, Tq, N]."""
        matters = _not_negligible(question, nodes, tokens)
        estimate = nodes.log_estimate(question.query, question.scale)
        score = question.split(question.capped(estimate))
        rank = question.share(group_mass(score, torch.where(matters, tokens, 0)))
        order, inside = take_by_rank(rank, tokens, quota[..., None], whole=False)
        return torch.zeros_like(matters).scatter(-1, order, inside) & matters


def _not_negligible(question: Question, nodes: Nodes, tokens: Tensor) -> Tensor:
    """Return the nodes that may hold a share of the mass that matters to any head: bool.

    `tokens`, int64 [B, Hkv, Tq, N], are the tokens of each node that may be chosen. Jensen's
    inequality bounds the whole mass from below, over nodes that are wholly visible. The inequality
    does not hold for soft-capped scores: there the lowest score stands for all.
    """
    query, scale = question.query, question.scale
    raw = nodes.score_bound(query, scale)
    bound = question.split(question.capped(raw)) + log_count(tokens)[:, :, None]
    if question.softcap is None:
        floor = nodes.log_mass_floor(query, scale)
    else:
        lowest = question.capped(-nodes.score_bound(-query, scale))
        floor = lowest + log_count(nodes.tokens)[:, :, None]
    whole = (tokens == nodes.tokens[:, :, None]) & (tokens > 0)
    floor = question.split(floor).masked_fill(~whole[:, :, None], -torch.inf)
    threshold = floor.logsumexp(-1, keepdim=True) + math.log(NEGLIGIBLE_SHARE / max(nodes.count, 1))
    return (~(bound < threshold)).any(2) & (tokens > 0)  # a NaN proves nothing


def _below(chosen: Tensor, labels: Tensor) -> Tensor:
    """Return the nodes below `chosen`, bool [B, Hkv, Tq, N'], by labels [B, Hkv, N]."""
    wide = labels[:, :, None].expand(-1, -1, chosen.shape[2], -1)
    return chosen.gather(-1, wide)


def _sum_into(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the sums of `values` [B, Hkv, Tq, N] by `labels` [B, Hkv, N]: [B, Hkv, Tq, count]."""
    total = values.new_zeros(*values.shape[:3], count)
    return total.scatter_add(-1, labels[:, :, None].expand_as(values), values)
