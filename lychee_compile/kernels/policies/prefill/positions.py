"""A union of choices: several rankings for one tile, and the groups that come first in any."""

from __future__ import annotations

import torch
from torch import Tensor


def places(rank: Tensor, counts: Tensor) -> Tensor:
    """Return the best place that each group of keys has in any of several rankings.

    `rank` is float [..., rankings, N], -inf throughout for a ranking that does not count; `counts`,
    int64 [..., N], are the keys of a group that may be chosen. A place is how many of those keys
    stand ahead, int64 [..., N]. Groups taken in the order of their places take equally many keys
    from the top of every ranking.
    """
    order = rank.argsort(dim=-1, descending=True, stable=True)
    sizes = counts[..., None, :].expand_as(order).gather(-1, order)
    ahead = torch.zeros_like(order).scatter(-1, order, sizes.cumsum(-1) - sizes)
    silent = (rank == -torch.inf).all(-1, keepdim=True)
    return ahead.masked_fill(silent, torch.iinfo(torch.int32).max).amin(-2)
