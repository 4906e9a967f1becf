"""Where the index of one key cache lies in a flat device tensor.

The index is addressed by cache slot: what belongs to a key lies at a place that its slot alone
decides. So a rewind forgets nothing and needs nothing, and a write only touches its own slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.launch_common import power_of_two
from lychee_compile.kernels.reference.sketch import sketch_bits

BLOCK, LARGEST_BLOCK, BLOCKS = 8192, 32768, 32
"""Slots that share one set of principal axes: more where an index would have more than 32 blocks.

For a step reads all axes, and scans each block apart.
"""
PAGE = 16
"""Slots summarised together, to narrow a long context down."""
PAGE_STEP, PAGE_MIDDLE = 0.75, 5.625
"""A page's mean is coded in steps of 0.75 of a coordinate's, around the middle of 0 to 15."""
TILE = 512
"""Slots are reserved in multiples of this; a program of the scan takes as many."""
_ALIGNMENT = 256


class Field(NamedTuple):
    """Coordinates that lie in the same bits of consecutive bytes."""

    first: int
    """First coordinate."""
    width: int
    """Coordinates, one in each byte."""
    shift: int
    """Place of their bits in the byte."""
    bits: int

    @property
    def offset(self) -> float:
        """What a code stands for, in steps, is code + 0.5 - 2^(bits - 1): code - offset."""
        return 2 ** (self.bits - 1) - 0.5


@lru_cache(maxsize=64)
def planes(head_dim: int) -> tuple[tuple[Field, ...], tuple[Field, ...]]:
    """The fields of the 4-bit and of the 2-bit coordinates of a sketch."""
    bits = sketch_bits(head_dim)
    fine = bits.count(4)
    return _fields(0, fine, 4), _fields(fine, len(bits) - fine, 2)


def _fields(first: int, count: int, bits: int) -> tuple[Field, ...]:
    columns = -(-count * bits // 8)
    starts = range(0, count, max(columns, 1))
    return tuple(
        Field(first + start, min(columns, count - start), bits * place, bits)
        for place, start in enumerate(starts)
    )


def block_size(slots: int) -> int:
    """Slots that share one set of axes, in an index of so many."""
    return max(BLOCK, min(power_of_two(-(-slots // BLOCKS)), LARGEST_BLOCK))


class SketchState(NamedTuple):
    """The parts of an index, views of its tensor."""

    header: Tensor
    """int32 [1 + B]: 1 where the index may be trusted, then each row's last written slot plus 1."""
    fine: Tensor
    """4-bit coordinates, two in a byte, uint8 [B, Hkv, slots, bytes]."""
    coarse: Tensor
    """2-bit coordinates, four in a byte, uint8 [B, Hkv, slots, bytes]."""
    pages: Tensor
    """Means of the 4-bit coordinates of a page, in 4 bits, uint8 [B, Hkv, slots / PAGE, bytes]."""
    axes: Tensor
    """Principal axes of each block, in half precision [B, Hkv, blocks, r, D]."""
    centre: Tensor
    """Mean key of each block, float32 [B, Hkv, blocks, D]."""
    step: Tensor
    """Quantisation steps, float32 [B, Hkv, blocks, r]."""
    spread: Tensor
    """Mean variance of 4-bit coordinates within a page, in steps, float32 [B, Hkv, blocks, r4]."""


@dataclass(frozen=True)
class SketchLayout:
    """Sizes and places of the parts of an index over `slots` slots."""

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    axes_dtype: torch.dtype = torch.float16

    @classmethod
    def of(cls, key: Tensor) -> SketchLayout:
        """The layout for a cache `key` [B, Hkv, L, D]."""
        batch, heads, length, head_dim = key.shape
        # Products of axes and queries, or keys, take one dtype.
        dtype = torch.bfloat16 if key.dtype == torch.bfloat16 else torch.float16
        return cls(batch, heads, head_dim, -(-length // TILE) * TILE, dtype)

    @property
    def block(self) -> int:
        """Slots of a block."""
        return block_size(self.slots)

    @property
    def blocks(self) -> int:
        """Blocks of slots that share their axes."""
        return -(-self.slots // self.block)

    def grows_to(self, slots: int) -> bool:
        """Whether what lies in it may be copied into an index of so many slots."""
        return self.block == block_size(slots)

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(aligned(math.prod(shape), dtype) for _, shape, dtype in self._parts())

    def views(self, state: Tensor) -> SketchState:
        """The parts of `state`, uint8 [size]."""
        made, start = {}, 0
        for name, shape, dtype in self._parts():
            count = math.prod(shape) * dtype.itemsize
            made[name] = state[start : start + count].view(dtype).view(shape)
            start += aligned(math.prod(shape), dtype)
        return SketchState(**made)

    def _parts(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        each, fields = (self.batch, self.kv_heads), planes(self.head_dim)
        fine, coarse = (plane[0].width if plane else 0 for plane in fields)
        kept = len(sketch_bits(self.head_dim))
        kept_fine = sum(field.width for field in fields[0])
        yield "header", (1 + self.batch,), torch.int32
        yield "fine", (*each, self.slots, fine), torch.uint8
        yield "coarse", (*each, self.slots, coarse), torch.uint8
        yield "pages", (*each, self.slots // PAGE, fine), torch.uint8
        yield "axes", (*each, self.blocks, kept, self.head_dim), self.axes_dtype
        yield "centre", (*each, self.blocks, self.head_dim), torch.float32
        yield "step", (*each, self.blocks, kept), torch.float32
        yield "spread", (*each, self.blocks, kept_fine), torch.float32


def aligned(count: int, dtype: torch.dtype) -> int:
    """Bytes of so many numbers, and of what keeps the next ones aligned."""
    return -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
