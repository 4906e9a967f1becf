"""Several askers of one tile, each with an order of its own, and the union of what they choose."""

from __future__ import annotations

import torch
from torch import Tensor


def places(rank: Tensor, counts: Tensor) -> Tensor:
    """Where each group of keys stands in the list of the asker that places it best.

    `rank` is float [..., askers, N], -inf for askers that do not ask; `counts`, int64 [..., N], the
    keys of a group that may be chosen. A place is how many of those stand ahead, int64 [..., N]:
    taking groups in that order takes equally many keys from the top of every list.
    """
    order = rank.argsort(dim=-1, descending=True, stable=True)
    held = counts[..., None, :].expand_as(order).gather(-1, order)
    ahead = torch.zeros_like(order).scatter(-1, order, held.cumsum(-1) - held)
    silent = (rank == -torch.inf).all(-1, keepdim=True)
    return ahead.masked_fill(silent, torch.iinfo(torch.int32).max).amin(-2)
