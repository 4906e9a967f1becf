"""LycheeCluster (arXiv 2603.08453), and what its chunks need to lose nothing: token sketches."""

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
"""An update that closes at least this many chunks is a prompt's, and clusters anew; one that closes
fewer, as decoding does, grafts them one by one."""
NEGLIGIBLE_SHARE = 1e-4
"""Nodes proved to hold together less than this share of the softmax mass are never looked into."""


class LycheeIndex(GroupedIndex):
    """Boundary-aware chunks below fine clusters below at most 64 coarse units, per KV head.

    Summary: mean, diagonal variance and radius of a node's keys, and a sketch of every key
    (`KeySketches`). Estimate: of a node's mass the second-order cumulants, of a token's score its
    sketch. Bounds: the triangle inequality, q.k <= q.c + |q| r, on the balls of all three levels,
    and Cauchy-Schwarz on what a sketch leaves out; the least of them holds. Always read: sinks and
    recent tokens. While decoding, finished chunks are sketched and grafted onto their nearest
    cluster; what grows too full or too wide is split.

    Beyond the paper: it chooses whole chunks, this chooses tokens. The best choice of chunks holds
    less of the mass than a choice of tokens by a sketch of 48 bits per 16 channels (measured: see
    benchmarks/results/summaries.md), at fewer bytes than the moments of chunks. A context of up to
    `flat_tokens` is scanned by sketches alone; in a longer one units, clusters and chunks narrow
    what may be chosen down to `overfetch` times what is read; a kernel need not look at the rest.
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
        made = self.summaries
        return Nodes(made["mean"], made["variance"], made["radius"], tokens)

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Mean, variance and radius of each chunk."""
        weight = valid[:, None, :, :, None].float()
        keys = torch.where(valid[:, None, :, :, None], keys, 0)
        tokens = valid.sum(-1).clamp(min=1)[:, None, :, None]
        mean = keys.sum(3) / tokens
        variance = ((keys - mean[:, :, :, None]).square() * weight).sum(3) / tokens
        return {"mean": mean, "variance": variance, "radius": furthest(keys, valid, mean)}

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Of chunks: see `Nodes.log_estimate`."""
        return self.chunks.log_estimate(query, scale)

    def score_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """The least of the bounds of a token's sketch, chunk, cluster and unit."""
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
        """The tokens of most estimated mass, by their sketches."""
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
        """Sketches and their axes; for a long context the nodes above, and fewer sketches."""
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
        """Tokens whose sketches are worth a look, bool [B, Hkv, Tq, N]; None: all."""
        held = question.held(self.group_start, self.group_length)
        if int(held.sum(-1).max()) <= self.config.flat_tokens or question.visible.bias is not None:
            return None
        tree, chunks = self.tree, self.chunks
        labels = tree.labels_of(chunks)
        quota = self.config.overfetch * question.room
        by_chunk = held[:, None].expand(-1, self.kv_heads, -1, -1)
        by_cluster = _sum_into(by_chunk, labels, tree.clusters.count)
        by_unit = _sum_into(by_cluster, tree.cluster_unit, tree.units.count)
        unit = self._shortlist(question, tree.units, by_unit, 4 * quota)
        by_cluster = torch.where(_below(unit, tree.cluster_unit), by_cluster, 0)
        kept = self._shortlist(question, tree.clusters, by_cluster, 2 * quota)
        by_chunk = torch.where(_below(kept, labels), by_chunk, 0)
        chosen = self._shortlist(question, chunks, by_chunk, quota)
        total = held.sum(-1)[:, None]
        short = (total <= self.config.flat_tokens) | (total <= question.room)
        return self.spread(chosen | short[..., None])

    def _shortlist(self, question: Question, nodes: Nodes, held: Tensor, quota: Tensor) -> Tensor:
        """Nodes of most estimated mass, until they hold `quota` tokens: bool [B, Hkv, Tq, N]."""
        matters = _not_negligible(question, nodes, held)
        estimate = nodes.log_estimate(question.query, question.scale)
        score = question.split(question.capped(estimate))
        rank = question.share(group_mass(score, torch.where(matters, held, 0)))
        order, inside = take_by_rank(rank, held, quota[..., None], whole=False)
        return torch.zeros_like(matters).scatter(-1, order, inside) & matters


def _not_negligible(question: Question, nodes: Nodes, held: Tensor) -> Tensor:
    """Nodes whose bound leaves room for a share of the mass that matters to any head.

    `held`, int64 [B, Hkv, Tq, N], are the tokens of each that may be chosen. The mass to compare
    with is bounded from below, by Jensen's inequality, over nodes that are wholly visible. It does
    not hold for capped scores, where the lowest score stands for all.
    """
    query, scale = question.query, question.scale
    raw = nodes.score_bound(query, scale)
    bound = question.split(question.capped(raw)) + log_count(held)[:, :, None]
    if question.softcap is None:
        floor = nodes.log_mass_floor(query, scale)
    else:
        lowest = question.capped(-nodes.score_bound(-query, scale))
        floor = lowest + log_count(nodes.tokens)[:, :, None]
    whole = (held == nodes.tokens[:, :, None]) & (held > 0)
    floor = question.split(floor).masked_fill(~whole[:, :, None], -torch.inf)
    threshold = floor.logsumexp(-1, keepdim=True) + math.log(NEGLIGIBLE_SHARE / max(nodes.count, 1))
    return (~(bound < threshold)).any(2) & (held > 0)  # a NaN proves nothing


def _below(chosen: Tensor, labels: Tensor) -> Tensor:
    """Whether the parent of each node is `chosen`, bool [B, Hkv, Tq, N'], by labels [B, Hkv, N]."""
    wide = labels[:, :, None].expand(-1, -1, chosen.shape[2], -1)
    return chosen.gather(-1, wide)


def _sum_into(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sums of `values` [B, Hkv, Tq, N] under `labels` [B, Hkv, N]: [B, Hkv, Tq, count]."""
    total = values.new_zeros(*values.shape[:3], count)
    return total.scatter_add(-1, labels[:, :, None].expand_as(values), values)
