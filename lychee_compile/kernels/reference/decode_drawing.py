"""Drawing of the tokens of a decode step: large shares are read, and small ones by chance.

Priority sampling, as in `drawing.py`. Shares are bins of an eighth of an octave, as kernels make
them. Kernels put all shares below 2^-20 into their first bin; here those have bins of their own, so
that tokens of hardly any share are not drawn in the place of others. The luck of a token depends on
its slot, on the KV head and on the step, so that what one step misses another may read. Tokens
65,536 apart have the same luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.drawing import log_weight, luck_of_number
from lychee_compile.kernels.sizes import LARGEST

LAST_BIN = (127 + LARGEST) * 8
"""Bin of the largest share, counted from the smallest number of float32."""
SALT = 0x9E3779B1
"""Odd factor by which a salt moves the numbers of slots."""
NEVER = -(2**40)
"""Order of what is not drawn."""
MIXERS = ((7, 0x2993), (5, 0xE877), (9, 0x0235))
"""Shifts and odd factors that mix 16 bits, found by C. Wellons's search (hash16_xm3)."""


def salt_of(step: Tensor, kv_heads: int) -> Tensor:
    """Return a number for each KV head at the step `step`, int64 [B]: int64 [B, Hkv, 1, 1]."""
    head = torch.arange(kv_heads, device=step.device)
    return ((step.long()[:, None] * 64 + head) * SALT >> 16 & 0xFFFF)[..., None, None]


def luck_at(place: Tensor) -> Tensor:
    """Return how many bins luck raises a token by whose slot and salt add up to `place`: int32.

    Places count modulo 2^16. Their numbers are mixed one to one, so that each luck occurs as often
    among them as it is probable.
    """
    mixed = place.long() & 0xFFFF
    for shift, factor in MIXERS:
        mixed = (mixed ^ (mixed >> shift)) * factor & 0xFFFF
    return luck_of_number(mixed ^ (mixed >> 10))


def draw(
    rank: Tensor, slot: Tensor, candidate: Tensor, room: Tensor, salt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `room`, int64 [B, Hkv, Tq], of the candidates by the logarithms of their shares.

    `rank`, `slot` and `candidate` are [B, Hkv, Tq, N]; `salt` is int64 [B, Hkv, 1, 1]. Returns the
    places of what is drawn, the logarithm of how many candidates each stands for, float32, and
    which are real, each [B, Hkv, Tq, M]. A candidate that no head of its KV head sees is never
    drawn. Those whose shares are too small for a float fill the room that is left, the largest
    first.
    """
    rank = rank.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    share = rank.exp()
    entry = (share.view(torch.int32) >> 20).clamp(max=LAST_BIN) + 1
    priority = (entry + luck_at(slot + salt)).clamp(max=LAST_BIN + 1)
    priority = torch.where(candidate & (share > 0), priority, 0)
    most = min(int(room.max()) + 1, rank.shape[-1])
    # Equal priorities keep the order of their places.
    order = priority.long() * 2**32 - torch.arange(rank.shape[-1], device=rank.device)
    below = -(rank.view(torch.int32).long() & 0x7FFFFFFF)
    seen = candidate & (rank > -torch.inf)
    order = torch.where(priority > 0, order, torch.where(seen, below, NEVER))
    best, place = order.topk(most, -1)
    first = priority.gather(-1, place)
    number = torch.arange(most, device=rank.device)
    taken = (number < room[..., None]) & (best > NEVER)
    # The first that is not taken ends the choice; it is 0 if none that has a share is left.
    cut = torch.where(number == room[..., None], first, 0).amax(-1, keepdim=True)
    weight = log_weight(cut + 1, entry.gather(-1, place) + 1)  # the first bin is a share here
    return place, weight.masked_fill(~taken, 0), taken
