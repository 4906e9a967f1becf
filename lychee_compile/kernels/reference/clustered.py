"""Clusters of chunks, level by level: what the plain form and the index of kernels have in common.

Labels say which cluster a group belongs to, int32 [B, Hkv, N]; -1: none yet. The numbers of a level
of clusters are its fields, and these: the tokens of a cluster, the first slot of its first token
and the slot after its last, int32 [B, Hkv, C] each. 0 tokens: there is no such cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.groups import Clusters, GroupSettings
from lychee_compile.kernels.reference.chunk_table import stored_dtype
from lychee_compile.kernels.reference.clustering import cluster
from lychee_compile.kernels.reference.level_values import summaries_by_label

REFIT = 256
"""Least number of tokens after which chunks that have come since are added to clusters."""
REFIT_PART = 16
"""Part of all tokens, as 1 / REFIT_PART, that may come before, if that is more."""
REBUILD = 2
"""Ratio of the chunks there are to those last clustered at which all are clustered anew."""

Columns = dict[str, Tensor]
"""The numbers of all clusters of a level: `tokens`, `first`, `end`, and the fields by name."""


def refit_after(end: int) -> int:
    """Return how many tokens may follow `end` ones before the next fit of clusters."""
    return max(REFIT, end // REFIT_PART)


def label_chunks(
    levels: Sequence[Level],
    mean: Tensor,
    tokens: Tensor,
    labels: Sequence[Tensor] | None,
    settings: GroupSettings,
) -> list[Tensor]:
    """Return the labels of the groups below each level of clusters, from coarse to fine.

    `mean` [B, Hkv, N, D] and `tokens` int64 [B, Hkv, N] are those of the chunks; 0 tokens: there is
    no such chunk. With the `labels` of before, chunks that have one keep it, and the others get
    that of the nearest cluster. Without, all are clustered.
    """
    found: list[Tensor] = []
    for place in reversed(range(len(levels))):
        if labels is None:
            label, count = _cluster(levels[place], mean, tokens, settings)
        elif place == len(levels) - 1:
            label = torch.where(tokens > 0, labels[place].long(), -1)
            count = max(int(label.max()) + 1, 1)
            label = _attach(mean, tokens, label, count)
        else:
            label = labels[place].long()[:, :, : tokens.shape[2]]
            count = max(int(label.max()) + 1, 1)
        found.insert(0, label)
        mean, tokens = _merged(mean, tokens, label, count)
    return found


def _cluster(
    level: Level, mean: Tensor, tokens: Tensor, settings: GroupSettings
) -> tuple[Tensor, int]:
    assert isinstance(level.groups, Clusters)
    most = settings.coarse_units if level.groups.limited else None
    label, count = cluster(mean, tokens, settings.cluster_chunks, most, settings.seed)
    return torch.where(tokens > 0, label, -1), count


def _attach(mean: Tensor, tokens: Tensor, label: Tensor, count: int) -> Tensor:
    """Give chunks without a label that of the cluster whose centred mean is most like theirs."""
    centre, weight = _merged(mean, torch.where(label >= 0, tokens, 0), label, count)
    share = weight.float()[..., None]
    common = (share * centre).sum(2, keepdim=True) / share.sum(2, keepdim=True).clamp(min=1)
    direction = F.normalize(centre - common, dim=-1).masked_fill(share == 0, 0)
    found = label.clone()
    waiting = ((label < 0) & (tokens > 0)).any(1).any(0).nonzero()[:, 0]
    for part in waiting.split(2048):
        likeness = (mean[:, :, part] - common) @ direction.transpose(-1, -2)
        likeness = likeness.masked_fill((weight == 0)[:, :, None], -torch.inf)
        nearest = torch.where((weight > 0).any(-1)[..., None], likeness.argmax(-1), -1)
        old = label[:, :, part]
        found[:, :, part] = torch.where((old < 0) & (tokens[:, :, part] > 0), nearest, old)
    return found


def _merged(mean: Tensor, tokens: Tensor, label: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return mean and number of tokens of each of `count` clusters, from those of their members."""
    place = torch.where((label < 0) | (tokens == 0), count, label)
    weight = tokens.float()[..., None]
    total = mean.new_zeros(*mean.shape[:2], count + 1, mean.shape[3])
    first = torch.arange(place.shape[:2].numel(), device=place.device).view(*place.shape[:2], 1)
    at = (first * (count + 1) + place).flatten()
    total.view(-1, mean.shape[3]).index_add_(0, at, (weight * mean).flatten(0, 2))
    total = total[:, :, :count]
    held = tokens.new_zeros(*tokens.shape[:2], count + 1).scatter_add(2, place, tokens)
    held = held[:, :, :count]
    return total / held.clamp(min=1)[..., None], held


def labels_of_slots(labels: Sequence[Tensor], chunk: Tensor) -> list[Tensor]:
    """Return the cluster of each slot at each level, int64 [B, Hkv, L]; -1: none.

    `labels` go from coarse to fine; `chunk`, int64 [B, L], is the chunk of each slot, or -1.
    """
    heads = labels[-1].shape[1]
    found: list[Tensor] = []
    below = chunk[:, None].expand(-1, heads, -1)
    for label in reversed(labels):
        below = torch.where(below >= 0, label.long().gather(2, below.clamp(min=0)), -1)
        found.insert(0, below)
    return found


def write_columns(
    level: Level, key: Tensor, label: Tensor, columns: Mapping[str, Tensor], first: Tensor
) -> None:
    """Write the numbers of clusters from the keys [B, Hkv, L, D] of their tokens.

    `label`, int64 [B, Hkv, L], is the cluster of each slot, -1 for none. Clusters from `first`,
    int64 [B, Hkv], on are written; older ones stay. `columns` are [B, Hkv, C, ...].
    """
    room = columns["tokens"].shape[2]
    slot = torch.arange(label.shape[2], device=key.device)
    ones = torch.ones_like(slot)
    for b, begins in enumerate(first.tolist()):
        for h, begin in enumerate(begins):
            if begin == room:
                continue
            own = torch.where(label[b, h] >= begin, label[b, h] - begin, room - begin)
            found: Columns = summaries_by_label(
                level, key[b, h, : len(slot)], own, room - begin, stored_dtype(columns)
            )
            found |= _extents(own, room - begin, ones, slot, slot + 1)
            _store(found, {name: held[b, h, begin:] for name, held in columns.items()})


def merge_columns(level: Level, parts: Columns, label: Tensor, columns: Columns) -> None:
    """Write the numbers of clusters, [B, Hkv, C, ...], from those of their members.

    The fields of the level must follow from moments. `parts` are the columns of the members, with
    their `mean` and `variance`, [B, Hkv, N, ...]; `label`, int64 [B, Hkv, N], is the cluster of
    each, -1 for none. Two keys, one standard deviation on either side of the mean, stand for all
    keys of a member: they have its mean and its variance.
    """
    room = columns["tokens"].shape[2]
    label = torch.where((label >= 0) & (parts["tokens"] > 0), label, room)
    names = ("tokens", "first", "end", "mean", "variance")
    for b, h in itertools.product(*map(range, label.shape[:2])):
        at = (label[b, h] < room).nonzero()[:, 0]
        at = at if len(at) else at.new_zeros(1)
        own = label[b, h, at]
        tokens, low, high, centre, variance = (parts[name][b, h, at] for name in names)
        deviation = variance.sqrt()
        keys = torch.cat((centre - deviation, centre + deviation))
        stored, weight = stored_dtype(columns), 0.5 * tokens.repeat(2)
        found: Columns = summaries_by_label(level, keys, own.repeat(2), room, stored, weight)
        found |= _extents(own, room, tokens, low, high)
        _store(found, {name: held[b, h] for name, held in columns.items()})


def _extents(own: Tensor, count: int, tokens: Tensor, first: Tensor, end: Tensor) -> Columns:
    """Return tokens, first slot and end of `count` clusters, from those of the parts of each.

    `own`, int64 [N], is the cluster of each part, `count` for none.
    """
    held = tokens.new_zeros(count + 1).index_add_(0, own, tokens)[:count]
    far = torch.full_like(held[:1], torch.iinfo(held.dtype).max).expand(count + 1)
    low = far.scatter_reduce(0, own, first, "amin")[:count]
    high = tokens.new_zeros(count + 1).scatter_reduce(0, own, end, "amax")[:count]
    return {"tokens": held, "first": torch.where(held > 0, low, 0), "end": high}


def _store(found: Columns, columns: Columns) -> None:
    """Copy the numbers of clusters, [C, ...], into columns of the same names."""
    for name, value in found.items():
        into = columns[name]
        into.copy_(value if into.dim() == value.dim() else value[..., 0])
