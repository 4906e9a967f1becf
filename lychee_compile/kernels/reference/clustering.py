"""Spherical k-means over node means, batched over rows and heads, deterministic for a seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.nodes import Nodes

ITERATIONS = 10
"""Number of Lloyd steps. Labels of real keys stop changing earlier (measured on Gemma-3)."""
SEGMENT = 256
"""Number of nodes that are clustered together, so that the work is linear in all nodes."""
COARSE = 64
"""Largest number of groups by which more nodes than a segment are ordered first."""
COARSE_ITERATIONS = 3
"""Number of Lloyd steps of that order: it need not be exact."""
SPLIT_ITERATIONS = 3
"""Number of Lloyd steps when one group is split: it has few members."""


def cluster(children: Nodes, per_group: int, most: int | None, seed: int) -> tuple[Tensor, int]:
    """Group nodes by direction, and return labels, int64 [B, Hkv, N], and the number of groups.

    Means are compared by cosine, as LycheeCluster does (arXiv 2603.08453). They are centred first,
    since keys share a large common component. A group has `per_group` members on average. Without
    `most` it has at most twice as many; with `most` there are at most so many groups, of any size.
    Labels are consecutive in each row and head. Unused nodes get label 0.

    Without `most` the number of groups grows with that of nodes, and to compare all of one with all
    of the other would be quadratic. More nodes than `SEGMENT` are therefore ordered by a coarse
    clustering, and clustered in segments of that order.
    """
    used = children.tokens > 0
    weight = children.tokens.float()[..., None]
    common = (weight * children.mean).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(
        min=1
    )
    direction = F.normalize(children.mean - common, dim=-1)
    if most is not None or used.shape[-1] <= SEGMENT:
        labels = _lloyd(direction, used, _groups(used, per_group, most), seed, ITERATIONS)
    else:
        labels = _by_segments(direction, used, per_group, seed)
    return _consecutive(labels, used, None if most is not None else 2 * per_group)


def halves(children: Nodes) -> Tensor:
    """Split nodes into two groups of near means, and return labels 0 and 1: [B, Hkv, N].

    Neither group is empty if two nodes or more are used. 2-means begins with the node furthest from
    the common mean, and with the node furthest from that one.
    """
    used = children.tokens > 0
    mean, weight = children.mean, children.tokens.float()[..., None]
    common = (weight * mean).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)

    def furthest_from(centre: Tensor) -> Tensor:
        distance = (mean - centre).square().sum(-1).masked_fill(~used, -1)
        chosen = distance.nan_to_num(nan=torch.inf).argmax(-1, keepdim=True)
        return mean.gather(2, chosen[..., None].expand(*chosen.shape, mean.shape[-1]))

    first = furthest_from(common)
    second = furthest_from(first)
    side = torch.zeros(used.shape, dtype=torch.int64, device=mean.device)
    for _ in range(SPLIT_ITERATIONS):
        nearer = (mean - second).square().sum(-1) < (mean - first).square().sum(-1)
        side = nearer.long()
        one, other = weight * nearer[..., None], weight * ~nearer[..., None]
        first = (other * mean).sum(2, keepdim=True) / other.sum(2, keepdim=True).clamp(min=1)
        second = (one * mean).sum(2, keepdim=True) / one.sum(2, keepdim=True).clamp(min=1)
    alternate = used.long().cumsum(-1) % 2
    full = torch.where(used, side, 0).sum(-1, keepdim=True)
    lopsided = (full == 0) | (full == used.sum(-1, keepdim=True))
    return torch.where(lopsided, alternate, side)


def _groups(used: Tensor, per_group: int, most: int | None) -> Tensor:
    """Return the number of groups, int64 [B, Hkv], of the nodes `used`, bool [B, Hkv, N]."""
    groups = (used.sum(-1) + per_group - 1).div(per_group, rounding_mode="floor")
    return groups.clamp(min=1, max=most)


def _by_segments(direction: Tensor, used: Tensor, per_group: int, seed: int) -> Tensor:
    """Return labels, int64 [B, Hkv, N], by k-means within segments of nodes of like direction."""
    heads, count = direction.shape[1], direction.shape[2]
    coarse = _lloyd(direction, used, _groups(used, SEGMENT, COARSE), seed, COARSE_ITERATIONS)
    order = torch.where(used, coarse, COARSE).argsort(dim=-1, stable=True)
    segments = -(-count // SEGMENT)
    room = segments * SEGMENT - count
    wide = order[..., None].expand(*order.shape, direction.shape[-1])
    direction = F.pad(direction.gather(2, wide), (0, 0, 0, room))
    direction = direction.unflatten(2, (segments, SEGMENT)).flatten(1, 2)
    used = F.pad(used.gather(2, order), (0, room)).unflatten(2, (segments, SEGMENT)).flatten(1, 2)
    labels = _lloyd(direction, used, _groups(used, per_group, None), seed, ITERATIONS)
    labels = labels.unflatten(1, (heads, segments))
    labels = labels + SEGMENT * torch.arange(segments, device=order.device)[:, None]
    return torch.zeros_like(order).scatter(2, order, labels.flatten(2)[..., :count])


def _lloyd(direction: Tensor, used: Tensor, groups: Tensor, seed: int, iterations: int) -> Tensor:
    """Return labels, int64 [B, Hkv, N], of unit vectors `direction` [B, Hkv, N, D] by k-means.

    `groups`, int64 [B, Hkv], is the number of groups of the nodes `used`, bool [B, Hkv, N].
    """
    count, members = int(groups.max()), used.sum(-1)
    slot = torch.arange(count, device=direction.device)
    jitter = torch.rand(count, generator=torch.Generator().manual_seed(seed)).to(direction.device)
    spacing = members[..., None] / groups[..., None]
    first = ((slot + jitter) * spacing).long().clamp(max=direction.shape[2] - 1)
    centre = direction.gather(2, first[..., None].expand(*first.shape, direction.shape[-1]))
    idle = slot >= groups[..., None]
    weighted = torch.where(used[..., None], direction, 0)
    labels = torch.zeros(used.shape, dtype=torch.int64, device=direction.device)
    for _ in range(iterations):
        likeness = (direction @ centre.transpose(-1, -2)).masked_fill(idle[:, :, None], -torch.inf)
        updated = likeness.argmax(-1)
        if torch.equal(updated, labels):
            break
        labels = updated
        total = torch.zeros_like(centre).scatter_add(
            2, labels[..., None].expand_as(weighted), weighted
        )
        centre = torch.where(total.any(-1, keepdim=True), F.normalize(total, dim=-1), centre)
    return labels


def _consecutive(labels: Tensor, used: Tensor, fullest: int | None) -> tuple[Tensor, int]:
    """Renumber labels without gaps; split groups of more than `fullest` members in order."""
    unused = int(labels.max()) + 1
    ordered, order = torch.where(used, labels, unused).sort(dim=-1, stable=True)
    position = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)
    fresh = torch.ones_like(used)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    if fullest is not None:
        run_start = torch.where(fresh, position, 0).cummax(-1).values
        fresh |= (position - run_start) % fullest == 0
    fresh &= ordered < unused
    number = (fresh.cumsum(-1) - 1).clamp(min=0)
    number = torch.where(ordered < unused, number, 0)
    result = torch.zeros_like(labels).scatter(-1, order, number)
    return result, int(number.max()) + 1
