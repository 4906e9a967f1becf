"""The plain form of policies that read clusters of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.groups import TokenClusters
from lychee_compile.kernels.reference.clustered import Columns, write_columns
from lychee_compile.kernels.reference.question import Question, Runs
from lychee_compile.kernels.reference.token_clusters import cluster_tokens
from lychee_compile.kernels.reference.uneven_index import UnevenIndex, empty_columns, with_room


class TokenClusterIndex(UnevenIndex):
    """Clusters of tokens, read best first; the last is cut to the budget, its first tokens kept.

    Tokens from `tail` on wait for others to be clustered with, and are always read. A cluster stays
    as it was made when some of its tokens are forgotten.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        groups = self.stack.levels[0].groups
        assert isinstance(groups, TokenClusters)
        self.groups = groups
        self.columns: Columns = empty_columns(
            self.stack.levels[0], batch, kv_heads, head_dim, device
        )
        """Numbers of the clusters, see `clustered`."""
        self.label = torch.zeros(batch, kv_heads, 0, dtype=torch.int64, device=device)
        """Cluster of the token in each slot, int64 [B, Hkv, N]; -1: none."""
        self.taken = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)
        """Number of clusters so far, int64 [B, Hkv]."""

    @property
    def unread(self) -> Tensor:
        """First token of each row that is always read: it waits, or was just written."""
        return torch.maximum(torch.minimum(self.tail, self.indexed), self.start)

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Cluster a prompt, or the tokens since the last clusters once there are enough."""
        self.end = end.clone()
        first = self.start + self.always_read[0]
        begin = torch.maximum(self.tail, first)
        enough = torch.where(self.tail > first, self.groups.window, self.groups.size)
        due = end - begin >= enough
        if bool(due.any()):
            self._cluster(key, begin, torch.where(due, end - begin, 0))
            self.tail = torch.where(due, end, self.tail)

    def _cluster(self, key: Tensor, begin: Tensor, count: Tensor) -> None:
        """Make clusters of the `count` tokens from `begin` on, each int64 [B]."""
        last = int((begin + count).max())
        if last > self.label.shape[2]:
            self.label = F.pad(self.label, (0, last + last // 4 - self.label.shape[2]), value=-1)
        before = self.taken.clone()
        cluster_tokens(key, self.label, begin, count, self.groups.size, before)
        fresh = count.div(self.groups.size, rounding_mode="floor").clamp(min=1)
        self.taken = before + torch.where(count > 0, fresh, 0)[:, None]
        self.columns = with_room(self.columns, int(self.taken.max()))
        slots = min(last, key.shape[2])
        write_columns(self.stack.levels[0], key, self.label[:, :, :slots], self.columns, before)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on."""
        slot = torch.arange(self.label.shape[2], device=self.device)
        self.label = self.label.masked_fill((slot >= keep[:, None])[:, None], -1)
        super().truncate(keep)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        super().restart(rows, start)
        self.label = self.label.masked_fill(rows[:, None, None], -1)
        self.taken = self.taken.masked_fill(rows[:, None], 0)
        self.columns["tokens"] = self.columns["tokens"].masked_fill(rows[:, None, None], 0)

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Take the numbers of clusters that have one of `slots`, int64 [B, T], anew; -1: none.

        The tokens stay in their clusters, whatever their keys are now.
        """
        label = self.label[:, :, : key.shape[2]]
        wide = slots[:, None].expand(-1, self.kv_heads, -1)
        moved = torch.where(wide >= 0, label.gather(2, wide.clamp(min=0)), -1)
        touched = torch.zeros_like(label[..., :1]).expand(-1, -1, int(self.taken.max()) + 1)
        touched = touched.scatter(2, moved + 1, 1)[:, :, 1:].bool()
        if not bool(touched.any()):
            return
        columns = {name: torch.zeros_like(held) for name, held in self.columns.items()}
        write_columns(self.stack.levels[0], key, label, columns, torch.zeros_like(self.taken))
        for name, held in self.columns.items():
            mask = F.pad(touched, (0, held.shape[2] - touched.shape[2]))
            mask = mask if held.dim() == 3 else mask[..., None]
            self.columns[name] = torch.where(mask, columns[name], held)

    def close(self, key: Tensor, rows: Tensor) -> None:
        """Cluster the waiting tokens of the rows `rows`, bool [B], however few they are."""
        begin = torch.maximum(self.tail, self.start + self.always_read[0])
        count = torch.where(rows & (self.tail > self.start), self.end - begin, 0).clamp(min=0)
        if bool(count.any()):
            self._cluster(key, begin, count)
            self.tail = torch.where(count > 0, self.end, self.tail)

    def choose(self, question: Question) -> Runs:
        """Return the tokens of the best clusters, as many as there is room for."""
        rank, possible = self.ranks(question, self.stack.levels[0], self.columns, None)
        rank = rank.masked_fill(~possible, -torch.inf)
        order = rank.argsort(dim=-1, descending=True, stable=True)
        number = torch.arange(rank.shape[-1], device=rank.device).expand_as(order)
        place = torch.empty_like(order).scatter_(-1, order, number)
        slots = min(self.label.shape[2], question.visible.kv_len)
        label = self.label[:, :, None, :slots].expand(-1, -1, question.query_len, -1)
        at = label.clamp(min=0)
        member = (label >= 0) & question.candidates()[:, None, :, :slots]
        member = member & possible.gather(-1, at)
        size = torch.zeros_like(order).scatter_add(-1, at, member.long())
        needed = self.needed(question, self.stack.levels[0], self.columns, order, size)
        wanted = torch.empty_like(needed).scatter_(-1, order, needed)
        member = member & wanted.gather(-1, at)
        place = place.gather(-1, at).masked_fill(~member, rank.shape[-1])
        return _first_tokens(place, member, question.room)


def _first_tokens(place: Tensor, member: Tensor, room: Tensor) -> Runs:
    """Return the first `room` members by `place`, then by slot, each as a run of one token."""
    order = place.argsort(dim=-1, stable=True)[..., : int(room.max())]
    inside = torch.arange(order.shape[-1], device=order.device) < room[..., None]
    return order, (inside & member.gather(-1, order)).long()
