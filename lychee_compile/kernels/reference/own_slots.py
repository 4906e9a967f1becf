"""Slots of each query's own: requests that are packed into one row see few slots of it each.

To score every slot for every query would cost as much as dense attention, which reads each key once
for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lychee_compile.kernels.reference.question import Question

MOST_ROWS = 64
"""Largest number of query positions, over all batch rows, that are looked at one by one."""
FEW = 2
"""The slots of a query are few if they are at most 1 / FEW of all."""


@dataclass(frozen=True)
class OwnSlots:
    """Slots that each query position may choose from."""

    slot: Tensor
    """Slots in order, int64 [B, Tq, M]; filled up with 0."""
    count: Tensor
    """Number of them, int64 [B, Tq]."""

    @property
    def held(self) -> Tensor:
        """Entries of `slot` that do not fill up, bool [B, Tq, M]."""
        return torch.arange(self.slot.shape[-1], device=self.slot.device) < self.count[..., None]


def own_slots(question: Question) -> OwnSlots | None:
    """Return the slots of each query's own; None if they are not few, or heads differ in them."""
    mask = question.visible.mask
    several = question.query_len > 1 and mask is not None and mask.shape[1] == 1
    if not several or question.visible.bias is not None:
        return None
    candidates = question.candidates()
    rows = candidates.flatten(0, 1)
    count = rows.sum(-1)
    if len(rows) > MOST_ROWS or FEW * int(count.max()) > rows.shape[1]:
        return None
    slot = pad_sequence([row.nonzero().flatten() for row in rows], batch_first=True)
    shape = candidates.shape[:2]
    return OwnSlots(slot.unflatten(0, shape), count.unflatten(0, shape))
