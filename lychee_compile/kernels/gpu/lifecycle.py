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

A row can be lost alone. Kernels note that in its number of the header, and read all its keys until
the host has indexed this row anew. The other rows keep their index.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.async_read import AsyncRead
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.record import compare_keys
from lychee_compile.kernels.gpu.lost_rows import MOST_CALLS_TO_WAIT, LostRows
from lychee_compile.kernels.gpu.methods import able, new_index
from lychee_compile.kernels.host_memory import filled_slots, near
from lychee_compile.kernels.index_log import indexing
from lychee_compile.kernels.out_of_memory import warn_of_memory
from lychee_compile.kernels.reference.loaded_tensor import row_of
from lychee_compile.kernels.trust import Trust

WORTHWHILE = 32
"""Number of sparse calls that pay for building an index: one lost sooner waits longer next time."""
REFIT_STRIDE = 37
"""Distance, in calls, between the first refits of caches that were created one after the other,
modulo half an interval between refits. The number is prime, so that caches as many as half an
interval has calls are refitted in different calls, unless 37 divides it."""


LOOK, LOOK_INFERENCE = 64, 16
"""Number of calls after which the host looks if kernels took trust away. For a cache that is an
inference tensor, of which PyTorch counts no versions, it looks more often."""


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
        self._header_read: AsyncRead | None = None
        """The header on its way from the device."""
        self._changed = False
        """True if all keys are to be compared before the next call."""
        self._suspect = False
        """True if the header is to be read after the next call: rows may have been lost."""
        self._lost = LostRows()
        self._compares = False
        """True if kernels can compare all keys with what was indexed."""

    @property
    def trusted(self) -> bool:
        """True if attention over the cache is sparse."""
        return self.trust is Trust.TRUSTED

    @property
    def notices_writes(self) -> bool:
        """True if kernels notice writes by others themselves, or there is nothing to distrust."""
        return self.index is None or able(self.index.layout.policy, "notices_writes")

    def distrust(self) -> None:
        """Read all keys until the index is built anew: somebody else may have written the cache.

        If kernels can compare all keys before the next call, only rows that have changed are lost.
        """
        if self.trusted and self._compares:
            self.recheck()
        else:
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

    def forget(self, first: Tensor) -> None:
        """Distrust each row that has indexed a key in the slot `first` [b], int64 [B], or later.

        Its keys lie in other pages from there on.
        """
        if self.trusted and self.index is not None:
            self.index.lose_rows(first)
            self._suspect, self._sound_calls = True, self._calls

    def before_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor | int]) -> None:
        """Let the device compare all keys if what they are computed from has changed.

        Build the index of a new cache if the host knows how many slots of it hold keys.

        `beside` are the tensors beside `cache`, and then the sizes, that keys are computed from.
        Kernels read all keys of a row of which one has changed, and the host learns of it after the
        call. A row that was lost before is indexed first.
        """
        is_new = self.trust is Trust.DISTRUSTED and self._calls_to_wait == 0 and use.written
        filled = filled_slots(cache) if is_new else None
        if self._header_read is not None or filled is not None:
            self._work(cache, use, beside, filled)
        changed, self._changed = self._changed, False
        if changed and self.trusted and self.index is not None:
            parts = self.index.parts._asdict()
            with torch.cuda.device_of(cache):
                key = use.keys(cache, *beside)
                compare_keys(load(use.kernel), key, parts["header"], parts["fingerprints"])
            self._suspect, self._sound_calls = True, self._calls

    def after_call(self, cache: Tensor, use: CacheUse, beside: Sequence[Tensor | int] = ()) -> None:
        """Build or refit the index if that is due, now that a graph has run on `cache`.

        `beside` are the other tensors, and then the sizes, that keys are computed from.
        """
        self._calls += 1
        if self._header_read is not None:
            self._header_read.written += use.written
        if self.trust is Trust.TRUSTED:
            looks = self._suspect or self._calls >= self._next_look
            due = self._header_read is not None or looks
        else:
            due = self.trust is Trust.DISTRUSTED and self._calls > self._calls_to_wait
        if due:
            self._work(cache, use, beside)

    def delay_build(self) -> None:
        """Build the index only if a second call comes, and distrust an index that exists."""
        if self.trusted:
            self._lose(self._calls)
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

    def _work(
        self,
        cache: Tensor,
        use: CacheUse,
        beside: Sequence[Tensor | int],
        filled: int | None = None,
    ) -> None:
        """Build the index, look at the header if it has arrived, or ask for it.

        `filled` is the number of slots that hold keys; None: the last call has noted it.
        """
        shown = partial(use.keys, cache, *beside)
        try:
            with torch.cuda.device_of(cache):
                if not self.trusted:
                    self._build(shown(), use, filled)
                    self._plan_look(cache)
                elif self._header_read is not None:
                    self._look(cache, use, shown, self._header_read)
                elif self.index is not None:
                    self._suspect = False
                    self._header_read = AsyncRead(self.index.parts.header, self._calls)
        except torch.OutOfMemoryError:
            self.give_up()
        except BaseException:
            self._revoke()
            raise

    def _build(self, key: Tensor, use: CacheUse, filled: int | None) -> None:
        """Build the index up to slot `filled`, or to where the last call has left each row."""
        if filled is not None:
            ends = [min(filled, key.shape[2])] * key.shape[0]
        elif use.written:
            ends = self._ends(key)
        else:  # a graph that only reads does not know which slots hold keys: all do no harm
            ends = [key.shape[2]] * key.shape[0]
        with indexing(key, max(ends)):
            self.index = self._index_for(key, use)
            self.index.build(load(use.kernel), near(key), ends)
        self.trust, self._calls = Trust.TRUSTED, 0
        self._fitted = ends
        after = self._refit_after(ends, use)
        # The layers of a model are built in the same call, and refitted in different ones.
        self._next_refit = after + self._turn * REFIT_STRIDE % max(after // 2, 1)
        self._sound_calls = 0
        self._lost, self._suspect = LostRows(), False
        self._compares = hasattr(load(use.kernel), "compare_keys")

    def _plan_look(self, cache: Tensor) -> None:
        """Decide at which call the header is read next."""
        self._next_look = self._next_refit
        if self.notices_writes:
            every = LOOK_INFERENCE if cache.is_inference() else LOOK
            # Layers look in different calls.
            look = self._calls + every - (self._calls + self._turn) % every
            self._next_look = min(look, self._next_refit)
        lost = self._lost.next_due
        if lost is not None:
            self._next_look = min(self._next_look, lost)

    def _look(
        self,
        cache: Tensor,
        use: CacheUse,
        shown: Callable[[], Tensor],
        header_read: AsyncRead,
    ) -> None:
        """Distrust, mend or refit the index by its header, once that has arrived."""
        if not header_read.has_arrived():
            return
        self._header_read = None
        trust, *ends = header_read.values()
        key = shown() if min(ends) < 0 or header_read.calls >= self._next_refit else None
        rows = ends if key is None else ends[: key.shape[0]]
        if trust != 1 or max(rows) < 0:
            self._lose(self._sound_calls)
            return
        self._sound_calls = header_read.calls
        if key is not None:
            lost = [row for row, end in enumerate(rows) if end < 0]
            seen = [end if end >= 0 else ~end for end in rows]
            self._mend(key, use, lost, seen, header_read.written)
            if header_read.calls >= self._next_refit:
                self._refit(key, use, seen, header_read.written)
        self._plan_look(cache)

    def _mend(
        self, key: Tensor, use: CacheUse, lost: Sequence[int], seen: Sequence[int], written: int
    ) -> None:
        """Index the lost rows anew; `seen` are the ends of rows, `written` tokens ago at most.

        A row that has moved on further since is noticed by kernels at its next step.
        """
        assert self.index is not None
        module, layout = load(use.kernel), self.index.layout
        for row in self._lost.ready(lost, self._calls):
            end = min(seen[row] + written, key.shape[2])
            mine = row_of(key, row)
            with indexing(mine, end):
                alone = new_index(layout.resized(layout.slots, 1), self.index.state.device)
                alone.build(module, near(mine), [end])
                self.index.take_row(row, alone)
            self._fitted = [end if at == row else each for at, each in enumerate(self._fitted)]
            after = self._refit_after([end], use)
            self._next_refit = min(self._next_refit, self._calls + after)

    def _refit(self, key: Tensor, use: CacheUse, seen: Sequence[int], written: int) -> None:
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


_turns = itertools.count()
