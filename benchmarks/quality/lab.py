"""One KV head of a captured attention, and the quality of a choice of its tokens or chunks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lychee_compile.kernels.reference.chunking import cut_chunks

SINKS, RECENT, CHUNK = 16, 64, (8, 16)
"""Tokens that are always read at the begin and at the end; least and most tokens of a chunk."""


@dataclass(frozen=True)
class Lab:
    """One KV head of one attention: its keys, the queries over them, and the dense softmax."""

    query: Tensor
    """Queries of the head's group, [G, T, D]."""
    key: Tensor
    """Keys [L, D]."""
    value: Tensor
    """Values [L, Dv]."""
    positions: Tensor
    """Slot of each query's token, int64 [T]."""
    strength: Tensor
    """Strength of the boundary after each token, uint8 [L]."""
    scale: float
    budget: int

    @cached_property
    def score(self) -> Tensor:
        """Scores [G, T, L]; -inf for keys that a query does not see."""
        seen = torch.arange(len(self.key)) <= self.positions[:, None]
        return (self.scale * self.query @ self.key.T).masked_fill(~seen, -torch.inf)

    @cached_property
    def free(self) -> Tensor:
        """True for keys that may be chosen, bool [T, L]."""
        slot = torch.arange(len(self.key))
        return (slot >= SINKS) & (slot <= self.positions[:, None] - RECENT)

    @cached_property
    def chunks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys of each chunk [C, M, D], true for those in it [C, M], and their slots [C, M]."""
        length = torch.tensor([len(self.key)])
        starts, sizes = cut_chunks(self.strength[None], torch.tensor([0]), length, CHUNK)
        offset = torch.arange(CHUNK[1])
        valid = offset < sizes[0, :, None]
        slot = (starts[0, :, None] + offset).clamp(max=len(self.key) - 1)
        return self.key[slot], valid, slot

    def read_tokens(self, estimate: Tensor) -> tuple[float, float]:
        """Return (mass, error) of the best tokens by estimated scores [G, T, L]."""
        share = self._share(estimate.masked_fill(~self.free, -torch.inf))
        best = share.topk(self.budget - SINKS - RECENT, -1).indices
        return self._result(torch.zeros_like(self.free).scatter(-1, best, True) & self.free)

    def read_chunks(self, mean_score: Tensor) -> tuple[float, float]:
        """Return (mass, error) of the best chunks by estimated log mean exp(score) [G, T, C]."""
        _, valid, slot = self.chunks
        count = (self.free[:, slot] & valid).sum(-1)
        rank = self._share(mean_score + count.float().log())
        order = rank.argsort(-1, descending=True)
        size = count.gather(-1, order)
        fits = (size.cumsum(-1) <= self.budget - SINKS - RECENT) & (size > 0)
        chosen = torch.zeros_like(fits).scatter(-1, order, fits)
        read = torch.zeros_like(self.free)
        read.scatter_(-1, slot.flatten().expand(len(read), -1), self._spread(chosen, valid))
        return self._result(read & self.free)

    def pooled(self, estimate: Tensor) -> Tensor:
        """Return token scores [G, T, L] as log mean exp of each chunk [G, T, C]."""
        _, valid, slot = self.chunks
        return log_mean(estimate[..., slot], valid)

    def _share(self, log_mass: Tensor) -> Tensor:
        return (log_mass - log_mass.logsumexp(-1, keepdim=True)).logsumexp(0)

    def _spread(self, chosen: Tensor, valid: Tensor) -> Tensor:
        return (chosen[..., None] & valid).flatten(1)

    def _result(self, read: Tensor) -> tuple[float, float]:
        seen = self.score > -torch.inf
        weight = self.score.softmax(-1) * (read | (seen[0] & ~self.free))
        mass = weight.sum(-1)
        dense = self.score.softmax(-1) @ self.value
        output = weight @ self.value / mass[..., None]
        error = (output - dense).norm(dim=-1) / dense.norm(dim=-1)
        return float(mass.mean()), float(error.mean())


def log_mean(scores: Tensor, valid: Tensor) -> Tensor:
    """Return the log of the mean exp over the `valid` entries of the last axis."""
    total = scores.masked_fill(~valid, -torch.inf).logsumexp(-1)
    return total - valid.sum(-1).float().log()
