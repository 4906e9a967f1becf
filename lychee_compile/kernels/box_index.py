"""The index of one key cache on a device for Quest (arXiv 2406.10774): a box around each page."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.box_layout import BoxLayout, BoxState
from lychee_compile.kernels.slot_layout import PAGE


class BoxIndex:
    """Least and greatest keys of the full pages of one cache, in one flat tensor that kernels read.

    Steps keep it up to date; it is built here, from the keys that a prefill left. While the first
    number of its header is 0 it may not be trusted, and attention reads every key.
    """

    def __init__(self, layout: BoxLayout, device: torch.device) -> None:
        self.layout = layout
        self.state = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        self.parts: BoxState = layout.views(self.state)

    def distrust(self) -> None:
        """The keys may have changed: read all of them until the index is built anew."""
        self.parts.header[0].zero_()

    def build(self, key: Tensor, end: int) -> None:
        """Index the keys in the slots [0, end) of `key` [B, Hkv, L, D]."""
        full = end // PAGE
        if full:
            pages = key[:, :, : full * PAGE].unflatten(2, (full, PAGE))
            self.parts.least[:, :, :full] = pages.amin(3)
            self.parts.greatest[:, :, :full] = pages.amax(3)
        self.parts.header[0].fill_(1)
        self.parts.header[1].fill_(end)
