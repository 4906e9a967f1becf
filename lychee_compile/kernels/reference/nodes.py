"""Groups of keys as nodes, with an upper bound of their scores."""

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
    radius: Tensor
    """Radius of the ball, float32 [B, Hkv, N]: no key of the group is further from `mean`."""
    tokens: Tensor
    """Number of keys in the group, int64 [B, Hkv, N]."""

    def resized(self, count: int) -> Nodes:
        """Return the nodes with room for `count`, which are no fewer; new ones are empty."""
        more = count - self.mean.shape[2]
        return Nodes(
            F.pad(self.mean, (0, 0, 0, more)),
            F.pad(self.radius, (0, more)),
            F.pad(self.tokens, (0, more)),
        )

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
