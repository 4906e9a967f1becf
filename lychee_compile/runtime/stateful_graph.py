"""A compiled graph that is given, beside its inputs, the indexes of the key caches among them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache as only_once
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.lifecycle import CacheUse
from lychee_compile.kernels.gpu.owners import GrowingCacheIndex, StaticCacheIndex
from lychee_compile.kernels.handles import Handle
from lychee_compile.kernels.operators.observe import observers, warn_of_recording
from lychee_compile.runtime.cache_registry import Entry, Owner, check, registry, version_of

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
    slots: CacheUse | None = None
    """How generated kernels use it; None: the index is the reference's."""


class StatefulGraph:
    """A compiled graph whose last inputs stand for the indexes of its key caches."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        states: Sequence[StateInput],
        config: IndexConfig,
        lookup: Lookup,
    ) -> None:
        self._compiled = compiled
        self._states = tuple(states)
        self._kinds = tuple(config if each.slots is None else each.slots.kind for each in states)
        self._config = config
        self._lookup = lookup
        self._last: _LastCall | None = None
        self._newcomers: list[StorageWeakRef | None] = []
        """Caches that the last call was the first to see."""

    def __call__(self, *args: Any) -> Any:
        """Run the graph on the inputs Dynamo gives it, and follow the caches it wrote."""
        caches: list[Any] = [
            None if each.source is None else args[each.source] for each in self._states
        ]
        last = self._last
        again = last is not None and last.was_on(caches)
        entries = last.entries if again and last is not None else self._acquire(caches)
        new = self._note_newcomers(entries)
        try:
            outputs = self._compiled(*args, *[entry.owner.tensor for entry in entries])
        except BaseException:
            self._drop(caches)
            raise
        if again:
            for cache, entry in zip(caches, entries, strict=True):
                entry.version = version_of(cache)
        else:
            self._release(caches, outputs, entries)
        self._newcomers = [entry.storage for entry in new]
        self._keep_up(caches, outputs, entries)
        return outputs

    def _acquire(self, caches: Sequence[Any]) -> list[Entry]:
        registry.sweep()
        return [
            self._entry(state, kind, cache)
            for state, kind, cache in zip(self._states, self._kinds, caches, strict=True)
        ]

    def _note_newcomers(self, entries: Sequence[Entry]) -> list[Entry]:
        """Which caches are new: their indexes wait for a second call where others got no second.

        Beam search copies its caches at every step: indexes of them would never be read.
        """
        slots = (entry for state, entry in zip(self._states, entries, strict=True) if state.slots)
        new = [entry for entry in slots if entry.storage is None]
        if new and any(cache is not None and cache.expired() for cache in self._newcomers):
            for entry in new:
                entry.owner.delay_build()
        return new

    def _entry(self, state: StateInput, kind: Hashable, cache: Tensor | None) -> Entry:
        if cache is None:
            return Entry(self._new(state, None))
        entry = registry.acquire(cache, kind, state.token_dim, lambda: self._new(state, cache))
        if state.slots is None:
            entry.owner.strength_of = self._lookup
        return entry

    def _new(self, state: StateInput, cache: Tensor | None) -> Owner:
        """An index for a cache that has none."""
        if state.slots is None:
            return Handle(self._config, self._lookup)
        if state.slots.layout is None or cache is None:
            return GrowingCacheIndex()
        return StaticCacheIndex(state.slots.layout, cache.device)

    def _drop(self, caches: Sequence[Any]) -> None:
        for state, kind, cache in zip(self._states, self._kinds, caches, strict=True):
            if cache is not None:
                registry.drop(cache, kind, state.token_dim)

    def _release(self, caches: Sequence[Any], outputs: Any, entries: Sequence[Entry]) -> None:
        for state, kind, cache, entry in zip(
            self._states, self._kinds, caches, entries, strict=True
        ):
            if state.output is not None and cache is not None:
                registry.drop(cache, kind, state.token_dim)
            left = cache if state.output is None else outputs[state.output]
            registry.release(left, kind, entry, state.token_dim)
        if all(state.output is None and state.slots is not None for state in self._states):
            self._last = _LastCall(caches, entries)

    def _keep_up(self, caches: Sequence[Any], outputs: Any, entries: Sequence[Entry]) -> None:
        """Build and refit indexes by slot where that is due; the reference's do so themselves."""
        for state, cache, entry in zip(self._states, caches, entries, strict=True):
            if state.slots is None:
                continue
            if observers:
                warn_of_recording()
            if entry.version is None:
                _warn_of_inference_mode()
                continue
            left = cache if state.output is None else outputs[state.output]
            entry.owner.after_call(left, state.slots)


class _LastCall:
    """The caches of the last call. It is the usual one that gets the same: that is quickly seen."""

    def __init__(self, caches: Sequence[Any], entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self._removals = registry.removals
        self._caches = [(weakref.ref(cache), cache.data_ptr()) for cache in caches]

    def was_on(self, caches: Sequence[Any]) -> bool:
        """Whether these are the same, with the same entries, that are checked then."""
        if self._removals != registry.removals:
            return False
        for cache, (known, address) in zip(caches, self._caches, strict=True):
            if cache.data_ptr() != address or known() is not cache:
                return False
        for cache, entry in zip(caches, self.entries, strict=True):
            check(entry, cache)
        return True


@only_once
def _warn_of_inference_mode() -> None:
    logger.warning(
        "A key cache was made under torch.inference_mode(), where nothing tells who has written "
        "it: attention over it reads all keys. Make it under torch.no_grad() instead."
    )
