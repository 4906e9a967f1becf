"""Spherical k-means over mean keys, batched over rows and heads, deterministic for a seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.runs import take_rows

ITERATIONS = 5
"""Number of Lloyd steps: ten choose no better (measured on keys of a model at 12k tokens)."""
SEGMENT = 256
"""Number of groups that are clustered together, so that the work is linear in all groups."""
COARSE = 64
"""Largest number of clusters by which more groups than a segment are ordered first."""
COARSE_ITERATIONS = 3
"""Number of Lloyd steps of that order: it need not be exact."""


def cluster(
    mean: Tensor, tokens: Tensor, per_group: int, most: int | None, seed: int
) -> tuple[Tensor, int]:
    """Cluster groups by direction, and return labels, int64 [B, Hkv, N], and the number of labels.

    `mean` [B, Hkv, N, D] are the mean keys of the groups, and `tokens`, int64 [B, Hkv, N], their
    numbers of keys; a group without keys is unused, and gets label 0. Means are compared by cosine,
    as LycheeCluster does (arXiv 2603.08453). They are centred first, since keys share a large
    common component. A cluster has `per_group` members on average. Without `most` it has at most
    twice as many; with `most` there are at most so many clusters, of any size. Labels are
    consecutive in each row and head.

    Without `most` the number of clusters grows with that of groups, and to compare all of one with
    all of the other would be quadratic. More groups than `SEGMENT` are therefore ordered by a
    coarse clustering, and clustered in segments of that order (cf. RetroInfer, arXiv 2505.02922,
    whose segments are neighbouring keys).
    """
    used = tokens > 0
    count = int(used.sum(-1).max()) if used.numel() else 0
    if count == 0:
        return torch.zeros_like(tokens), 1
    order = used.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]
    used, weight = used.gather(2, order), tokens.gather(2, order).float()[..., None]
    mean = take_rows(mean, order).nan_to_num(0.0, 0.0, 0.0)
    common = (weight * mean).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp(min=1)
    direction = F.normalize(mean - common, dim=-1)
    if most is not None or count <= SEGMENT:
        labels = _lloyd(direction, used, _groups(used, per_group, most), seed, ITERATIONS)
    else:
        labels = _by_segments(direction, used, per_group, seed)
    labels, found = _consecutive(labels, used, None if most is not None else 2 * per_group)
    return torch.zeros_like(tokens).scatter(2, order, labels), found


def _groups(used: Tensor, per_group: int, most: int | None) -> Tensor:
    """Return the number of clusters, int64 [B, Hkv], of the groups `used`, bool [B, Hkv, N]."""
    groups = (used.sum(-1) + per_group - 1).div(per_group, rounding_mode="floor")
    return groups.clamp(min=1, max=most)


def _by_segments(direction: Tensor, used: Tensor, per_group: int, seed: int) -> Tensor:
    """Return labels, int64 [B, Hkv, N], by k-means within segments of like directions."""
    heads, count = direction.shape[1], direction.shape[2]
    coarse = _lloyd(direction, used, _groups(used, SEGMENT, COARSE), seed, COARSE_ITERATIONS)
    order = torch.where(used, coarse, COARSE).argsort(dim=-1, stable=True)
    segments = -(-count // SEGMENT)
    room = segments * SEGMENT - count
    direction = F.pad(take_rows(direction, order), (0, 0, 0, room))
    direction = direction.unflatten(2, (segments, SEGMENT)).flatten(1, 2)
    used = F.pad(used.gather(2, order), (0, room)).unflatten(2, (segments, SEGMENT)).flatten(1, 2)
    labels = _lloyd(direction, used, _groups(used, per_group, None), seed, ITERATIONS)
    labels = labels.unflatten(1, (heads, segments))
    labels = labels + SEGMENT * torch.arange(segments, device=order.device)[:, None]
    return torch.zeros_like(order).scatter(2, order, labels.flatten(2)[..., :count])


def _lloyd(direction: Tensor, used: Tensor, groups: Tensor, seed: int, iterations: int) -> Tensor:
    """Return labels, int64 [B, Hkv, N], of unit vectors `direction` [B, Hkv, N, D] by k-means.

    `groups`, int64 [B, Hkv], is the number of labels for the vectors `used`, bool [B, Hkv, N].
    """
    count, members = int(groups.max()), used.sum(-1)
    slot = torch.arange(count, device=direction.device)
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(count, generator=generator, device="cpu").to(direction.device)
    spacing = members[..., None] / groups[..., None]
    first = ((slot + jitter) * spacing).long().clamp(max=direction.shape[2] - 1)
    centre = take_rows(direction, first)
    idle = slot >= groups[..., None]
    any_idle = bool(idle.any())
    weighted = torch.where(used[..., None], direction, 0).flatten(0, 2)
    lot = count * torch.arange(members.numel(), device=slot.device).view(*members.shape, 1)
    labels = torch.zeros(used.shape, dtype=torch.int64, device=direction.device)
    for step in range(iterations):
        likeness = direction @ centre.transpose(-1, -2)
        if any_idle:
            likeness = likeness.masked_fill_(idle[:, :, None], -torch.inf)
        updated = likeness.argmax(-1)
        done = step == iterations - 1 or torch.equal(updated, labels)
        labels = updated
        if done:
            break
        total = torch.zeros_like(centre).flatten(0, 2)
        total = total.index_add_(0, (labels + lot).flatten(), weighted).view_as(centre)
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
