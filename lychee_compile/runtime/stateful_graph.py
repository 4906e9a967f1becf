"""A compiled graph that takes, beside its own inputs, the indexes of the key caches among them."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import cache as only_once

from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.methods import able
from lychee_compile.kernels.gpu.owners import GrowingCacheIndex, StaticCacheIndex
from lychee_compile.kernels.operators.observe import (
    kernel_observers,
    kernels_told,
    observers,
    warn_of_recording,
    warn_of_replays,
)
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex, StrengthLookup
from lychee_compile.passes.lower.index_inputs import CacheArgument
from lychee_compile.runtime.cache_registry import Entry, registry
from lychee_compile.runtime.index_owner import IndexOwner
from lychee_compile.runtime.new_caches import NewCaches

logger = logging.getLogger(__name__)


class StatefulGraph:
    """A compiled graph whose last inputs stand for the indexes of its key caches."""

    def __init__(
        self,
        compiled: Callable[..., Sequence[object]],
        arguments: Sequence[CacheArgument],
        config: IndexConfig,
        strength_of: StrengthLookup | None,
    ) -> None:
        self._compiled = compiled
        self._arguments = tuple(arguments)
        self._kinds: tuple[Hashable, ...] = tuple(_kind(each, config) for each in arguments)
        self._config = config
        self._strength_of = strength_of
        self._last: _LastCall | None = None
        self.new_caches = NewCaches()
        self._reads_only = [each.reads_only and each.use is None for each in arguments]

    def __call__(self, *args: object) -> Sequence[object]:
        """Run the graph on the inputs that Dynamo passes, and follow the caches it wrote."""
        given = [each.given(args) for each in self._arguments]
        last = self._last if self._last is not None and self._last.was_on(given, args) else None
        caches = [each.shown(cache) for each, cache in zip(self._arguments, given, strict=True)]
        entries = self._acquire(caches, args) if last is None else last.entries
        if last is None:
            self.new_caches.meet(entries, self._reads_only)
        self._compare(caches, args, entries)
        try:
            outputs = self._compiled(*args, *[entry.owner.tensor for entry in entries])
        except BaseException:
            self._drop(caches)
            raise
        if last is None:
            self._release(caches, args, outputs, entries)
            self._remember(given, entries)
        else:
            last.update_versions(caches, args)
        self._keep_up(caches, args, outputs, entries)
        return outputs

    def _compare(
        self, caches: Sequence[Tensor | None], inputs: Sequence[object], entries: Sequence[Entry]
    ) -> None:
        """Let indexes catch up with what has happened to their caches since the last call."""
        for argument, cache, entry in zip(self._arguments, caches, entries, strict=True):
            if argument.use is not None and cache is not None:
                beside = argument.beside_before(inputs)
                given: list[Tensor | int] = [*beside, *argument.numbers_of(inputs)]
                entry.owner.before_call(cache, argument.use, given)

    def _acquire(self, caches: Sequence[Tensor | None], inputs: Sequence[object]) -> list[Entry]:
        """Return an entry for each cache, from the registry or new."""
        registry.sweep()
        return [
            self._entry(argument, kind, cache, inputs)
            for argument, kind, cache in zip(self._arguments, self._kinds, caches, strict=True)
        ]

    def _entry(
        self,
        argument: CacheArgument,
        kind: Hashable,
        cache: Tensor | None,
        inputs: Sequence[object],
    ) -> Entry:
        if cache is None:
            return Entry(self._new_owner(argument, None))
        entry = registry.acquire(
            cache,
            kind,
            argument.token_dim,
            lambda: self._new_owner(argument, cache),
            argument.beside_before(inputs),
            argument.key_numbers_of(inputs),
        )
        self.new_caches.meet_replaced(entry)
        if isinstance(entry.owner, ReferenceCacheIndex):  # GPU indexes have no token boundaries
            entry.owner.strength_of = self._strength_of
        return entry

    def _new_owner(self, argument: CacheArgument, cache: Tensor | None) -> IndexOwner:
        """Return the owner of an index for a cache that has none."""
        if argument.use is None:
            return ReferenceCacheIndex(self._config, self._strength_of)
        if argument.use.layout is None or cache is None:
            return GrowingCacheIndex()
        return StaticCacheIndex(argument.use.layout, cache.device)

    def _drop(self, caches: Sequence[Tensor | None]) -> None:
        """Forget the indexes of all caches, after a call that broke off."""
        for argument, kind, cache in zip(self._arguments, self._kinds, caches, strict=True):
            if cache is not None:
                registry.drop(cache, kind, argument.token_dim)

    def _release(
        self,
        caches: Sequence[Tensor | None],
        inputs: Sequence[object],
        outputs: Sequence[object],
        entries: Sequence[Entry],
    ) -> None:
        """Register the entries under the caches that the call has left."""
        for argument, kind, cache, entry in zip(
            self._arguments, self._kinds, caches, entries, strict=True
        ):
            if argument.output is not None and cache is not None:
                registry.drop(cache, kind, argument.token_dim)
            registry.release(
                argument.after(cache, outputs),
                kind,
                entry,
                argument.token_dim,
                argument.beside_after(inputs, outputs),
                argument.key_numbers_of(inputs),
                argument.pages,
            )

    def _remember(self, given: Sequence[Tensor | None], entries: Sequence[Entry]) -> None:
        """Remember the inputs of a call whose caches are all written in place, with GPU indexes."""
        in_place = [cache for cache in given if cache is not None]
        if all(each.stays and each.use is not None for each in self._arguments):
            self._last = _LastCall(in_place, entries, self._arguments)

    def _keep_up(
        self,
        caches: Sequence[Tensor | None],
        inputs: Sequence[object],
        outputs: Sequence[object],
        entries: Sequence[Entry],
    ) -> None:
        """Build and refit GPU indexes that are due. The reference's operators do so themselves."""
        if kernel_observers and any(each.use is not None for each in self._arguments):
            if not kernels_told.is_set():
                warn_of_replays()
            kernels_told.clear()
        for argument, cache, entry in zip(self._arguments, caches, entries, strict=True):
            if argument.use is None:
                continue
            if observers and not kernel_observers:
                warn_of_recording()
            if entry.version is None and not able(argument.use.policy, "notices_writes"):
                _warn_of_inference_mode()
                continue
            given: list[Tensor | int] = []
            if argument.keys is not None:
                given += argument.beside_after(inputs, outputs)
                given += argument.numbers_of(inputs)
            entry.owner.after_call(argument.after(cache, outputs), argument.use, given)


def _kind(argument: CacheArgument, config: IndexConfig) -> Hashable:
    """Return what indexes of one cache differ in: graphs of the same kind share an index."""
    kind: Hashable = config if argument.use is None else argument.use.kind
    return kind if argument.keys is None else (kind, argument.keys, len(argument.beside))


class _LastCall:
    """The caches of the last call, to recognise quickly a call on the same caches.

    Only for caches that are written in place and have GPU indexes, as in steady decoding.
    """

    def __init__(
        self,
        caches: Sequence[Tensor],
        entries: Sequence[Entry],
        arguments: Sequence[CacheArgument],
    ) -> None:
        self.entries = list(entries)
        self._arguments = arguments
        self._removals = registry.removals
        self._caches = [(weakref.ref(cache), cache.data_ptr()) for cache in caches]

    def was_on(self, caches: Sequence[Tensor | None], inputs: Sequence[object]) -> bool:
        """True if these are the same caches and their entries are still registered.

        If so, an index is distrusted whose cache somebody else may have written.
        """
        if self._removals != registry.removals:
            return False
        for cache, (known, address) in zip(caches, self._caches, strict=True):
            if cache is None or cache.data_ptr() != address or known() is not cache:
                return False
        beside = [each.beside_before(inputs) for each in self._arguments]
        if not all(map(Entry.is_beside, self.entries, beside)):
            return False
        numbers = [each.key_numbers_of(inputs) for each in self._arguments]
        for cache, entry, others, sizes in zip(caches, self.entries, beside, numbers, strict=True):
            if cache is not None:
                entry.check(cache, others, sizes)
        return True

    def update_versions(self, caches: Sequence[Tensor | None], inputs: Sequence[object]) -> None:
        """Note the versions of all tensors, now that a graph has run on them."""
        for argument, cache, entry in zip(self._arguments, caches, self.entries, strict=True):
            if cache is not None:
                numbers, pages = argument.key_numbers_of(inputs), argument.pages
                entry.note(cache, argument.beside_before(inputs), numbers, pages)


@only_once
def _warn_of_inference_mode() -> None:
    logger.warning(
        "A key cache was created under torch.inference_mode(), where PyTorch does not tell who has "
        "written it, and the kernels of its policy do not notice it: attention over it reads all "
        "keys. Create it under torch.no_grad() instead."
    )
