"""When the GPU index of a key cache is built, trusted, refitted, distrusted and given up.

            first calls: every key is read
        +--------------------------------------+
        v                                      |
    DISTRUSTED --- waited long enough: build ---> TRUSTED ---+  attention is sparse; the newest
        ^                                          |  ^      |  block is refitted now and then
        +------ another writer, or an error -------+  +------+
        |                                          |
        +---- out of memory ----> GIVEN_UP <-------+  every key is read from then on

A new index begins as DISTRUSTED. It is built after the first call on its cache, so that attention
is sparse from the second call on. An index that was distrusted soon after it was built waits longer
the next time: building it did not pay.

`IndexLifecycle.trust` is the record of trust on the host. The first number in the header of a
`DeviceIndex`, which is what kernels see, is 1 only while the index is TRUSTED. There are two kinds
of evidence that somebody else has written a cache. The registry keeps the version of each cache
tensor, and calls `distrust` if it moved. Kernels compare keys with their fingerprints: they take
the trust in the header away at once, and the host, which looks at the header now and then, learns
of it later.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.layout import IndexLayout
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.record import compare_keys
from lychee_compile.kernels.gpu.methods import notices_writes, settings_of
from lychee_compile.kernels.host_memory import near
from lychee_compile.kernels.index_log import indexing
from lychee_compile.kernels.out_of_memory import warn_of_memory
from lychee_compile.kernels.trust import Trust

WORTHWHILE = 32
"""Number of sparse calls that pay for building an index: one lost sooner waits longer next time."""
MOST_CALLS_TO_WAIT = 1023
"""Largest number of calls that a cache has to stay ours before its index is built."""
REFIT_STRIDE = 37
"""Distance, in calls, between the first refits of caches that were created one after the other,
modulo half an interval between refits. The number is prime, so that caches as many as half an
interval has calls are refitted in different calls, unless 37 divides it."""


LOOK, LOOK_INFERENCE = 64, 16
"""Number of calls after which the host looks if kernels took trust away. For a cache that is an
inference tensor, of which PyTorch counts no versions, it looks more often."""


@dataclass(frozen=True)
class CacheUse:
    """Use that one graph makes of a key cache with a GPU index."""

    kernel: str
    """Name of the generated module that attends to the cache."""
    keys: Callable[..., Tensor]
    """Views the cache as keys [B, Hkv, L, D]. If keys are computed from more tensors, these are
    further arguments."""
    written: int
    """Number of tokens that a call writes; 0 if the graph only reads."""
    layout: IndexLayout | None
    """Layout of the index; None if the size of the cache is known only when the graph is called."""
    policy: str
    """Name of the policy whose kernels read the index."""
    measured: bool = False
    """True if the index has parts that certificates alone need."""

    @property
    def kind(self) -> Hashable:
        """Layout, or else policy, settings and if sketches are measured, if they are.

        Graphs that share an index have the same kind.
        """
        if self.layout is not None:
            return self.layout
        if self.measured:
            return self.policy, "measured"
        settings = settings_of(self.kernel)
        return self.policy if settings is None else (self.policy, settings)


class IndexLifecycle(ABC):
    """Decides, for one key cache, when its GPU index is built, refitted and used."""

    tensor: Tensor
    """The tensor that graphs take for the index."""
    index: DeviceIndex | None
    """The index; None while there is no memory for one."""

    def __init__(self) -> None:
        self.trust = Trust.DISTRUSTED
        """Trust in the index; attention over the cache is sparse only while it is TRUSTED."""
        self._calls = 0
        """Number of calls since the index was built, or since another writer was noticed."""
        self._calls_to_wait = 0
        """Number of calls that a distrusted index waits before it is built."""
        self._turn = next(_turns)
        self._next_refit = 0
        self._fitted: Sequence[int] = ()
        """Number of slots of each row that held keys at the last fit."""
        self._next_look = 0
        """Number of the call at which the header is read next, if no refit is due sooner."""
        self._sound_calls = 0
        """Number of calls after which the index was last known to be trusted by kernels."""
        self._header_read: _AsyncRead | None = None
        """The header on its way from the device."""
        self._changed = False
        """True if all keys are to be compared before the next call."""

    @property
    def trusted(self) -> bool:
        """True if attention over the cache is sparse."""
        return self.trust is Trust.TRUSTED

    @property
    def notices_writes(self) -> bool:
        """True if kernels notice writes by others themselves, or there is nothing to distrust."""
        return self.index is None or notices_writes(self.index.layout.policy)

    def distrust(self) -> None:
        """Read all keys until the index is built anew: somebody else may have written the cache."""
        self._lose(self._calls)

    def _lose(self, calls: int) -> None:
        """Distrust an index that was of use for so many calls."""
        if self.trusted:
            lost_soon = calls < WORTHWHILE
            longer = min(2 * self._calls_to_wait + 1, MOST_CALLS_TO_WAIT)
            self._calls_to_wait = longer if lost_soon else 0
            self._revoke()
        self._calls = 0

    def recheck(self) -> None:
        """Compare all keys before the next call: what they are computed from has changed."""
        self._changed = self.trusted

    def before_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor]) -> None:
        """Let the device compare all keys if something beside `cache` has changed.

        `beside` are the other tensors that keys are computed from. If a key has changed, kernels
        read all keys from now on, and the host learns of it after the call.
        """
        changed, self._changed = self._changed, False
        if changed and self.trusted and self.index is not None:
            parts = self.index.parts._asdict()
            with torch.cuda.device_of(cache):
                key = use.keys(cache, *beside)
                compare_keys(load(use.kernel), key, parts["header"], parts["fingerprints"])
            self._next_look = self._calls + 1

    def after_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor] = ()) -> None:
        """Build or refit the index if that is due, now that a graph has run on `cache`.

        `beside` are the other tensors that keys are computed from.
        """
        self._calls += 1
        if self.trust is Trust.TRUSTED:
            due = self._header_read is not None or self._calls >= self._next_look
        else:
            due = self.trust is Trust.DISTRUSTED and self._calls > self._calls_to_wait
        if due:
            with torch.cuda.device_of(cache):
                self._work(cache, use, beside)

    def delay_build(self) -> None:
        """Build the index only if a second call comes, and distrust an index that exists."""
        if self.trusted:
            self.distrust()
        self._calls_to_wait = max(self._calls_to_wait, 1)

    def give_up(self) -> None:
        """Read all keys from now on, with a warning: memory ran out."""
        self._revoke()
        self.trust = Trust.GIVEN_UP
        warn_of_memory()

    @abstractmethod
    def _index_for(self, key: Tensor, use: CacheUse) -> DeviceIndex:
        """Return the index to build over `key` [B, Hkv, L, D]."""

    @abstractmethod
    def _ends(self, key: Tensor) -> list[int]:
        """Return the number of slots of each row of `key` that hold keys; waits for the device."""

    def _revoke(self) -> None:
        if self.trusted:
            self.trust = Trust.DISTRUSTED
        self._header_read = None
        if self.index is not None:
            self.index.distrust()

    def _work(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor]) -> None:
        shown = partial(use.keys, cache, *beside)
        try:
            if not self.trusted:
                self._build(shown(), use)
                self._plan_look(cache)
            elif self._header_read is not None:
                self._look(cache, use, shown, self._header_read)
            elif self.index is not None:
                self._header_read = _AsyncRead(self.index.parts.header, self._calls)
        except torch.OutOfMemoryError:
            self.give_up()
        except BaseException:
            self._revoke()
            raise

    def _build(self, key: Tensor, use: CacheUse) -> None:
        # A graph that only reads does not know which slots hold keys. Indexing all does no harm.
        ends = self._ends(key) if use.written else [key.shape[2]] * key.shape[0]
        with indexing(key, max(ends)):
            self.index = self._index_for(key, use)
            self.index.build(load(use.kernel), near(key), ends)
        self.trust, self._calls = Trust.TRUSTED, 0
        self._fitted = ends
        after = self._refit_after(ends, use)
        # The layers of a model are built in the same call, and refitted in different ones.
        self._next_refit = after + self._turn * REFIT_STRIDE % max(after // 2, 1)
        self._sound_calls = 0

    def _plan_look(self, cache: Tensor) -> None:
        """Decide at which call the header is read next."""
        self._next_look = self._next_refit
        if self.notices_writes:
            every = LOOK_INFERENCE if cache.is_inference() else LOOK
            # Layers look in different calls.
            look = self._calls + every - (self._calls + self._turn) % every
            self._next_look = min(look, self._next_refit)

    def _look(
        self,
        cache: Tensor,
        use: CacheUse,
        shown: Callable[[], Tensor],
        header_read: _AsyncRead,
    ) -> None:
        """Distrust or refit the index by its header, once that has arrived."""
        header_read.written += use.written
        if not header_read.has_arrived():
            return
        self._header_read = None
        trust, *ends = header_read.values()
        if trust != 1:
            self._lose(self._sound_calls)
            return
        self._sound_calls = header_read.calls
        if header_read.calls >= self._next_refit:
            key = shown()
            self._refit(key, use, ends[: key.shape[0]], header_read.written)
        self._plan_look(cache)

    def _refit(self, key: Tensor, use: CacheUse, seen: list[int], written: int) -> None:
        """Fit the newest block anew; `seen` are the ends of rows, `written` tokens ago at most."""
        assert self.index is not None
        ends = [min(end + written, key.shape[2]) for end in seen]
        if max(ends) > 0:
            self.index.refit(load(use.kernel), key, ends)
        # A row that did not move, because its text has ended, needs no refit.
        before = zip(seen, self._fitted, strict=False)
        moved = [ends[row] for row, (now, then) in enumerate(before) if now != then]
        self._fitted = seen
        self._next_refit = self._calls + self._refit_after(moved or ends, use)

    def _refit_after(self, ends: Sequence[int], use: CacheUse) -> int:
        """Return the number of calls until the next refit, for rows that end at `ends`."""
        assert self.index is not None
        soonest = min(self.index.refit_after(max(end, 1)) for end in ends)
        return -(-soonest // max(use.written, 1))


class _AsyncRead:
    """A copy of numbers from the device to the host that nobody waits for."""

    def __init__(self, numbers: Tensor, calls: int) -> None:
        self.calls = calls
        """Number of the call after which the copy began."""
        self.written = 0
        """Largest number of tokens written since the copy began."""
        self._host = torch.empty(
            numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=numbers.is_cuda
        )
        self._host.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event() if numbers.is_cuda else None
        if self._event is not None:
            self._event.record()

    def has_arrived(self) -> bool:
        """True if the numbers can be read."""
        return self._event is None or self._event.query()

    def values(self) -> list[int]:
        """Return the numbers."""
        return self._host.tolist()


_turns = itertools.count()
