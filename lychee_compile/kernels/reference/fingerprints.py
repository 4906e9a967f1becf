"""Fingerprints of cached keys, which tell if a key is still the one that was indexed."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK_BYTES = 1 << 19


def fingerprints(key: Tensor, seed: int = 0x5EED) -> Tensor:
    """Hash the keys of each token over all heads and channels: [B, Hkv, T, D] -> int64 [B, T].

    The hash is a sum of bit patterns with random odd 64-bit weights, modulo 2^64. It is exact in
    any order of summation, and so the same on every device. Two different tokens agree with a
    probability below 2^-30. NaNs compare by their bits.
    """
    batch, heads, tokens, _ = key.shape
    size = max(1, _BLOCK_BYTES // (key.element_size() * key.shape[3] * heads * batch))
    weight = None
    parts = []
    for block in key.split(size, dim=2):
        bits = _as_int64(block)
        if weight is None:
            weight = _weights(heads, bits.shape[-1], seed).to(key.device)
        parts.append((bits * weight).sum((1, 3)))
    return (
        torch.cat(parts, dim=1)
        if tokens
        else torch.zeros(batch, 0, dtype=torch.int64, device=key.device)
    )


def _as_int64(block: Tensor) -> Tensor:
    """Return bit patterns as int64, with several channels in one number if they fill it.

    High bits are folded down. Without the fold, differences in sign bits alone could cancel in the
    sum.
    """
    size = block.element_size()
    block = block.contiguous()
    if block.shape[-1] * size % 8:
        return block.view(_INTEGERS[size]).to(torch.int64)
    strides = block.stride()[:-1]  # those of axes of size 1 may be anything
    if any(each * size % 8 for each in (block.storage_offset(), *strides)):
        block = block.clone(memory_format=torch.contiguous_format)  # int64 must be aligned
    bits = block.view(torch.int64)
    return bits ^ (bits >> 31 & 0x1FFFFFFFF)  # masked, as >> repeats the sign: one to one


@cache
def _weights(heads: int, words: int, seed: int) -> Tensor:
    """Return random odd weights, int64 [heads, 1, words]."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, (heads, 1, words), generator=generator, device="cpu") | 1
