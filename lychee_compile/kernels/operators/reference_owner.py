"""The owner of the reference's index of one key cache, which graphs know by a handle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.handles import new_handle
from lychee_compile.kernels.operators.cache_index import CacheIndex

StrengthLookup = Callable[[Tensor], Tensor]
"""Gives the boundary strengths, uint8, of token ids of any shape."""


class ReferenceCacheIndex:
    """The index that the reference operators use for one key cache.

    The operators themselves bring the index up to date at every call. So nothing is left to do
    between calls.
    """

    notices_writes = False

    def __init__(self, config: IndexConfig, strength_of: StrengthLookup | None = None) -> None:
        self.tensor = new_handle(self)
        """Handle that graphs take, int64 [2]."""
        self.config = config
        self.strength_of = strength_of
        """Gives the boundary strengths of the tokens that are written next; None: no table."""
        self.cache: CacheIndex | None = None
        self.waits = False
        """True while a call is not to build the index: attention reads all keys."""
        self._calls_to_wait = 0

    def index_for(self, key: Tensor) -> CacheIndex:
        """Return the index of `key` [B, Hkv, L, D], an empty one if none fits its shape."""
        if self.cache is None or not _fits(self.cache, key):
            self.cache = CacheIndex(key, self.config)
        return self.cache

    def distrust(self) -> None:
        """Compare the keys before the next use: somebody else may have written the cache."""
        if self.cache is not None:
            self.cache.distrust()

    def recheck(self) -> None:
        """Compare the keys before the next use: what they are computed from has changed."""
        self.distrust()

    def forget(self, first: Tensor) -> None:
        """Forget the keys of each row from the slot `first` [b], int64 [B], on: they have moved."""
        if self.cache is not None:
            self.cache.forget(first)

    def delay_build(self) -> None:
        """Build the index of a new cache only if a second call comes."""
        self._calls_to_wait = 1

    def begin_call(self) -> None:
        """Note that a graph runs on the cache. The last call to wait for may be over."""
        self.waits = self._calls_to_wait > 0
        self._calls_to_wait = 0

    def before_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor | int]) -> None:
        """Do nothing: the operators compare keys themselves."""

    def after_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor | int] = ()) -> None:
        """Do nothing: the operators have brought the index up to date."""


def _fits(cache: CacheIndex, key: Tensor) -> bool:
    """True if `cache` indexes keys of the batch, heads, head_dim and device of `key`."""
    index = cache.index
    shape = (index.batch, index.kv_heads, index.head_dim)
    return shape == (key.shape[0], key.shape[1], key.shape[3]) and index.device == key.device
