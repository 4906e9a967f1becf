"""The protocol between compiled graphs and whatever owns the index of a key cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from lychee_compile.kernels.gpu.cache_use import CacheUse


@runtime_checkable
class IndexOwner(Protocol):
    """Owner of the index of one key cache, of whatever kind the index is."""

    tensor: Tensor
    """The tensor that graphs take for the index: its memory, or a handle."""

    @property
    def notices_writes(self) -> bool:
        """True if the index is compared with the keys although nobody calls `distrust`."""

    def distrust(self) -> None:
        """Check the index, or read all keys, at the next call: the cache may have been written."""

    def recheck(self) -> None:
        """Compare the keys at the next call: what they are computed from has changed."""

    def forget(self, first: Tensor) -> None:
        """Forget the keys of each row from the slot `first` [b], int64 [B], on: they have moved."""

    def delay_build(self) -> None:
        """Build the index of a new cache only if a second call comes."""

    def before_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor | int]) -> None:
        """Bring the index up to date: a graph will run on `cache`. Keys depend on `beside` too."""

    def after_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor | int] = ()) -> None:
        """Bring the index up to date, now that a graph has run on `cache`.

        `beside` are the other tensors, and then the sizes, that keys are computed from.
        """
