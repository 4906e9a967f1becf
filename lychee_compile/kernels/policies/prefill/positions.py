"""A union of choices: several rankings for one tile, and the groups that come first in any."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.key_groups import standing


def places(rank: Tensor, counts: Tensor) -> Tensor:
    """Return the best place that each group of keys has in any of several rankings.

    `rank` is float [..., rankings, N], -inf throughout for a ranking that does not count; `counts`,
    [..., N], are the keys of a group that may be chosen. A place is how many of those keys stand
    ahead, int32 [..., N]. Groups taken in the order of their places take equally many keys
    from the top of every ranking.
    """
    ahead = standing(rank, counts[..., None, :])
    silent = (rank == -torch.inf).all(-1, keepdim=True)
    return ahead.masked_fill(silent, torch.iinfo(torch.int32).max).amin(-2)
