"""Tiles of queries in a prefill: which keys a tile sees, and which keys it always reads.

A tile is `QUERY_TILE` neighbouring query positions of one head. It always reads the keys that only
some of its queries see, the sinks, and the keys near its own positions. A policy chooses which of
the other keys the tile reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.nodes import Nodes, furthest, rounding_slack
from lychee_compile.kernels.reference.visible import seen_and_bias, with_four_axes
from lychee_compile.kernels.sizes import QUERY_TILE


def summarise(vectors: Tensor, size: int) -> Nodes:
    """Summarise every `size` neighbours of float32 [B, H, T, D]; the last node may have fewer."""
    batch, heads, tokens, _ = vectors.shape
    count = -(-tokens // size)
    blocks = F.pad(vectors, (0, 0, 0, count * size - tokens)).unflatten(2, (count, size))
    slot = torch.arange(count * size, device=vectors.device).view(count, size)
    valid = (slot < tokens).expand(batch, -1, -1)
    tokens_of = valid.sum(-1)[:, None].expand(-1, heads, -1)
    mean = blocks.sum(3) / tokens_of[..., None]
    return Nodes(mean, furthest(blocks, valid, mean), tokens_of)


def pair_bound(queries: Nodes, keys: Nodes, scale: float) -> Tensor:
    """Return an upper bound of scale q.k over all pairs from two nodes: [B, H, N, M].

    For balls of centres c and radii r, the triangle inequality and Cauchy-Schwarz give
    q.k <= c_q.c_k + |c_q| r_k + |c_k| r_q + r_q r_k. The bound is widened by what float32 rounding
    can hide. A negative scale bounds with -q.
    """
    centre = scale * (queries.mean @ keys.mean.transpose(-1, -2))
    query_length = torch.linalg.vector_norm(queries.mean, dim=-1)[..., None]
    key_length = torch.linalg.vector_norm(keys.mean, dim=-1)[:, :, None]
    query_radius, key_radius = queries.radius[..., None], keys.radius[:, :, None]
    reach = query_length * key_radius + (key_length + key_radius) * query_radius
    slack = rounding_slack(keys.mean.shape[-1])
    slack = slack * (query_length + 2 * query_radius) * (key_length + 2 * key_radius)
    bound = centre + abs(scale) * (reach + slack)
    return bound.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


class Sight:
    """The keys that each query of a prefill sees, and the biases of their scores."""

    def __init__(
        self,
        mask: Tensor | None,
        causal: bool,
        batch: int,
        query_len: int,
        kv_len: int,
        device: torch.device,
        order: Tensor | None = None,
    ) -> None:
        """Take an SDPA `mask`, bool or additive, or None, and with `causal` PyTorch's own too.

        `order`, int64 [T], are the positions of the queries, if they are not 0, 1, 2, ...
        """
        self.query_len, self.kv_len, self._causal = query_len, kv_len, causal
        self.slot = torch.arange(kv_len, device=device)
        self.order = order
        self._mask: Tensor | None = None
        self._bias: Tensor | None = None
        if mask is not None:
            seen, bias = seen_and_bias(with_four_axes(mask))  # before it is made large
            self._mask = seen.expand(batch, -1, query_len, kv_len)
            self._bias = None if bias is None else bias.expand_as(self._mask)

    def positions(self, begin: int, end: int) -> Tensor:
        """Return the positions of the queries [begin, end) in the sequence, int64."""
        if self.order is not None:
            return self.order[begin:end]
        return torch.arange(begin, end, device=self.slot.device)

    def rows(self, begin: int, end: int) -> Tensor:
        """Return what the queries [begin, end) see: bool [B or 1, Hq or 1, end - begin, L]."""
        position = self.positions(begin, end)
        seen = torch.ones(1, 1, len(position), 1, dtype=torch.bool, device=position.device)
        if self._mask is not None:
            seen = _rows_of(self._mask, position)
        if self._causal:
            seen = seen & (self.slot <= position[:, None])
        return seen.expand(-1, -1, -1, self.kv_len)

    def bias(self, begin: int, end: int) -> Tensor | None:
        """Return the biases of the queries [begin, end): [B, Hq or 1, end - begin, L].

        None: there is no bias.
        """
        return None if self._bias is None else _rows_of(self._bias, self.positions(begin, end))

    def near(self, begin: int, end: int, recent: int) -> Tensor:
        """Return the keys up to `recent` away from the queries [begin, end): bool [L].

        With an order these are the keys at the positions of the queries alone. If there are not as
        many queries as keys, they are other tokens: there are no such keys.
        """
        near = torch.zeros_like(self.slot, dtype=torch.bool)
        if self.query_len != self.kv_len:
            return near
        position = self.positions(begin, end)
        if self.order is not None:
            return near.index_fill(0, position, 1)
        return (self.slot >= position[0] - recent) & (self.slot <= position[-1] + recent)


def _rows_of(mask: Tensor, position: Tensor) -> Tensor:
    """Return the rows of a mask [B, H, T, L] at some positions, as a view if possible."""
    first = int(position[0])
    if len(position) == int(position[-1]) - first + 1 and bool((position.diff() == 1).all()):
        return mask[:, :, first : first + len(position)]
    return mask.index_select(2, position)


@dataclass(frozen=True)
class TileSight:
    """Keys that some tiles see; every field is [B or 1, Hq or 1, tiles, L]."""

    some: Tensor
    """Keys that at least one query of the tile sees, bool."""
    always: Tensor
    """Keys that the tile always reads, bool."""
    bias: Tensor | None
    """Mean bias over the queries of the tile, float32; None: no bias."""

    @property
    def candidates(self) -> Tensor:
        """Keys that may be chosen: every query of the tile sees them."""
        return self.some & ~self.always


def tile_sight(sight: Sight, begin: int, end: int, sinks: int, recent: int) -> TileSight:
    """Return what the tiles of the queries [begin, end) see; `begin` is a whole number of tiles.

    A tile always reads the keys that only some of its queries see. Of the keys that all of them
    see it always reads the first `sinks`, the last `recent`, and in self-attention those up to
    `recent` away from its own positions. A query that sees no key does not count.
    """
    some, always, biases = [], [], []
    for first in range(begin, end, QUERY_TILE):
        last = min(first + QUERY_TILE, end)
        seen = sight.rows(first, last)
        any_sees = seen.any(-2)
        all_see = (seen | ~seen.any(-1, keepdim=True)).all(-2) & any_sees
        some.append(any_sees)
        always.append(
            always_read(any_sees, all_see, sinks, recent, sight.near(first, last, recent))
        )
        bias = sight.bias(first, last)
        if bias is not None:
            known = torch.where(seen, bias.float(), 0)
            biases.append(known.sum(-2) / seen.sum(-2).clamp(min=1))
    mean = torch.stack(biases, -2) if biases else None
    return TileSight(torch.stack(some, -2), torch.stack(always, -2), mean)


def always_read(some: Tensor, every: Tensor, sinks: int, recent: int, near: Tensor) -> Tensor:
    """Return the keys that a tile always reads, bool [..., L].

    `some` and `every` are the keys that some queries of the tile see, and that all of them see;
    `near` are the keys near its own positions. All are bool [..., L].
    """
    through = every.cumsum(-1, dtype=torch.int32)
    first = through <= sinks
    last = through[..., -1:] - through + 1 <= recent
    return some & (near | ~every | first | last)
