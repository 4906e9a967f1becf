"""The memory layout of an index in one flat device tensor, for any method.

A GPU index is a slot index: the slot of a key alone decides which bytes belong to it. A rewind of
the cache therefore changes nothing in the index, and a write only touches the slots it writes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes of which every part of an index begins at a multiple."""


class IndexState(Protocol):
    """The parts of an index, a named tuple of views of its memory; kernels take them by name."""

    @property
    def header(self) -> Tensor:
        """int32 [1 + B]: 1 if the index may be trusted, then the last written slot + 1 by row."""

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


@dataclass(frozen=True)
class IndexOperands:
    """The index that one step of decoding reads and brings up to date."""

    layout: IndexLayout
    state: IndexState
    positions: Tensor | None = None
    """Slots that the step has just written, int [T] or [B, T]; None: it wrote none."""


def aligned_bytes(count: int, dtype: torch.dtype) -> int:
    """Return the bytes of `count` numbers, rounded up so that the next part is aligned."""
    return -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def header_size(batch: int) -> int:
    """Return how many int32 the header has: the trust flag, then one number a row."""
    return 1 + batch
