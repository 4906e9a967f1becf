"""Groups of keys as nodes, with an estimate and an upper bound of their softmax mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def rounding_slack(head_dim: int) -> float:
    """Bound the relative error of a float32 inner product or norm over `head_dim` terms."""
    return (head_dim + 8) * torch.finfo(torch.float32).eps


@dataclass
class Nodes:
    """N groups of keys per row and KV head. A node without tokens is an unused slot."""

    mean: Tensor
    """Mean key of the group and centre of its ball, float32 [B, Hkv, N, D]."""
    variance: Tensor
    """Variance of each key channel within the group, float32 [B, Hkv, N, D]."""
    radius: Tensor
    """Radius of the ball, float32 [B, Hkv, N]: no key of the group is further from `mean`."""
    tokens: Tensor
    """Number of keys in the group, int64 [B, Hkv, N]."""

    @staticmethod
    def empty(batch: int, heads: int, head_dim: int, device: torch.device) -> Nodes:
        """Return a record of no nodes."""
        vectors = torch.zeros(batch, heads, 0, head_dim, device=device)
        return Nodes(
            vectors,
            vectors.clone(),
            torch.zeros(batch, heads, 0, device=device),
            torch.zeros(batch, heads, 0, dtype=torch.int64, device=device),
        )

    @property
    def count(self) -> int:
        """Number of node slots per row and head, unused ones included."""
        return self.mean.shape[2]

    def resized(self, count: int) -> Nodes:
        """Return the nodes with room for `count`, new slots empty, or only the first `count`."""
        if count <= self.count:
            parts = (self.mean, self.variance, self.radius, self.tokens)
            return Nodes(*(part[:, :, :count] for part in parts))
        more = count - self.count
        return Nodes(
            F.pad(self.mean, (0, 0, 0, more)),
            F.pad(self.variance, (0, 0, 0, more)),
            F.pad(self.radius, (0, more)),
            F.pad(self.tokens, (0, more)),
        )

    def gather(self, chosen: Tensor) -> Nodes:
        """Return the nodes `chosen`, int64 [B, Hkv, M]."""
        vectors = chosen[..., None].expand(*chosen.shape, self.mean.shape[-1])
        return Nodes(
            self.mean.gather(2, vectors),
            self.variance.gather(2, vectors),
            self.radius.gather(2, chosen),
            self.tokens.gather(2, chosen),
        )

    def put(self, chosen: Tensor, nodes: Nodes, where: Tensor) -> None:
        """Replace the nodes `chosen`, int64 [B, Hkv, M], in place, where bool `where` is set."""
        old = self.gather(chosen)
        vectors = chosen[..., None].expand_as(old.mean)
        wide = where[..., None]
        self.mean.scatter_(2, vectors, torch.where(wide, nodes.mean, old.mean))
        self.variance.scatter_(2, vectors, torch.where(wide, nodes.variance, old.variance))
        self.radius.scatter_(2, chosen, torch.where(where, nodes.radius, old.radius))
        self.tokens.scatter_(2, chosen, torch.where(where, nodes.tokens, old.tokens))

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Return the log of the estimated mean of exp(scale q.k) over each node: [B, Hkv, R, N].

        `query` is float32 [B, Hkv, R, D]. The estimate is the second-order cumulant expansion with
        a diagonal covariance, scale q.m + scale^2 / 2 sum_i q_i^2 v_i. It is exact for Gaussian
        keys.
        """
        first = query @ self.mean.transpose(-1, -2)
        second = query.square() @ self.variance.transpose(-1, -2)
        return scale * first + (0.5 * scale * scale) * second

    def score_bound(self, query: Tensor, scale: float) -> Tensor:
        """Return an upper bound of scale q.k over the keys of each node: [B, Hkv, R, N].

        `query` is float32 [B, Hkv, R, D]. The triangle inequality gives q.k <= q.c + |q| r. The
        bound is widened by what float32 rounding can hide. A negative scale bounds with -q.
        """
        norm = torch.linalg.vector_norm(query, dim=-1)[..., None]
        centre = scale * (query @ self.mean.transpose(-1, -2))
        reach = abs(scale) * norm * self.radius[:, :, None]
        length = torch.linalg.vector_norm(self.mean, dim=-1)[:, :, None]
        slack = (
            rounding_slack(query.shape[-1])
            * abs(scale)
            * norm
            * (length + 2 * self.radius[:, :, None])
        )
        return (centre + reach + slack).nan_to_num(
            nan=torch.inf, posinf=torch.inf, neginf=-torch.inf
        )

    def log_mass_floor(self, query: Tensor, scale: float) -> Tensor:
        """Return the log of a lower bound of the sum of exp(scale q.k): [B, Hkv, R, N].

        By Jensen's inequality the bound is n exp(scale q.mean). `query` is float32 [B, Hkv, R, D].
        """
        return scale * (query @ self.mean.transpose(-1, -2)) + log_count(self.tokens)[:, :, None]


def furthest(keys: Tensor, valid: Tensor, centre: Tensor) -> Tensor:
    """Return the distance from `centre` [B, Hkv, M, D] that no key exceeds: [B, Hkv, M].

    `keys` is [B, Hkv, M, T, D]; keys that are not `valid`, bool [B, M, T], do not count.
    """
    distance = torch.linalg.vector_norm(keys - centre[:, :, :, None], dim=-1)
    reach = F.pad(distance.masked_fill(~valid[:, None], 0), (0, 1)).amax(-1)
    slack = rounding_slack(keys.shape[-1])
    return reach * (1 + slack) + slack * torch.linalg.vector_norm(centre, dim=-1)


def log_count(tokens: Tensor) -> Tensor:
    """Return the logarithm of a token count, -inf for no tokens."""
    return tokens.float().log()


def merge(children: Nodes, labels: Tensor, count: int) -> Nodes:
    """Return `count` parents of `children`; `labels`, int64 [B, Hkv, N], are their numbers.

    Means and variances follow the law of total variance. The radius reaches over the balls of the
    children: it covers every key, but one taken from the keys themselves would be smaller.
    """
    weight = children.tokens.float()
    tokens = _sum_by_label(weight[..., None], labels, count)
    share = tokens.clamp(min=1)
    mean = _sum_by_label(weight[..., None] * children.mean, labels, count) / share
    centred = children.mean - take_rows(mean, labels)
    spread = children.variance + centred.square()
    variance = _sum_by_label(weight[..., None] * spread, labels, count) / share
    used = children.tokens > 0
    reach = torch.linalg.vector_norm(centred, dim=-1) * (1 + rounding_slack(mean.shape[-1]))
    radius = max_by_label(torch.where(used, reach + children.radius, 0), labels, count)
    return Nodes(mean, variance, radius, tokens[..., 0].round().to(torch.int64))


def take_rows(vectors: Tensor, labels: Tensor) -> Tensor:
    """Return the rows of `vectors` [B, Hkv, N, D] at `labels` [B, Hkv, M]: [B, Hkv, M, D]."""
    return vectors.gather(2, labels[..., None].expand(*labels.shape, vectors.shape[-1]))


def max_by_label(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the largest of non-negative `values` [B, Hkv, N] by label: [B, Hkv, count]."""
    floor = values.new_zeros(*values.shape[:2], count)
    return floor.scatter_reduce(2, labels, values, "amax")


def _sum_by_label(values: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the sum of `values` [B, Hkv, N, D] by label: [B, Hkv, count, D]."""
    total = values.new_zeros(*values.shape[:2], count, values.shape[-1])
    return total.scatter_add(2, labels[..., None].expand_as(values), values)
