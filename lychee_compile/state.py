"""Index state follows the cache: which index belongs to the key cache a compiled graph is given.

State belongs to the storage of a key cache, never to a graph, a call site or an address: a new
cache gets a new index, a dropped cache drops it, two caches through one graph never mix.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lychee_compile.kernels.cache_index import CacheIndex
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.handles import Handle

logger = logging.getLogger(__name__)

Lookup = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class StateInput:
    """Where a compiled graph takes and leaves one key cache."""

    source: int | None
    """Which input is the cache before the call; None where a growing cache begins."""
    output: int | None
    """Which output is the grown cache; None where the cache is written in place."""
    token_dim: int = 2
    """Dimension of the cache that runs over tokens."""


@dataclass
class _Entry:
    handle: Handle
    storage: StorageWeakRef
    version: int | None
    """Version of the cache tensor when we last left it; None where versions are not counted."""


class CacheRegistry:
    """The indexes of all key caches alive. Threads may share it, each with caches of its own."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        self.sweep()
        return len(self._entries)

    def clear(self) -> None:
        """Forget every index."""
        with self._lock:
            self._entries.clear()

    def sweep(self) -> None:
        """Drop the indexes of caches that are gone."""
        with self._lock:
            gone = [key for key, entry in self._entries.items() if entry.storage.expired()]
            for key in gone:
                del self._entries[key]

    def index_of(self, cache: Tensor, config: IndexConfig, token_dim: int = 2) -> CacheIndex | None:
        """The index of `cache`, for looking into; None where it has none."""
        with self._lock:
            entry = self._entries.get(_identity(cache, config, token_dim))
        return None if entry is None else entry.handle.cache

    def acquire(self, cache: Tensor, config: IndexConfig, lookup: Lookup, token_dim: int) -> Handle:
        """The handle of `cache`, a new one where it has none.

        Its index is marked as suspect where the cache may have been written since we left it.
        """
        key = _identity(cache, config, token_dim)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.storage.expired():
                return Handle(config, lookup)
        if entry.handle.cache is not None:
            untouched = entry.version is not None and entry.version == _version(cache)
            entry.handle.cache.suspect |= not untouched
        entry.handle.strength_of = lookup
        return entry.handle

    def release(self, cache: Tensor, config: IndexConfig, handle: Handle, token_dim: int) -> None:
        """`cache` is as `handle`'s index knows it, now that a graph has run."""
        entry = _Entry(handle, StorageWeakRef(cache.untyped_storage()), _version(cache))
        with self._lock:
            self._entries[_identity(cache, config, token_dim)] = entry

    def drop(self, cache: Tensor, config: IndexConfig, token_dim: int) -> None:
        """Forget the index of `cache`: it moved on with a grown cache, or a call broke off."""
        with self._lock:
            self._entries.pop(_identity(cache, config, token_dim), None)


registry = CacheRegistry()
"""The indexes of this process."""


class StatefulGraph:
    """A compiled graph whose last inputs are the handles of the indexes of its key caches."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        states: Sequence[StateInput],
        config: IndexConfig,
        lookup: Lookup,
    ) -> None:
        self._compiled = compiled
        self._states = tuple(states)
        self._config = config
        self._lookup = lookup

    def __call__(self, *args: Any) -> Any:
        """Run the graph on the inputs Dynamo gives it, and follow the caches it wrote."""
        config = self._config
        registry.sweep()
        caches = [None if each.source is None else args[each.source] for each in self._states]
        handles = [
            Handle(config, self._lookup)
            if cache is None
            else registry.acquire(cache, config, self._lookup, state.token_dim)
            for state, cache in zip(self._states, caches, strict=True)
        ]
        try:
            outputs = self._compiled(*args, *(handle.tensor for handle in handles))
        except BaseException:
            for state, cache in zip(self._states, caches, strict=True):
                if cache is not None:
                    registry.drop(cache, config, state.token_dim)
            raise
        for state, cache, handle in zip(self._states, caches, handles, strict=True):
            if state.output is None:
                assert cache is not None
                registry.release(cache, config, handle, state.token_dim)
                continue
            if cache is not None:
                registry.drop(cache, config, state.token_dim)
            registry.release(outputs[state.output], config, handle, state.token_dim)
        return outputs


def _identity(cache: Tensor, config: IndexConfig, token_dim: int) -> tuple[Any, ...]:
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
        config,
    )


def _version(cache: Tensor) -> int | None:
    return None if cache.is_inference() else cache._version
