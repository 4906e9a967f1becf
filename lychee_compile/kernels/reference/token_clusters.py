"""Spherical k-means over single keys: clusters of tokens, made of many keys at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS = 10
"""Most steps of the k-means, which ClusterKV runs until nothing moves."""
AT_A_TIME = 8192
"""Number of tokens compared with all centroids at a time, to bound the memory of clustering."""


def cluster_tokens(
    key: Tensor, label: Tensor, begin: Tensor, count: Tensor, size: int, taken: Tensor
) -> None:
    """Put the `count` keys from the slot `begin` on, int64 [B] each, into clusters of their own.

    Labels are written to `label`, int [B, Hkv, L]: they begin at `taken`, int64 [B, Hkv], and there
    is one for each `size` keys of `key` [B, Hkv, L, D].
    """
    offset = torch.arange(int(count.max()), device=key.device)
    used = (offset < count[:, None])[:, None]
    slot = torch.where(used[:, 0], begin[:, None] + offset, 0)
    wide = slot[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    groups = count.div(size, rounding_mode="floor").clamp(min=1)
    found = _spherical_kmeans(key.gather(2, wide).float(), used, groups) + taken[..., None]
    row, place = used[:, 0].nonzero(as_tuple=True)
    label[row, :, slot[row, place]] = found[row, :, place].to(label.dtype)


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
    wide = seed[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    centre = direction.gather(2, wide)
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
