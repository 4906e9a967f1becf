"""The memory layout of an index in one flat device tensor, for any method.

A GPU index is a slot index: the slot of a key alone decides which bytes belong to it. A rewind of
the cache therefore changes nothing in the index, and a write only touches the slots it writes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from lychee_compile.kernels.sizes import whole_scans

_ALIGNMENT = 256
"""Bytes of which every part of an index begins at a multiple."""


Part = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of one part of an index."""


class IndexState(Protocol):
    """The parts of an index, a named tuple of views of its memory; kernels take them by name.

    The first is `header`. The others are [B, Hkv, n, ...], in the order of slots, so that an index
    that grows can be copied into a larger one.
    """

    @property
    def header(self) -> Tensor:
        """int32 [1 + B]: 1 if the index may be trusted, then the last written slot + 1 by row.

        That of a row whose own part is not trusted is stored as its complement, below 0.
        """

    def _asdict(self) -> dict[str, Tensor]: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def __getitem__(self, part: slice, /) -> tuple[Tensor, ...]: ...


class IndexLayout(Hashable, Protocol):
    """Sizes of an index, and where its parts lie. Layouts are hashable and equal by value."""

    @property
    def policy(self) -> str:
        """Name of the policy whose kernels read the index."""

    @property
    def batch(self) -> int:
        """Number of rows of the batch."""

    @property
    def slots(self) -> int:
        """Number of slots that there is room for, a multiple of `SCAN_SLOTS`."""

    @property
    def size(self) -> int:
        """Number of bytes in all."""

    def of(self, key: Tensor) -> Self:
        """Return the layout of the same method for a cache `key` [B, Hkv, L, D]."""

    def resized(self, slots: int, batch: int | None = None) -> Self:
        """Return the layout with other `slots`, and another `batch` if one is given."""

    def grows_to(self, slots: int) -> bool:
        """Return True if the contents may be copied into an index of so many slots."""

    def views(self, memory: Tensor) -> IndexState:
        """Return the parts of `memory`, uint8 [size]."""


LayoutT = TypeVar("LayoutT", bound=IndexLayout)


@dataclass(frozen=True)
class IndexOperands:
    """The index that one step of decoding reads and brings up to date."""

    layout: IndexLayout
    state: IndexState
    positions: Tensor | None = None
    """Slots that the step has just written, int [T] or [B, T]; None: it wrote none."""


def roomy(layout: LayoutT) -> LayoutT:
    """Return the layout with half as many slots again."""
    return layout.resized(whole_scans(layout.slots * 3 // 2))


def header_part(batch: int) -> Part:
    """Return the first part of every index: the trust flag, then one number a row."""
    return "header", (1 + batch,), torch.int32


def row_ends(header: Tensor, rows: int) -> Tensor:
    """Return the slot after the last one written in each of the first rows, int64 [rows]."""
    ends = header[1 : 1 + rows].long()
    return torch.where(ends < 0, ~ends, ends)


def fingerprints_part(batch: int, kv_heads: int, slots: int) -> Part:
    """Return the part that holds a hash of every indexed key."""
    return "fingerprints", (batch, kv_heads, slots), torch.int32


def bytes_of(parts: Iterable[Part]) -> int:
    """Return the bytes that `parts` take, one behind the other, each of them aligned."""
    return sum(_aligned_bytes(shape, dtype) for _, shape, dtype in parts)


def views_of(memory: Tensor, parts: Iterable[Part]) -> dict[str, Tensor]:
    """Return the views of `memory`, uint8 [bytes_of(parts)], that are the parts, by name."""
    views, start = {}, 0
    for name, shape, dtype in parts:
        end = start + math.prod(shape) * dtype.itemsize
        views[name] = memory[start:end].view(dtype).view(shape)
        start += _aligned_bytes(shape, dtype)
    return views


def _aligned_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of a part, rounded up so that the next part is aligned."""
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
