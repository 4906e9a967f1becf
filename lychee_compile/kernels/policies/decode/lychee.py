"""LycheeCluster (arXiv 2603.08453), extended by sketches that tell the tokens of a chunk apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.grouped import GroupedIndex
from lychee_compile.kernels.reference.nodes import Nodes, furthest, log_count
from lychee_compile.kernels.reference.question import Question, Runs, group_mass, take_by_rank
from lychee_compile.kernels.reference.sketch import BLOCK, KeySketches, sketch_bits
from lychee_compile.kernels.reference.tree import ClusterTree

PROMPT_CHUNKS = 32
"""Least number of chunks that an update must close to cluster all anew, as a prompt does.

An update that closes fewer, as decoding does, grafts them one by one.
"""
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
    clusters and chunks narrow the tokens down to `overfetch` times those that are read.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.tree = ClusterTree(batch, kv_heads, head_dim, config, device)
        self.sketches = KeySketches(batch, kv_heads, head_dim, device, repair=config.repair)

    @property
    def chunks(self) -> Nodes:
        """The groups as nodes."""
        tokens = self.group_length[:, None].expand(-1, self.kv_heads, -1)
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
        """Return the least of the bounds of a token's sketch, chunk, cluster and unit."""
        tree, count = self.tree, self.group_start.shape[1]
        if count == 0:
            return None
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
        slots = int(self.tail.max())
        rank = question.token_share(self.sketches.scores(question.query, question.scale, slots))
        return question.take_tokens(rank, self._candidates(question))

    def on_append(self, key: Tensor, columns: Tensor, used: Tensor) -> None:
        """Sketch and cluster the new chunks."""
        first = torch.where(used, columns, self.group_start.shape[1]).amin(1, keepdim=True)
        begin = self.group_start.gather(1, first.clamp(max=self.group_start.shape[1] - 1))[:, 0]
        begin = torch.where(used.any(1), begin, self.tail)
        self.sketches.encode(key, self.start, begin, self.tail)

        def keys_of(which: Tensor) -> tuple[Tensor, Tensor]:
            return self.group_keys(key, which)

        fresh = self.tree.clusters.count == 0
        if fresh or columns.shape[1] >= PROMPT_CHUNKS:
            self.tree.build(self.chunks, keys_of)
            return
        for place in range(columns.shape[1]):
            self.tree.graft(self.chunks, keys_of, columns[:, place], used[:, place])

    def on_drop(self) -> None:
        """Forget dropped chunks in all levels."""
        self.tree.drop(self.chunks)
        self.sketches.forget(self.start, self.tail)

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
