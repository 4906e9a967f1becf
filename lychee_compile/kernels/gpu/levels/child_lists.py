"""Lists of what is in each cluster, by which a step looks into those alone that it has chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def child_lists(label: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the groups of each cluster, for labels int64 [B, Hkv, N]; -1: a group is in none.

    The first result, int32 [B, Hkv, N], has all groups in the order of their clusters, and by
    number in each; those in none are last. The others, int32 [B, Hkv, clusters], are the place of
    the first group of each cluster among them, and their number.
    """
    place = torch.where(label < 0, clusters, label)
    order = place.argsort(dim=-1, stable=True)
    shape = (*label.shape[:2], clusters + 1)
    count = label.new_zeros(shape).scatter_add(-1, place, torch.ones_like(place))
    begin = count.cumsum(-1) - count
    found = (each.to(torch.int32) for each in (order, begin[..., :-1], count[..., :-1]))
    order, begin, count = found
    return order, begin, count


def first_open(label: Tensor, used: Tensor) -> Tensor:
    """Return the first group that is `used`, bool [B, Hkv, N], and in no cluster: [B, Hkv].

    If all are in one, the result is N. See `child_lists` for `label`.
    """
    number = torch.arange(label.shape[-1], device=label.device)
    waits = torch.where(used & (label < 0), number, label.shape[-1])
    return torch.nn.functional.pad(waits, (0, 1), value=label.shape[-1]).amin(-1)
