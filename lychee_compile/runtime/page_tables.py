"""Pages that a row had at the last call, by which a page of another request is known as new."""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = 2**31 - 1
"""Slot behind all others."""


class PageTable:
    """A copy of a table [B, P] that lists the pages of each row."""

    def __init__(self, table: Tensor, size: int) -> None:
        """Copy `table`; a page has `size` tokens."""
        self._entries, self._size = table.clone(), size

    def first_moved(self, table: Tensor) -> Tensor:
        """Return the first slot of each row that lies in another page now, int64 [B].

        It is `NEVER` if there is none, and 0 in a row that was not there. Pages that are listed
        behind those of before are no change. Nothing waits for the device.
        """
        rows, pages = (min(sizes) for sizes in zip(table.shape, self._entries.shape, strict=True))
        moved = table[:rows, :pages] != self._entries[:rows, :pages]
        slot = torch.arange(pages, device=table.device) * self._size
        first = table.new_zeros(len(table), dtype=torch.int64)
        found = torch.where(moved, slot, NEVER)
        first[:rows] = torch.nn.functional.pad(found, (0, 1), value=NEVER).amin(1)
        return first
