"""The memory layout of an index of sketches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.layout import (
    Part,
    bytes_of,
    fingerprints_part,
    header_part,
    views_of,
)
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.levels.declaration import LevelStack
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.policies.decode.lychee import LYCHEE
from lychee_compile.kernels.reference.sketch_axes import sketch_bits
from lychee_compile.kernels.sizes import PAGE, power_of_two, whole_scans

BLOCK, LARGEST_BLOCK, BLOCKS = 8192, 32768, 32
"""Least and greatest number of slots that share one set of principal axes; blocks to aim at.

A step reads the axes of all blocks and scans each block apart. Blocks therefore have more slots in
an index that would have more than 32 of them.
"""
NARROWED_SLOTS, NARROWED_ROW = 2**26, 2**21
"""Least number of slots of all rows and KV heads together, and of one row, from which on chunks
narrow a choice. Below, it takes less time to scan all pages."""
PAGE_STEP, PAGE_MIDDLE = 0.75, 5.625
"""A page's mean is coded in steps of 0.75 of a coordinate's step, around the middle of 0 to 15."""


class Field(NamedTuple):
    """Coordinates that lie in the same bits of consecutive bytes."""

    first: int
    """First coordinate."""
    width: int
    """Number of coordinates, one in each byte."""
    shift: int
    """Lowest bit of a coordinate in its byte."""
    bits: int
    """Number of bits of a coordinate."""

    @property
    def offset(self) -> float:
        """Number to subtract from a code, which stands for code + 0.5 - 2^(bits - 1) steps."""
        return 2 ** (self.bits - 1) - 0.5


@lru_cache(maxsize=64)
def planes(head_dim: int) -> tuple[tuple[Field, ...], tuple[Field, ...]]:
    """Return the fields of the 4-bit and of the 2-bit coordinates of a sketch."""
    bits = sketch_bits(head_dim)
    fine = bits.count(4)
    return _fields(0, fine, 4), _fields(fine, len(bits) - fine, 2)


def plane_bytes(fields: Sequence[Field]) -> int:
    """Return the bytes of a token in a plane: kernels read whole words of four."""
    return -(-fields[0].width // 4) * 4 if fields else 0


def _fields(first: int, count: int, bits: int) -> tuple[Field, ...]:
    columns = -(-count * bits // 32) * 4
    starts = range(0, count, max(columns, 1))
    return tuple(
        Field(first + start, min(columns, count - start), bits * number, bits)
        for number, start in enumerate(starts)
    )


def block_size(slots: int) -> int:
    """Return how many slots share one set of axes in an index of `slots`."""
    return max(BLOCK, min(power_of_two(-(-slots // BLOCKS)), LARGEST_BLOCK))


def pays_to_narrow(rows: int, slots: int, flat_tokens: int) -> bool:
    """Return True if chunks narrow choices in a cache of so many slots, as sizes alone decide.

    `rows` are those of all KV heads. Contexts of up to `flat_tokens` are scanned token by token.
    """
    return slots > max(NARROWED_ROW - 1, flat_tokens) and rows * slots >= NARROWED_SLOTS


@dataclass(frozen=True)
class SketchState:
    """The parts of an index, views of its memory. Kernels take them by these names."""

    header: Tensor
    """int32 [1 + B]: 1 if the index may be trusted, 2 if the next step must not trust it, 0 if it
    is not trusted; then the last written slot + 1 of each row."""
    fingerprints: Tensor
    """Hashes of the indexed keys, int32 [B, Hkv, slots]."""
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
    residual: Tensor
    """Distances of keys from their sketches, within the axes and out of them, float32
    [B, Hkv, slots, 2]; [B, Hkv, 0, 2] in an index that is not measured."""
    chunks: Mapping[str, Tensor] = field(default_factory=dict)
    """Chunks and their clusters by name, see `LevelLayout`; empty if they do not narrow choices."""

    def _asdict(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return own | own.pop("chunks")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._asdict().values())

    def __getitem__(self, part: slice, /) -> tuple[Tensor, ...]:
        return tuple(self)[part]


class ChunkLayout(LevelLayout):
    """Sizes of the chunks that narrow choices, and of their clusters."""

    @property
    def stack(self) -> LevelStack:
        """The levels by which lychee narrows a long context."""
        return LYCHEE


@dataclass(frozen=True)
class SketchLayout:
    """Sizes of the parts of an index over `slots` slots, and where they lie."""

    batch: int
    kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype = torch.float16
    """Dtype of the keys."""
    settings: GroupSettings | None = None
    """Settings of the chunks that narrow choices; None: they do not, and there are none."""
    policy: str = "lychee"
    measured: bool = False
    """True if the index tells how far keys are from their sketches, as certificates need it."""

    @classmethod
    def over(
        cls,
        key: Tensor,
        settings: GroupSettings | None = None,
        flat_tokens: int = 0,
        measured: bool = False,
    ) -> SketchLayout:
        """Return the layout for a cache `key` [B, Hkv, L, D], `measured` for certificates.

        With `settings` chunks narrow its choices if it is long enough. Contexts of up to
        `flat_tokens` are scanned token by token.
        """
        batch, heads, length, head_dim = key.shape
        if not pays_to_narrow(batch * heads, length, flat_tokens):
            settings = None
        sizes = batch, heads, head_dim, whole_scans(length)
        return cls(*sizes, key.dtype, settings, measured=measured)

    def of(self, key: Tensor) -> SketchLayout:
        """Return the layout for a cache `key` [B, Hkv, L, D], with the same settings."""
        batch, heads, length, head_dim = key.shape
        return replace(
            self, batch=batch, kv_heads=heads, head_dim=head_dim, slots=whole_scans(length),
            dtype=key.dtype,
        )  # fmt: skip

    @property
    def axes_dtype(self) -> torch.dtype:
        """Dtype of axes: products of these and queries, or keys, take one dtype."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float16

    @property
    def chunks(self) -> ChunkLayout | None:
        """Layout of the chunks that narrow choices; None if they do not."""
        if self.settings is None:
            return None
        sizes = self.batch, self.kv_heads, self.head_dim, self.slots
        return ChunkLayout(*sizes, self.dtype, self.policy, self.settings)

    @property
    def block(self) -> int:
        """Number of slots of a block."""
        return block_size(self.slots)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.slots // self.block)

    def resized(self, slots: int, batch: int | None = None) -> SketchLayout:
        """Return the layout with other `slots`, and another `batch` if one is given."""
        return replace(self, slots=slots, batch=self.batch if batch is None else batch)

    def grows_to(self, slots: int) -> bool:
        """Return True if blocks have as many slots in an index of `slots`."""
        return self.block == block_size(slots)

    @property
    def size(self) -> int:
        """Number of bytes in all."""
        return bytes_of([*self._parts(), *self._tables()])

    def views(self, memory: Tensor) -> SketchState:
        """Return the parts of `memory`, uint8 [size]."""
        views = views_of(memory, [*self._parts(), *self._tables()])
        own = {name: views.pop(name) for name, *_ in self._parts()}
        return SketchState(**own, chunks=views)

    def _tables(self) -> Iterator[Part]:
        """Yield the parts of chunks and clusters."""
        return iter(()) if self.chunks is None else self.chunks.tables()

    def _parts(self) -> Iterator[Part]:
        """Yield name, shape and dtype of each part, in order."""
        each, fields = (self.batch, self.kv_heads), planes(self.head_dim)
        fine, coarse = (plane_bytes(plane) for plane in fields)
        kept = len(sketch_bits(self.head_dim))
        kept_fine = sum(field.width for field in fields[0])
        yield header_part(self.batch)
        yield fingerprints_part(*each, self.slots)
        yield "fine", (*each, self.slots, fine), torch.uint8
        yield "coarse", (*each, self.slots, coarse), torch.uint8
        yield "pages", (*each, self.slots // PAGE, fine), torch.uint8
        yield "axes", (*each, self.blocks, kept, self.head_dim), self.axes_dtype
        yield "centre", (*each, self.blocks, self.head_dim), torch.float32
        yield "step", (*each, self.blocks, kept), torch.float32
        yield "spread", (*each, self.blocks, kept_fine), torch.float32
        yield "residual", (*each, self.slots if self.measured else 0, 2), torch.float32
