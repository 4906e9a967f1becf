"""Drawing of keys: large shares are read, and small ones by chance.

Priority sampling (Duffield, Lund and Thorup, 2007). A key of the share p has the priority p / u,
and u is its luck, between 0 and 1. The keys of highest priority are read. Let t be the highest
priority that is not read: a key with p >= t is read whatever its luck, and any other with the
probability p / t. It counts t / p times, so that sums over the keys that are read are those over
all keys on average. Shares and priorities are bins of an eighth of an octave, in integers, and
luck is that of a slot: all devices draw the same keys. Luck and weights serve prefill and decoding,
whose steps `decode_drawing.py` draws for; all else here is for a prefill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.config import DRAWN_FROM
from lychee_compile.kernels.sizes import LUCKIEST, WHOLE_SHARE

UNSEEN = 1
"""Bin of a key that no part of a tile sees."""
LEAST, LARGEST = 2, WHOLE_SHARE + 7
"""Bins of the smallest and of the largest share."""
EIGHTHS = (6996167, 5719293, 4548395, 3474676, 2490071, 1587185, 759234)
"""The mantissas of 2^(7/8), 2^(6/8), ... 2^(1/8) in float32, rounded up."""
MIXERS = (0x85EBCA6B, 0xC2B2AE35)
"""Odd factors that mix the bits of a slot's number (MurmurHash3)."""


@dataclass(frozen=True)
class Drawn:
    """The keys that tiles read, and how much each counts."""

    read: Tensor
    """Keys that are read, bool [B, Hq, tiles, L]."""
    log_weight: Tensor | None = None
    """Logarithm of how many keys each stands for, float32 [B, Hq, tiles, L]; None: each for itself.
    """

    def of_tile(self, tile: int) -> Drawn:
        """Return what one tile reads, [B, Hq, L]."""
        weight = None if self.log_weight is None else self.log_weight[:, :, tile]
        return Drawn(self.read[:, :, tile], weight)


def draws_keys(budget: float, kv_len: int) -> bool:
    """Return True if tiles have room enough to draw keys.

    `budget` is the number of keys that a tile reads; below 1, the share of the `kv_len` keys.
    """
    return min(budget * kv_len if budget < 1 else budget, kv_len) >= DRAWN_FROM


def luck_of(slot: Tensor) -> Tensor:
    """Return how many bins luck raises each slot by, int32 from 0 to `LUCKIEST`.

    A slot is raised by n or more with the probability 2^(-n / 8).
    """
    mixed = slot.long()
    for factor in MIXERS:
        mixed = (mixed ^ (mixed >> 16)) * factor & 0xFFFFFFFF
    return luck_of_number(mixed >> 16)


def luck_of_number(number: Tensor) -> Tensor:
    """Return the luck, int32, that numbers from 0 to 65535 stand for: u is that, over 2^16."""
    number = number.clamp(min=1).float().view(torch.int32)
    octaves = 127 + 15 - (number >> 23)
    eighths = sum((number & 0x7FFFFF < each).int() for each in EIGHTHS)
    return (8 * octaves + eighths).clamp(max=LUCKIEST)


def share_bins(log_share: Tensor) -> Tensor:
    """Return the bins, int32, of shares whose logarithms are given; -inf is a key nobody sees."""
    octaves = (log_share / math.log(2)).nan_to_num(nan=0.0, posinf=0.0, neginf=-1000.0)
    known = (octaves * 8 + WHOLE_SHARE).clamp(LEAST, LARGEST).floor().int()
    return known.masked_fill(log_share == -torch.inf, UNSEEN)


def log_weight(cut: Tensor, share: Tensor) -> Tensor:
    """Return the logarithm of what a key counts that is read, float32.

    `share` is the bin of its share, int32, and `cut` the bin of the highest priority that is not
    read, or 0. The key was read if its luck was `depth` or, among equals, `depth` + 1.
    """
    depth = cut - share
    weight = (depth + 0.5) * (math.log(2) / 8)
    return weight.masked_fill((depth < 0) | (share == UNSEEN), 0)


def covering_bin(share: Tensor, candidates: Tensor, coverage: float) -> Tensor:
    """Return the highest bin above which candidates hold a share `coverage` of all, or 0.

    `share`, int32 [..., L], are the bins of shares, each of which counts by its middle. The result
    is int32 [..., 1].
    """
    bins = torch.arange(LARGEST + 1, device=share.device)
    known = candidates & (share >= LEAST)
    counts = torch.zeros(*share.shape[:-1], LARGEST + 1, dtype=torch.float32, device=share.device)
    counts.scatter_add_(-1, share.long(), known.float())
    mass = counts * torch.exp2((bins - WHOLE_SHARE + 0.5) / 8)
    above = mass.flip(-1).cumsum(-1).flip(-1) - mass
    enough = above >= coverage * mass.sum(-1, keepdim=True)
    return torch.where(enough & (bins >= LEAST), bins, 0).amax(-1, keepdim=True).int()
