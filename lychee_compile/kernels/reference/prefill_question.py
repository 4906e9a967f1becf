"""The question to a prefill policy: which keys does each tile of queries read?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from lychee_compile.kernels.reference.drawing import (
    UNSEEN,
    Drawn,
    covering_bin,
    log_weight,
    luck_of,
    share_bins,
)
from lychee_compile.kernels.reference.key_groups import KeyGroups, keys_before, standing
from lychee_compile.kernels.reference.nodes import Nodes
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.tiles import TileSight, summarise
from lychee_compile.kernels.sizes import QUERY_TILE

Result = TypeVar("Result")


@dataclass(frozen=True)
class PrefillQuestion:
    """Consecutive tiles of queries, and the keys that may be chosen for them."""

    query: Tensor
    """Queries, float32 [B, Hq, T, D]; the last tile may have fewer than `QUERY_TILE` positions."""
    key: Tensor
    """Keys, float32 [B, Hkv, L, D]."""
    scale: float
    """Softmax scale: the factor of q.k."""
    softcap: float | None
    """Bound that scores are bent to, softcap tanh(score / softcap); None: no bound."""
    sight: TileSight
    """Keys that the tiles see."""
    room: Tensor
    """Number of keys that may be chosen, int64 [B, Hq, tiles]."""
    draws: bool = False
    """True if keys of small shares may be drawn by chance, so that those read stand for others.

    It is False if a certificate is asked for, and on a GPU if a function chooses in PyTorch."""
    coverage: float | None = None
    """Share of the estimated softmax over the candidates at which `draw` ends; None: the room."""
    facts: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    """Results of `once`; all questions of one prefill share them."""

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.room.shape[2]

    @property
    def candidates(self) -> Tensor:
        """Keys that may be chosen, bool [B, Hq, tiles, L]."""
        return self.sight.candidates.expand(*self.room.shape, -1)

    def parts(self, positions: int) -> Nodes:
        """Summarise every `positions` queries, a divisor of `QUERY_TILE`.

        The nodes are [B, Hq, tiles * parts, D]; those behind the last query hold no tokens.
        """
        count = self.tiles * QUERY_TILE // positions
        return summarise(self.query, positions).resized(count)

    def once(self, make: Callable[..., Result], *given: int) -> Result:
        """Return `make(key, *given)`, which is worked out once for all tiles of a prefill."""
        if (make, given) not in self.facts:
            self.facts[make, given] = make(self.key, *given)
        result: Result = self.facts[make, given]
        return result

    def key_nodes(self, size: int) -> Nodes:
        """Summarise every `size` keys as a node, for every query head: [B, Hq, N, D]."""
        nodes = self.once(summarise, size)
        return Nodes(*(self.per_query_head(getattr(nodes, each.name)) for each in fields(Nodes)))

    def per_query_head(self, of_keys: Tensor) -> Tensor:
        """Repeat values [B, Hkv, ...] for every query head that reads them: [B, Hq, ...]."""
        return of_keys.repeat_interleave(self.room.shape[1] // of_keys.shape[1], dim=1)

    def products(self, vectors: Tensor, of_keys: Tensor) -> Tensor:
        """Multiply vectors [B, Hq, N, D] with those of their KV heads, [B, Hkv, M, D].

        The result is [B, Hq, N, M]. No vector of a KV head is repeated in memory.
        """
        heads, count = vectors.shape[1:3]
        grouped = vectors.unflatten(1, (of_keys.shape[1], -1)).flatten(2, 3)
        return (
            (grouped @ of_keys.mT).unflatten(2, (-1, count)).reshape(len(vectors), heads, count, -1)
        )

    def scores(self, vectors: Tensor) -> Tensor:
        """Score vectors [B, Hq, tiles * parts, D] against all keys: [B, Hq, tiles, parts, L].

        Scores are as the softmax sees them: soft-capped, biased, and -inf for keys that the tile
        does not see.
        """
        raw = self.scale * self.products(vectors, self.key)
        split = capped(raw, self.softcap).unflatten(2, (self.tiles, -1))
        if self.sight.bias is not None:
            split = split + self.sight.bias[:, :, :, None]
        return split.masked_fill(~self.sight.some[:, :, :, None], -torch.inf)

    def take(self, rank: Tensor) -> Tensor:
        """Return the best `room` candidates by `rank` [B, Hq, tiles, L], bool.

        Of candidates of equal rank the first are taken.
        """
        rank = rank.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.finfo(rank.dtype).min)
        rank = rank.masked_fill(~self.candidates, -torch.inf)
        most = max(1, min(int(self.room.max()), rank.shape[-1]))
        best = rank.topk(most, dim=-1).values
        last = (self.room.clamp(1, most) - 1)[..., None]
        least = best.gather(-1, last)
        above, level = rank > least, rank == least
        left = self.room[..., None] - above.sum(-1, keepdim=True)
        taken = above | (level & (level.cumsum(-1, dtype=torch.int32) <= left))
        return taken & self.candidates & (self.room > 0)[..., None]

    def draw(self, log_share: Tensor) -> Drawn:
        """Return the candidates that are read by their log shares [B, Hq, tiles, L], see `drawing`.

        As many as there is room for are read. With a coverage they are fewer if the keys that are
        read whatever their luck hold so much; then a whole bin of priorities ends the choice.
        Without `draws` the candidates of the largest shares are taken.
        """
        if not self.draws:
            return Drawn(self.take(log_share))
        share = share_bins(log_share)
        luck = luck_of(torch.arange(share.shape[-1], device=share.device))
        priority = torch.where(share == UNSEEN, share, share + luck)
        read = self.take(priority.float())
        left = priority.masked_fill(read | ~self.candidates, 0)
        cut = left.amax(-1, keepdim=True)
        if self.coverage is not None:
            enough = covering_bin(share, self.candidates, self.coverage)
            ends = (enough > cut) & (cut > 0)
            cut = torch.where(ends, enough, cut)
            read = read & ~(ends & (priority <= cut))
        return Drawn(read, log_weight(cut, share).masked_fill(~read, 0))

    def take_groups(self, rank: Tensor, groups: KeyGroups) -> Tensor:
        """Return the first `room` candidates of groups in falling order of `rank`, bool.

        `rank` is [B, Hq, tiles, N]. Of groups of equal rank the first are taken. The result, [B,
        Hq, tiles, L], is that of `take` if all keys of a group had its rank.
        """
        before = keys_before(self.sight.candidates)
        ahead = standing(rank, groups.count(before))
        place = before[..., :-1] + groups.spread(groups.offsets(ahead, before))
        return (place < self.room[..., None]) & self.candidates

    def spread(self, of_groups: Tensor, size: int) -> Tensor:
        """Repeat values [..., groups], one for every `size` keys in order: [..., L]."""
        return of_groups.repeat_interleave(size, dim=-1)[..., : self.key.shape[2]]


PrefillChoice = Callable[[PrefillQuestion], Tensor | Drawn]
"""Policy of a prefill: returns the candidates that each tile reads, bool [B, Hq, tiles, L].

It may return what `PrefillQuestion.draw` returns instead."""


def as_drawn(chosen: Tensor | Drawn) -> Drawn:
    """Return the answer of a policy as `Drawn`."""
    return chosen if isinstance(chosen, Drawn) else Drawn(chosen)
