"""Strengths of the boundaries between cached tokens, while tokens arrive and are rewritten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.chunking import similarity_strengths
from lychee_compile.kernels.reference.loaded_tensor import row_of

COMPARED_AT_ONCE = 2048
"""Number of keys of a row that are compared at a time, so that they stay in the cache of a CPU."""


class StrengthTrack:
    """Boundary strength after each token of a batch of rows, uint8; larger is stronger.

    Strengths that token ids give are noted when the tokens are written. The others come from the
    similarity of neighbouring keys, or stay zero if `mode` is "fixed" or "tokens".
    """

    def __init__(self, batch: int, mode: str, device: torch.device) -> None:
        self.mode = mode
        self.strength = torch.zeros(batch, 0, dtype=torch.uint8, device=device)
        self.noted = torch.zeros(batch, 0, dtype=torch.bool, device=device)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row, in amortised constant time per token."""
        capacity = self.strength.shape[1]
        if tokens > capacity:
            more = max(tokens, capacity + capacity // 2) - capacity
            self.strength = F.pad(self.strength, (0, more))
            self.noted = F.pad(self.noted, (0, more))

    def note(self, positions: Tensor, strength: Tensor) -> None:
        """Note boundaries of `strength`, uint8, after the tokens at `positions`, int64 [B, T]."""
        if self.mode not in ("auto", "tokens"):
            return
        self.reserve(int(positions.max()) + 1)
        self.strength.scatter_(1, positions, strength)
        self.noted.scatter_(1, positions, True)

    def forget(self, keep: Tensor) -> None:
        """Drop the noted strengths from position `keep`, int64 [B], on."""
        position = torch.arange(self.noted.shape[1], device=keep.device)
        self.noted &= position < keep[:, None]

    def compare_keys(self, key: Tensor, begin: int, end: int, row: int | None = None) -> None:
        """Fill in strengths of the tokens [begin, end - 1) from `key` [B, Hkv, L, D], L >= end.

        A strength compares a key with the next one. Noted strengths stay. `row` is the only one
        that is filled in; None: all are.
        """
        rows = slice(None)
        if row is not None:
            key, rows = row_of(key, row), slice(row, row + 1)
        self.reserve(end)
        if self.mode in ("auto", "similarity") and end - begin > 1:
            similar = torch.cat(
                [
                    similarity_strengths(key[:, :, low : min(low + COMPARED_AT_ONCE + 1, end)])
                    for low in range(begin, end - 1, COMPARED_AT_ONCE)
                ],
                1,
            )
        else:
            similar = self.strength.new_zeros(key.shape[0], max(end - begin - 1, 0))
        part = slice(begin, begin + similar.shape[1])
        before, noted = self.strength[rows, part], self.noted[rows, part]
        self.strength[rows, part] = torch.where(noted, before, similar)
