"""Choosing what a query reads: rank nodes by the mass they may hold, prune them by bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.nodes import Nodes, log_count
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.visible import Visible, visible_keys

NEGLIGIBLE_SHARE = 1e-4
"""Nodes proved to hold together less than this share of the softmax mass are never looked into."""


@dataclass(frozen=True)
class Selection:
    """Runs of slots to read, per row, KV head and query position."""

    run_start: Tensor
    run_length: Tensor
    """First slot and length of each run, int64 [B, Hkv, Tq, R]. Runs do not overlap: the first
    holds the sinks, the last the recent tokens, those between whole chunks, best first."""
    visible: Visible
    scale: float
    """What q.k was multiplied by."""
    log_unread_bound: Tensor | None
    """Upper bound of log sum of exp(score) over the unread keys, float32 [B, Hq, Tq]; None where
    it was not asked for."""

    def tokens(self) -> Tensor:
        """Slots read, int64 [B, Hkv, Tq, S], -1 where a row, head or query reads fewer than S.

        Slots that the mask hides from every head are left out.
        """
        ends = self.run_length.cumsum(-1)
        size = int(ends[..., -1].max())
        slot = torch.arange(size, device=ends.device).expand(*ends.shape[:-1], size).contiguous()
        run = torch.searchsorted(ends, slot, right=True)
        inside = run < ends.shape[-1]
        run = run.clamp(max=ends.shape[-1] - 1)
        offset = slot - (ends - self.run_length).gather(-1, run)
        token = torch.where(inside, self.run_start.gather(-1, run) + offset, -1)
        if self.visible.counts is not None and self.visible.mask is not None:
            seen = self.visible.mask.any(1)[:, None].expand(-1, token.shape[1], -1, -1)
            token = torch.where(seen.gather(-1, token.clamp(min=0)), token, -1)
        return token

    def token_mask(self) -> Tensor:
        """Whether each slot is read, sinks and recent tokens included: bool [B, Hkv, Tq, L]."""
        token = self.tokens()
        read = torch.zeros(
            *token.shape[:3], self.visible.kv_len + 1, dtype=torch.bool, device=token.device
        )
        read.scatter_(-1, torch.where(token < 0, self.visible.kv_len, token), True)
        return read[..., :-1]


def select(
    index: KVIndex,
    query: Tensor,
    scale: float,
    kv_len: int,
    mask: Tensor | None = None,
    budget: int | None = None,
    with_bound: bool = False,
    softcap: float | None = None,
) -> Selection:
    """Choose at most `budget` tokens per KV head for each position of `query` [B, Hq, Tq, D].

    Sinks, recent tokens and every visible token that is in no chunk are always read, even beyond
    the budget. `mask` is an SDPA mask over `kv_len` slots or None; `scale` multiplies q.k; `budget`
    None reads all visible tokens. With `with_bound` the selection carries what a certificate needs.
    `softcap` as in `attend`.
    """
    batch, _, query_len, _ = query.shape
    visible = visible_keys(mask, batch, query_len, kv_len, query.device)
    config = index.config
    sinks_end = torch.minimum(visible.first + config.sinks, visible.end)
    recent_start = torch.minimum(visible.end - config.recent, index.tail[:, None])
    recent_start = torch.maximum(recent_start, sinks_end)
    uncovered = visible.first < index.start[:, None]
    recent_start = torch.where(uncovered, sinks_end, recent_start)
    recent_length = (visible.end - recent_start).clamp(min=0)

    slots = int(index.chunk_count.max())
    begin = torch.maximum(index.chunk_start[:, None, :slots], sinks_end[..., None])
    end = (index.chunk_start + index.chunk_length)[:, None, :slots]
    end = torch.minimum(end, recent_start[..., None])
    length = torch.where(index.chunk_length[:, None, :slots] > 0, (end - begin).clamp(min=0), 0)
    held = torch.where(length > 0, visible.tokens_within(begin, begin + length), 0)

    always = (sinks_end - visible.first).clamp(min=0) + recent_length
    search = _Search(index, query, scale, softcap, held, visible.bias, begin, length)
    if config.policy == "streaming":
        taken = search.nothing()
        chosen = _columns(taken)
    elif budget is None or bool((held.sum(-1) + always <= budget).all()):
        taken = search.everything()
        chosen = _columns(taken)
    else:
        room = (budget - always).clamp(min=0)
        chosen, taken = search.best_chunks(room, config.overfetch * budget)
    bound = search.log_bound(~taken) if with_bound else None
    runs = _runs(visible, sinks_end, recent_start, recent_length, begin, length, chosen)
    return Selection(*runs, visible, scale, bound)


def _columns(taken: Tensor) -> Tensor:
    """Columns set in bool [..., N], in order, -1 where there are fewer: int64 [..., M]."""
    count = int(taken.sum(-1).max()) if taken.numel() else 0
    order = torch.argsort((~taken).to(torch.uint8), dim=-1, stable=True)[..., :count]
    return torch.where(taken.gather(-1, order), order, -1)


def _runs(
    visible: Visible,
    sinks_end: Tensor,
    recent_start: Tensor,
    recent_length: Tensor,
    begin: Tensor,
    length: Tensor,
    chosen: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sinks, chosen chunks and recent tokens as runs: (start, length), int64 [B, Hkv, Tq, R]."""
    heads = chosen.shape[1]

    def per_head(value: Tensor) -> Tensor:
        return value[:, None, :, None].expand(-1, heads, -1, 1)

    column = chosen.clamp(min=0)
    pick = begin[:, None].expand(-1, heads, -1, -1).gather(-1, column)
    size = length[:, None].expand(-1, heads, -1, -1).gather(-1, column)
    start = (per_head(visible.first), pick, per_head(recent_start))
    sinks = (sinks_end - visible.first).clamp(min=0)
    count = (per_head(sinks), torch.where(chosen >= 0, size, 0), per_head(recent_length))
    return torch.cat(start, -1), torch.cat(count, -1)


class _Search:
    """One descent from coarse units over fine clusters to chunks, for all rows, heads and queries.

    `held`, int64 [B, Tq, C], is what each chunk holds beyond the tokens that are read anyway.
    """

    def __init__(
        self,
        index: KVIndex,
        query: Tensor,
        scale: float,
        softcap: float | None,
        held: Tensor,
        bias: Tensor | None,
        begin: Tensor,
        length: Tensor,
    ) -> None:
        batch, query_heads, self.query_len, head_dim = query.shape
        self.index, self.scale, self.bias = index, scale, bias
        self.softcap = softcap
        self.begin, self.length = begin, length
        self.heads, self.group = index.kv_heads, query_heads // index.kv_heads
        self.rows = query.float().reshape(batch, self.heads, self.group * self.query_len, head_dim)
        self.held = held[:, None].expand(-1, self.heads, -1, -1)
        self.chunks = index.chunks.resized(held.shape[-1])
        self.labels = index.chunk_cluster[:, :, : held.shape[-1]]

    def nothing(self) -> Tensor:
        """No chunk taken: bool [B, Hkv, Tq, C]."""
        return torch.zeros_like(self.held, dtype=torch.bool)

    def everything(self) -> Tensor:
        """Every chunk that holds something taken: bool [B, Hkv, Tq, C]."""
        return self.held > 0

    def best_chunks(self, room: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Chunks of most estimated mass within `room` tokens, int64 [B, Tq].

        Returns columns best first, int64 [B, Hkv, Tq, M], -1 for none, and bool [B, Hkv, Tq, C].
        In a large index units, then clusters are taken until they hold `quota` tokens, units four
        times that; a row whose chunks all fit takes all of them, whatever other rows need.
        """
        candidate = self.everything()
        if self.bias is None and candidate.shape[-1] > self.index.config.flat_chunks:
            fits = self.held.sum(-1, keepdim=True) <= room[:, None, :, None]
            candidate = self._descend(candidate, quota) | (candidate & fits)
        columns = _columns(candidate)
        if columns.shape[-1] == 0:
            return columns, self.nothing()
        score, tokens = self._chunk_scores(columns)
        rank = self._group_share(score, tokens)
        order, inside = take_by_rank(rank, tokens, room[:, None, :, None], whole=True)
        best = torch.where(inside, columns.gather(-1, order), -1)
        best = best[..., : int(inside.sum(-1).max())]
        taken = F.pad(self.nothing(), (0, 1))
        taken.scatter_(-1, torch.where(best < 0, self.held.shape[-1], best), True)
        return best, taken[..., :-1]

    def log_bound(self, unread: Tensor) -> Tensor:
        """Upper bound of log sum of exp(score) over the chunks `unread`: float32 [B, Hq, Tq]."""
        unit = self.index.cluster_unit.gather(2, self.labels)
        bound = self._score_bound(self.chunks)
        for nodes, label in ((self.index.clusters, self.labels), (self.index.units, unit)):
            above = self._score_bound(nodes)
            wide = label[:, :, None].expand(-1, -1, bound.shape[2], -1)
            bound = torch.minimum(bound, above.gather(-1, wide))
        bound = self._split(bound)
        if self.bias is not None:
            bound = bound + self._chunk_bias()
        tokens = torch.where(unread, self.held, 0)[:, :, None]
        total = (bound + log_count(tokens)).logsumexp(-1)
        return total.flatten(1, 2)

    def _log_estimate(self, nodes: Nodes) -> Tensor:
        """Estimated mean of exp(score) over each node, in logs: [B, Hkv, G * Tq, N]."""
        return capped(nodes.log_estimate(self.rows, self.scale), self.softcap)

    def _score_bound(self, nodes: Nodes) -> Tensor:
        """Upper bound of the scores of each node, a soft-cap applied to that of the raw ones."""
        return capped(nodes.score_bound(self.rows, self.scale), self.softcap)

    def _log_mass_floor(self, nodes: Nodes) -> Tensor:
        """Lower bound of the sum of exp(score) over each node, in logs.

        Jensen's inequality does not hold for capped scores, so the lowest score stands for all.
        """
        if self.softcap is None:
            return nodes.log_mass_floor(self.rows, self.scale)
        lowest = -nodes.score_bound(-self.rows, self.scale)
        return capped(lowest, self.softcap) + log_count(nodes.tokens)[:, :, None]

    def _split(self, scores: Tensor) -> Tensor:
        """[B, Hkv, G * Tq, N] -> [B, Hkv, G, Tq, N]."""
        return scores.unflatten(2, (self.group, self.query_len))

    def _descend(self, candidate: Tensor, quota: int) -> Tensor:
        """Narrow the candidate chunks through units and clusters: bool [B, Hkv, Tq, C]."""
        index = self.index
        held = torch.where(candidate, self.held, 0)
        if not bool((held.sum(-1) > quota).any()):
            return candidate
        by_cluster = _sum_into(held, self.labels, index.clusters.count)
        by_unit = _sum_into(by_cluster, index.cluster_unit, index.units.count)
        unit = self._shortlist(index.units, by_unit, 4 * quota)
        inside = unit.gather(-1, index.cluster_unit[:, :, None].expand_as(by_cluster))
        by_cluster = torch.where(inside, by_cluster, 0)
        chosen = self._shortlist(index.clusters, by_cluster, quota)
        return candidate & chosen.gather(-1, self.labels[:, :, None].expand_as(candidate))

    def _shortlist(self, nodes: Nodes, held: Tensor, quota: int) -> Tensor:
        """Nodes of most estimated mass, until they hold `quota` tokens: bool [B, Hkv, Tq, N]."""
        matters = self._not_negligible(nodes, held)
        score = self._split(self._log_estimate(nodes))
        rank = self._group_share(score, torch.where(matters, held, 0))
        order, inside = take_by_rank(rank, held, quota, whole=False)
        return torch.zeros_like(matters).scatter(-1, order, inside) & matters

    def _not_negligible(self, nodes: Nodes, held: Tensor) -> Tensor:
        """Nodes whose bound leaves room for a share of the mass that matters to any head.

        The mass to compare with is bounded from below over nodes that are wholly visible.
        """
        bound = self._split(self._score_bound(nodes)) + log_count(held)[:, :, None]
        floor = self._split(self._log_mass_floor(nodes))
        whole = (held == nodes.tokens[:, :, None]) & (held > 0)
        floor = floor.masked_fill(~whole[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
        threshold = floor + math.log(NEGLIGIBLE_SHARE / max(nodes.count, 1))
        return (~(bound < threshold)).any(2) & (held > 0)  # a NaN proves nothing

    def _chunk_scores(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the chunks `columns` [B, Hkv, Tq, M]: [B, Hkv, G, Tq, M]; their tokens."""
        column = columns.clamp(min=0)
        tokens = torch.where(columns >= 0, self.held.gather(-1, column), 0)
        if self.query_len == 1 and column.shape[-1] < self.chunks.count // 2:
            nodes = self.chunks.gather(column[:, :, 0])
            score = self._split(self._log_estimate(nodes))
        else:
            score = self._split(self._log_estimate(self.chunks))
            score = score.gather(-1, column[:, :, None].expand(-1, -1, self.group, -1, -1))
        if self.bias is not None:
            bias = self._chunk_bias()
            wide = column[:, :, None].expand(-1, -1, self.group, -1, -1)
            score = score + bias.expand(-1, self.heads, self.group, -1, -1).gather(-1, wide)
        return score, tokens

    def _chunk_bias(self) -> Tensor:
        """Largest bias within each chunk: [B, 1 or Hkv, 1 or G, Tq, C]."""
        assert self.bias is not None
        offset = torch.arange(self.index.config.chunk[1], device=self.begin.device)
        slot = (self.begin[..., None] + offset).clamp(max=self.bias.shape[-1] - 1)
        wide = slot.flatten(2)[:, None].expand(-1, self.bias.shape[1], -1, -1)
        bias = self.bias.float().gather(-1, wide).unflatten(-1, slot.shape[2:])
        bias = bias.masked_fill((offset >= self.length[..., None])[:, None], -torch.inf).amax(-1)
        shape = (1, 1) if bias.shape[1] == 1 else (self.heads, self.group)
        return bias.unflatten(1, shape)

    def _group_share(self, score: Tensor, tokens: Tensor) -> Tensor:
        """Log of the mean softmax share over a group's heads: [B, Hkv, Tq, N]; -inf without tokens.

        `score` is [B, Hkv, G, Tq, N], the estimated mean exp(score) of each node in logs.
        """
        mass = (score + log_count(tokens)[:, :, None]).nan_to_num(nan=torch.inf)
        total = mass.logsumexp(-1, keepdim=True)
        share = torch.where(total.isfinite(), mass - total, mass)
        return share.logsumexp(2)


def take_by_rank(
    rank: Tensor, tokens: Tensor, quota: Tensor | int, whole: bool
) -> tuple[Tensor, Tensor]:
    """Order nodes by `rank` [..., N], best first, and take a prefix within `quota` tokens.

    Returns the order, int64 [..., N], and whether each place in it is taken, bool [..., N]. With
    `whole` the prefix holds at most `quota` tokens, else it ends with the node that reaches it.
    Equal ranks keep their order, so that a choice is repeatable.
    """
    order = rank.argsort(dim=-1, descending=True, stable=True)
    size = tokens.gather(-1, order)
    through = size.cumsum(-1)
    inside = through <= quota if whole else through - size < quota
    return order, inside & (size > 0)


def _sum_into(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Sums of `values` [B, Hkv, Tq, N] under `labels` [B, Hkv, N]: [B, Hkv, Tq, count]."""
    total = values.new_zeros(*values.shape[:3], count)
    return total.scatter_add(-1, labels[:, :, None].expand_as(values), values)
