"""Index state follows the cache: which index belongs to the key cache a compiled graph is given.

State belongs to the storage of a key cache, never to a graph, a call site or an address: a new
cache gets a new index, a dropped cache drops it, two caches through one graph never mix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.cache_index import CacheIndex


class Owner(Protocol):
    """The index of one key cache, of whatever kind."""

    tensor: Tensor
    """What graphs are given for it."""

    def distrust(self) -> None:
        """Somebody else may have written the cache."""


@dataclass(eq=False)
class Entry:
    """An index and the cache it belongs to, if it belongs to one yet."""

    owner: Any
    storage: StorageWeakRef | None = None
    version: int | None = None
    """Version of the cache tensor when we last left it; None where versions are not counted."""


class CacheRegistry:
    """The indexes of all key caches alive. Threads may share it, each with caches of its own."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], Entry] = {}
        self._lock = threading.Lock()
        self.removals = 0
        """How often an entry was taken out: while that stays, entries seen once are in here."""

    def __len__(self) -> int:
        self.sweep()
        return len(self._entries)

    def clear(self) -> None:
        """Forget every index."""
        with self._lock:
            self._entries.clear()
            self.removals += 1

    def sweep(self) -> None:
        """Drop the indexes of caches that are gone."""
        with self._lock:
            gone = [
                key
                for key, entry in self._entries.items()
                if entry.storage is None or entry.storage.expired()
            ]
            for key in gone:
                del self._entries[key]
            self.removals += len(gone)

    def owner_of(self, cache: Tensor, kind: Hashable, token_dim: int = 2) -> Any:
        """What holds the index of `cache`, for looking into; None where it has none.

        `kind` is an `IndexConfig` for the reference's; for one by slot, its layout, or the name of
        its policy where the cache grows.
        """
        with self._lock:
            entry = self._entries.get(_identity(cache, kind, token_dim))
        return None if entry is None else entry.owner

    def index_of(self, cache: Tensor, config: IndexConfig, token_dim: int = 2) -> CacheIndex | None:
        """The reference's index of `cache`, for looking into; None where it has none."""
        handle = self.owner_of(cache, config, token_dim)
        return None if handle is None else handle.cache

    def acquire(
        self, cache: Tensor, kind: Hashable, token_dim: int, make: Callable[[], Owner]
    ) -> Entry:
        """The entry of `cache`, a new one where it has none.

        Its index is distrusted where the cache may have been written since we left it.
        """
        key = _identity(cache, kind, token_dim)
        with self._lock:
            entry = self._entries.get(key)
        if entry is None or entry.storage is None or entry.storage.expired():
            return Entry(make())
        check(entry, cache)
        return entry

    def release(self, cache: Tensor, kind: Hashable, entry: Entry, token_dim: int) -> None:
        """`cache` is as the index of `entry` knows it, now that a graph has run."""
        entry.storage, entry.version = StorageWeakRef(cache.untyped_storage()), version_of(cache)
        with self._lock:
            self._entries[_identity(cache, kind, token_dim)] = entry

    def drop(self, cache: Tensor, kind: Hashable, token_dim: int) -> None:
        """Forget the index of `cache`: it moved on with a grown cache, or a call broke off."""
        with self._lock:
            self._entries.pop(_identity(cache, kind, token_dim), None)
            self.removals += 1


registry = CacheRegistry()
"""The indexes of this process."""


def check(entry: Entry, cache: Tensor) -> None:
    """Distrust the index where somebody else may have written the cache."""
    if entry.version is None or entry.version != version_of(cache):
        entry.owner.distrust()


def version_of(cache: Tensor) -> int | None:
    """How often a tensor was written; None where that is not counted."""
    return None if cache.is_inference() else cache._version


def _identity(cache: Tensor, kind: Hashable, token_dim: int) -> tuple[Any, ...]:
    """What two tensors share that are the same cache, whatever its length.

    A storage's record stays allocated while an entry refers to it weakly: its address names it.
    """
    sizes = tuple(size for dim, size in enumerate(cache.shape) if dim != token_dim)
    return (
        cache.untyped_storage()._cdata,
        cache.storage_offset(),
        sizes,
        token_dim,
        cache.stride(),
        cache.dtype,
        kind,
    )
