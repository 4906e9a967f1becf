"""ClusterKV: single tokens clustered by the direction of their keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, Runs, group_mass

TOKENS_PER_CLUSTER = 80
"""Mean number of tokens in a cluster of the prompt, as in the paper."""
WINDOW = 320
"""Number of new tokens that are clustered together, as in the paper."""
ITERATIONS = 10
"""Most steps of the k-means, which the paper runs until nothing moves."""
AT_A_TIME = 8192
"""Number of tokens compared with all centroids at a time, to bound the memory of clustering."""


class ClusterKVIndex(KVIndex):
    """ClusterKV (arXiv 2412.03213): clusters of tokens by cosine, ranked by their centroid.

    Each KV head clusters the tokens behind the first 16 (`sinks`) by k-means, one cluster per 80
    tokens. Keys are compared by cosine; the centroid is the mean of the keys. Clusters are ranked
    by q.centroid and read whole, best first; the last is cut to the budget, its first tokens kept.
    New tokens are always read until there are 320. Then they become 4 clusters of their own; older
    clusters never change. The first two layers stay dense.

    Not as in the paper: query heads that share a KV head choose together, by the mean of their
    softmax shares over clusters (one head ranks as the paper does). Waiting tokens count towards
    the budget. k-means starts from tokens spread evenly, so that it is repeatable. After a rewind
    the tokens that are left keep their clusters, with the mean of what is left.
    """

    dense_layers = 2
    tokens_per_cluster = TOKENS_PER_CLUSTER
    window = WINDOW

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.centroid = torch.zeros(batch, kv_heads, 0, head_dim, device=device)
        """Mean key of each cluster, float32 [B, Hkv, C, D]."""
        self.cluster = torch.zeros(batch, kv_heads, 0, dtype=torch.int64, device=device)
        """The cluster of the token in each slot, int64 [B, Hkv, N]; -1 for none."""
        self.stale = torch.zeros_like(self.start, dtype=torch.bool)
        """Rows whose centroids still count forgotten tokens, bool [B]."""

    @property
    def always_read(self) -> tuple[int, int]:
        """Sinks, and the query's own token; tokens in no cluster yet are read besides."""
        return self.config.sinks, 1

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Cluster a prompt, or the tokens since the last clusters once there are enough."""
        self.end = end.clone()
        if bool(self.stale.any()):
            self._recentre(key)
        first = self.start + self.config.sinks
        begin = torch.maximum(self.tail, first)
        enough = torch.where(self.tail > first, self.window, self.tokens_per_cluster)
        due = end - begin >= enough
        if bool(due.any()):
            self._cluster(key, begin, torch.where(due, end - begin, 0))
            self.tail = torch.where(due, end, self.tail)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on."""
        slot = torch.arange(self.cluster.shape[2], device=self.device)
        self.cluster = self.cluster.masked_fill((slot >= keep[:, None])[:, None], -1)
        self.stale = self.stale | (keep < self.tail)
        super().truncate(keep)

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Move `slots`, int64 [B, T], to the clusters most like their new keys; -1 is none."""
        for slot in slots.unbind(1):
            self._move(key, slot)

    def close(self, key: Tensor, rows: Tensor) -> None:
        """Add the waiting tokens of the rows `rows`, bool [B], to the clusters most like them."""
        first = torch.maximum(self.tail, self.start + self.config.sinks)
        waiting = torch.where(rows & (self._count() > 0), self.end - first, 0)
        self._reserve(int(self.end.max()), 0)
        for offset in range(int(waiting.max())):
            self._move(key, torch.where(offset < waiting, first + offset, -1))
        self.tail = torch.where(waiting > 0, self.end, self.tail)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        self.cluster = self.cluster.masked_fill(rows[:, None, None], -1)
        super().restart(rows, start)

    def choose(self, question: Question) -> Runs:
        """Return the tokens of the best clusters, as many as there is room for."""
        label, member = self._members(question)
        count = self.centroid.shape[2]
        tokens = label.new_zeros(*label.shape[:3], count).scatter_add(-1, label, member.long())
        score = question.scale * (question.query @ self.centroid.transpose(-1, -2))
        score = question.split(question.capped(score))
        score = score.masked_fill(tokens[:, :, None] == 0, -torch.inf)
        order = question.share(score).argsort(dim=-1, descending=True, stable=True)
        room = question.room
        if question.may_miss is not None:
            mass = question.share(group_mass(score, tokens))
            needed = question.needed(mass.gather(-1, order), mass)
            room = torch.minimum(room, (tokens.gather(-1, order) * needed).sum(-1))
        place = torch.empty_like(order).scatter_(
            -1, order, torch.arange(count, device=self.device).expand_as(order)
        )
        place = place.gather(-1, label).masked_fill(~member, count)
        return _first_tokens(place, member, room)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count a centroid for each cluster, and 4 bytes for the number of each token read."""
        return 2 * self.head_dim * (tokens // self.tokens_per_cluster) + 4 * min(tokens, budget)

    def _count(self) -> Tensor:
        """Return the number of clusters of each row, int64 [B]."""
        return F.pad(self.cluster.flatten(1), (1, 0), value=-1).amax(1) + 1

    def _move(self, key: Tensor, slot: Tensor) -> None:
        """Put the token in one `slot` of each row, int64 [B], into its nearest cluster; -1: none.

        A slot of a row without clusters, or among the sinks, is in none. The centroids of the
        clusters that lose or gain a token are taken anew from their tokens.
        """
        count = self._count()
        rows = (slot >= self.start + self.config.sinks) & (count > 0)
        if not bool(rows.any()):
            return
        slot = torch.where(rows, slot, 0)
        own = F.normalize(_at(key, slot[:, None]).float().nan_to_num(), dim=-1)
        likeness = (own @ F.normalize(self.centroid, dim=-1).transpose(-1, -2))[:, :, 0]
        number = torch.arange(self.centroid.shape[2], device=self.device)
        likeness = likeness.masked_fill((number >= count[:, None])[:, None], -torch.inf)
        place = slot[:, None, None].expand(-1, self.kv_heads, 1)
        old = self.cluster.gather(2, place)
        new = torch.where(rows[:, None, None], likeness.argmax(-1, keepdim=True), old)
        self.cluster.scatter_(2, place, new)
        for label in (old, new):
            self._recentre_one(key, torch.where(rows[:, None, None], label, -1))

    def _recentre_one(self, key: Tensor, label: Tensor) -> None:
        """Take the centroid of the cluster `label`, int64 [B, Hkv, 1], from its tokens; -1: none.

        A cluster that has lost all tokens keeps its centroid.
        """
        member = (self.cluster == label) & (label >= 0)
        size = member.sum(-1, keepdim=True)
        most = int(size.max())
        order = member.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        inside = torch.arange(most, device=self.device) < size
        wide = order[..., None].expand(*order.shape, self.head_dim)
        keys = torch.where(inside[..., None], key.gather(2, wide).float(), 0)
        mean = keys.sum(2, keepdim=True) / size.clamp(min=1)[..., None]
        at = label.clamp(min=0)[..., None].expand(-1, -1, -1, self.head_dim)
        mean = torch.where((size > 0)[..., None], mean, self.centroid.gather(2, at))
        self.centroid.scatter_(2, at, mean)

    def _members(self, question: Question) -> tuple[Tensor, Tensor]:
        """Return the cluster of each slot, 0 for none, and if it may be chosen: [B, Hkv, Tq, N]."""
        slots = min(self.cluster.shape[2], question.visible.kv_len)
        label = self.cluster[:, :, None, :slots].expand(-1, -1, question.query_len, -1)
        member = (label >= 0) & question.candidates()[:, None, :, :slots]
        return label.clamp(min=0), member

    def _cluster(self, key: Tensor, begin: Tensor, count: Tensor) -> None:
        """Make clusters of the `count` tokens from `begin` on, each int64 [B]."""
        offset = torch.arange(int(count.max()), device=self.device)
        used = (offset < count[:, None])[:, None]
        slot = torch.where(used[:, 0], begin[:, None] + offset, 0)
        keys = _at(key, slot).float()
        groups = count.div(self.tokens_per_cluster, rounding_mode="floor")
        label = _spherical_kmeans(keys, used, groups)
        taken = self._count()
        label = label + taken[:, None, None]
        self._reserve(int((begin + count).max()), int((taken + groups).max()))
        slots = self.cluster.shape[2]
        place = torch.where(used, slot[:, None], slots).expand_as(label)
        self.cluster = F.pad(self.cluster, (0, 1)).scatter(2, place, label)[:, :, :slots]
        means = _means(keys, torch.where(used, label, -1), self.centroid.shape[2])
        fresh = torch.arange(self.centroid.shape[2], device=self.device) >= taken[:, None]
        fresh = fresh & (count > 0)[:, None]
        self.centroid = torch.where(fresh[:, None, :, None], means, self.centroid)

    def _recentre(self, key: Tensor) -> None:
        """Take the centroids of stale rows from the tokens that are left in their clusters."""
        slots = min(self.cluster.shape[2], key.shape[2])
        label = self.cluster[:, :, :slots]
        means = _means(key[:, :, :slots].float(), label, self.centroid.shape[2])
        self.centroid = torch.where(self.stale[:, None, None, None], means, self.centroid)
        self.stale = torch.zeros_like(self.stale)

    def _reserve(self, slots: int, clusters: int) -> None:
        if slots > self.cluster.shape[2]:
            more = slots + slots // 4 - self.cluster.shape[2]
            self.cluster = F.pad(self.cluster, (0, more), value=-1)
        if clusters > self.centroid.shape[2]:
            more = clusters + clusters // 4 - self.centroid.shape[2]
            self.centroid = F.pad(self.centroid, (0, 0, 0, more))


def _spherical_kmeans(keys: Tensor, used: Tensor, groups: Tensor) -> Tensor:
    """Return the cluster, below `groups` int64 [B], of each key [B, Hkv, W, D]: int64 [B, Hkv, W].

    Keys that are `used`, bool [B, 1, W], come first, and they alone take part. Keys that are not
    finite have no direction: they go to the first cluster.
    """
    keys = keys.masked_fill(~(keys.isfinite().all(-1, keepdim=True) & used[..., None]), 0)
    direction = F.normalize(keys, dim=-1)
    number = torch.arange(int(groups.max()), device=keys.device)
    idle = (number >= groups[:, None])[:, None, None]
    spread = (number + 0.5) * (used.sum(-1) / groups.clamp(min=1)[:, None])
    seed = spread.long().clamp(max=keys.shape[2] - 1)
    centre = _at(direction, seed)
    label = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)
    for _ in range(ITERATIONS):
        blocks = direction.split(AT_A_TIME, dim=2)
        likeness = (block @ centre.transpose(-1, -2) for block in blocks)
        updated = torch.cat([x.masked_fill(idle, -torch.inf).argmax(-1) for x in likeness], -1)
        if torch.equal(updated, label):
            break
        label = updated
        mean = _means(keys, torch.where(used, label, -1), len(number))
        centre = torch.where(mean.any(-1, keepdim=True), F.normalize(mean, dim=-1), centre)
    return label


def _means(keys: Tensor, label: Tensor, count: int) -> Tensor:
    """Return the mean of the keys [B, Hkv, W, D] under each label below `count`; -1 is no label."""
    place = torch.where(label < 0, count, label)[..., None].expand_as(keys)
    total = keys.new_zeros(*keys.shape[:2], count + 1, keys.shape[3]).scatter_add(2, place, keys)
    size = torch.zeros_like(total[..., :1]).scatter_add(
        2, place[..., :1], torch.ones_like(keys[..., :1])
    )
    return (total / size.clamp(min=1))[:, :, :count]


def _at(vectors: Tensor, slot: Tensor) -> Tensor:
    """Return `vectors` [B, Hkv, L, D] at the slots int64 [B, W]: [B, Hkv, W, D]."""
    wide = slot[:, None, :, None].expand(-1, vectors.shape[1], -1, vectors.shape[3])
    return vectors.gather(2, wide)


def _first_tokens(place: Tensor, member: Tensor, room: Tensor) -> Runs:
    """Return the first `room` members by `place`, then by slot, each as a run of one token."""
    order = place.argsort(dim=-1, stable=True)[..., : int(room.max())]
    inside = torch.arange(order.shape[-1], device=order.device) < room[..., None]
    return order, (inside & member.gather(-1, order)).long()
