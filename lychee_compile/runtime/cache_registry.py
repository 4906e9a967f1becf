"""Registry that finds the index of the key cache which a compiled graph was called with.

An index belongs to the storage of a key cache, never to a graph, a call site or an address. A new
cache gets a new index, a dropped cache drops it, and two caches through one graph never mix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lychee_compile import torch_private
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.cache_index import CacheIndex
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.runtime.index_owner import IndexOwner
from lychee_compile.runtime.page_tables import PageTable


@dataclass(eq=False)
class Uses:
    """Record of the calls on one cache, which outlives its index."""

    count: int = 0
    """Number of calls."""
    storage: StorageWeakRef | None = None
    """Storage of the cache after the last call; None before the first call has ended."""

    def expired(self) -> bool:
        """True if the cache is gone."""
        return self.storage is not None and self.storage.expired()


@dataclass(frozen=True)
class TensorState:
    """The memory of a tensor and its contents, as far as PyTorch tells whether they changed."""

    storage: StorageWeakRef
    layout: Hashable
    version: int | None
    """Version of the tensor; None if PyTorch counts no versions of it."""
    pages: PageTable | None = field(default=None, compare=False)
    """Pages of each row if the tensor is a table of pages, else None."""

    @classmethod
    def of(cls, tensor: Tensor, page: int = 0, before: TensorState | None = None) -> TensorState:
        """Return the state of a tensor now.

        `page` is the number of tokens of a page if it is a table of pages, else 0. `before` is the
        state at an earlier call, if there was one.
        """
        layout = tensor.storage_offset(), tensor.stride(), tensor.dtype
        version = torch_private.version_of(tensor)
        state = cls(StorageWeakRef(tensor.untyped_storage()), layout, version)
        if page == 0:
            return state
        same = before is not None and before.is_of(tensor) and before.pages is not None
        return replace(state, pages=before.pages if same and before else PageTable(tensor, page))

    def is_of(self, tensor: Tensor) -> bool:
        """True if it is certain that `tensor` is as it was."""
        return self.version is not None and self == TensorState.of(tensor)


@dataclass(eq=False)
class Entry:
    """An index and the cache that it belongs to, if it belongs to one yet."""

    owner: IndexOwner
    version: int | None = None
    """Version of the cache tensor after the last call; None if PyTorch counts no versions of it."""
    uses: Uses = field(default_factory=Uses)
    beside: list[TensorState] = field(default_factory=list)
    """Other tensors that the keys were computed from in the last call."""
    numbers: Sequence[int] = ()
    """Sizes that the keys depended on in the last call."""
    replaced: int = 0
    """Number of calls in a row that came with another tensor or size beside the cache than the call
    before."""

    @property
    def storage(self) -> StorageWeakRef | None:
        """Storage of the cache; None before the first call on the cache has ended."""
        return self.uses.storage

    def check(
        self, cache: Tensor, beside: Sequence[Tensor] = (), numbers: Sequence[int] = ()
    ) -> None:
        """Distrust the index if somebody else may have written the cache since the last call.

        Keys may also be computed from the tensors `beside` and from sizes, the `numbers`, in the
        same order at each call.
        A cache without versions is evidence of nothing. Its index is distrusted, unless whoever
        uses the index notices writes.
        """
        now = torch_private.version_of(cache)
        if self.version != now or (now is None and not self.owner.notices_writes):
            self.owner.distrust()
        same_numbers = list(numbers) == list(self.numbers)
        if not same_numbers:
            self.owner.recheck()
        for state, tensor in zip(self.beside, beside, strict=False):
            if self._is_as_it_was(state, tensor):
                continue
            if state.pages is None:
                self.owner.recheck()
            else:
                self.owner.forget(state.pages.first_moved(tensor))
        stays = same_numbers and self.is_beside(beside)
        self.replaced = 0 if stays else self.replaced + 1

    def _is_as_it_was(self, state: TensorState, tensor: Tensor) -> bool:
        if state.version is None and state.pages is None and self.owner.notices_writes:
            return state == TensorState.of(tensor)
        return state.is_of(tensor)

    def is_beside(self, beside: Sequence[Tensor]) -> bool:
        """True if the last call came with the same tensors beside the cache.

        Tables of pages may be others: their entries are compared.
        """
        return len(beside) == len(self.beside) and all(
            state.pages is not None or state.storage == StorageWeakRef(each.untyped_storage())
            for state, each in zip(self.beside, beside, strict=True)
        )

    def note(
        self,
        cache: Tensor,
        beside: Sequence[Tensor],
        numbers: Sequence[int] = (),
        pages: Sequence[int] = (),
    ) -> None:
        """Note the versions of a cache and of the tensors beside it, and the sizes, after a call.

        `pages` are the sizes of pages that the tensors beside list, each 0 if it is no table.
        """
        before = dict(enumerate(self.beside))
        sizes = dict(enumerate(pages))
        self.version, self.numbers = torch_private.version_of(cache), numbers
        self.beside = [
            TensorState.of(each, sizes.get(place, 0), before.get(place))
            for place, each in enumerate(beside)
        ]
        self.uses.count += 1


class CacheRegistry:
    """The indexes of all key caches alive. Threads may share it, each with caches of its own."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry] = {}
        self._lock = threading.Lock()
        self.removals = 0
        """Number of entries taken out so far. While it stays the same, no entry is gone."""

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

    def owner_of(self, cache: Tensor, kind: Hashable) -> IndexOwner | None:
        """Return the owner of the index of `cache` [B, Hkv, L, D], to look into; None: it has none.

        `kind` is an `IndexConfig` for the reference's index. For a GPU index it is the layout, or
        the name of the policy if the cache grows.
        """
        with self._lock:
            entry = self._entries.get(_identity(cache, kind, token_dim=2))
        return None if entry is None else entry.owner

    def index_of(self, cache: Tensor, config: IndexConfig) -> CacheIndex | None:
        """Return the reference's index of `cache`, to look into; None if the cache has none."""
        owner = self.owner_of(cache, config)
        return owner.cache if isinstance(owner, ReferenceCacheIndex) else None

    def acquire(
        self,
        cache: Tensor,
        kind: Hashable,
        token_dim: int,
        make: Callable[[], IndexOwner],
        beside: Sequence[Tensor] = (),
        numbers: Sequence[int] = (),
    ) -> Entry:
        """Return the entry of `cache`, a new one if it has none.

        Keys may also be computed from the tensors `beside` and from sizes, the `numbers`.
        The index is distrusted if the cache may have been written since the last `release`.
        """
        key = _identity(cache, kind, token_dim)
        with self._lock:
            entry = self._entries.get(key)
        if entry is None or entry.storage is None or entry.storage.expired():
            return Entry(make())
        entry.check(cache, beside, numbers)
        return entry

    def release(
        self,
        cache: Tensor,
        kind: Hashable,
        entry: Entry,
        token_dim: int,
        beside: Sequence[Tensor] = (),
        numbers: Sequence[int] = (),
        pages: Sequence[int] = (),
    ) -> None:
        """Note that the index of `entry` describes `cache` as it is, now that a graph has run."""
        entry.uses.storage = StorageWeakRef(cache.untyped_storage())
        entry.note(cache, beside, numbers, pages)
        with self._lock:
            self._entries[_identity(cache, kind, token_dim)] = entry

    def drop(self, cache: Tensor, kind: Hashable, token_dim: int) -> None:
        """Forget the index of `cache`: it moved on with a grown cache, or a call broke off."""
        with self._lock:
            self._entries.pop(_identity(cache, kind, token_dim), None)
            self.removals += 1


registry = CacheRegistry()
"""The indexes of this process."""


def _identity(cache: Tensor, kind: Hashable, token_dim: int) -> Hashable:
    """Return what two tensors have in common if they are the same cache, whatever its length.

    The record of a storage stays allocated while an entry refers to it weakly, so that its address
    names the storage.
    """
    sizes = tuple(size for dim, size in enumerate(cache.shape) if dim != token_dim)
    return (
        torch_private.storage_address(cache),
        cache.storage_offset(),
        sizes,
        token_dim,
        cache.stride(),
        cache.dtype,
        kind,
    )
