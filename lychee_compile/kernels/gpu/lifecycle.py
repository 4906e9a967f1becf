"""When an index by slot is built, trusted and refitted; what happens between is up to the kernels.

A cache that is new, or that somebody else has written, is read in full by the next call. Then its
index is built, and from the next call on attention is sparse.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.common.layout import IndexLayout
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.operators.cache_index import WORTH_LOGGING
from lychee_compile.kernels.out_of_memory import warn_of_memory

logger = logging.getLogger(__name__)

WORTHWHILE = 32
"""Sparse calls that pay for building an index: one that lived shorter makes us wait longer."""
MOST_CALLS_TO_WAIT = 1023
"""Calls that a cache has to stay ours before its index is built, at most."""


@dataclass(frozen=True)
class CacheUse:
    """How one graph uses a key cache whose index is addressed by slot."""

    kernel: str
    """The module that attends to it."""
    keys: Callable[[Tensor], Tensor]
    """Shows the cache as [B, Hkv, L, D]."""
    written: int
    """Tokens that a call writes; 0 where it only reads."""
    layout: IndexLayout | None
    """Layout of the index, if the size of the cache is known when compiling and stays."""
    policy: str
    """Name of the policy whose kernels read the index."""

    @property
    def kind(self) -> IndexLayout | str:
        """Layout of the index, or its policy if the cache grows: graphs share indexes of a kind."""
        return self.policy if self.layout is None else self.layout


class IndexLifecycle:
    """Whether the index of one key cache may be trusted, and what it takes to get there."""

    index: DeviceIndex | None

    def __init__(self) -> None:
        self.trusted = False
        """Whether the index describes the keys: attention over the cache is sparse."""
        self._calls = 0  # since trust was won, or the cache was last written by somebody else
        self._calls_to_wait: float = 0
        self._turn = next(_turns)
        self._next_refit = 0
        self._fitted: Sequence[int] = ()  # ends of rows at the last fit
        self._peek: _AsyncRead | None = None

    def distrust(self) -> None:
        """Somebody else may have written the cache: read all of it until the index is rebuilt."""
        if self.trusted:
            soon = self._calls < WORTHWHILE
            self._calls_to_wait = (
                min(2 * self._calls_to_wait + 1, MOST_CALLS_TO_WAIT) if soon else 0
            )
            self._revoke()
        self._calls = 0

    def after_call(self, cache: Tensor, use: CacheUse) -> None:
        """A graph has run on `cache`: build or refit the index where that is due."""
        self._calls += 1
        building = not self.trusted and self._calls > self._calls_to_wait
        refitting = self.trusted and (self._calls == self._next_refit or self._peek is not None)
        if building or refitting:
            with torch.cuda.device_of(cache):
                self._work(cache, use)

    def delay_build(self) -> None:
        """Build the index only if a second call comes."""
        self._calls_to_wait = max(self._calls_to_wait, 1)

    def never_build(self) -> None:
        """Stay exact from now on."""
        self._calls_to_wait = math.inf

    def _index_for(self, key: Tensor, use: CacheUse) -> DeviceIndex:
        """The index to build over `key` [B, Hkv, L, D]."""
        raise NotImplementedError

    def _ends(self, key: Tensor) -> list[int]:
        """Slots of each row of `key` that hold keys; waits for the device."""
        raise NotImplementedError

    def _revoke(self) -> None:
        self.trusted, self._peek = False, None
        if self.index is not None:
            self.index.distrust()

    def _work(self, cache: Tensor, use: CacheUse) -> None:
        try:
            if not self.trusted:
                self._build(use.keys(cache), use)
            elif self._peek is not None:
                self._refit(cache, use, self._peek)
            elif self.index is not None:
                self._peek = _AsyncRead(self.index.parts.header[1:])
        except torch.OutOfMemoryError:
            self._revoke()
            self.never_build()
            warn_of_memory()
        except BaseException:
            self._revoke()
            raise

    def _build(self, key: Tensor, use: CacheUse) -> None:
        # A graph that only reads cannot say how far the keys go; slots without one do no harm.
        ends = self._ends(key) if use.written else [key.shape[2]] * key.shape[0]
        started = time.perf_counter()
        self.index = self._index_for(key, use)
        self.index.build(load(use.kernel), key, ends)
        self.trusted, self._calls = True, 0
        self._fitted = ends
        after = self._refit_after(ends, use)  # layers are not all refitted in one step
        self._next_refit = after + self._turn * 37 % max(after // 2, 1)
        end = max(ends)
        if end > WORTH_LOGGING and logger.isEnabledFor(logging.INFO):
            if key.is_cuda:
                torch.cuda.synchronize(key.device)
            took = 1e3 * (time.perf_counter() - started)
            logger.info("indexed %d tokens of %d KV heads in %.0f ms", end, key.shape[1], took)

    def _refit(self, cache: Tensor, use: CacheUse, peek: _AsyncRead) -> None:
        """Fit the newest block anew, once it is known which that is."""
        assert self.index is not None
        peek.written += use.written
        if peek.is_there():
            self._peek, key = None, use.keys(cache)
            seen = peek.values()[: key.shape[0]]
            ends = [min(end + peek.written, key.shape[2]) for end in seen]
            if max(ends) > 0:
                self.index.refit(load(use.kernel), key, ends)
            # A row that stands still, whose text has ended, calls for nothing.
            before = zip(seen, self._fitted, strict=False)
            moved = [ends[row] for row, (now, then) in enumerate(before) if now != then]
            self._fitted = seen
            self._next_refit = self._calls + self._refit_after(moved or ends, use)

    def _refit_after(self, ends: Sequence[int], use: CacheUse) -> int:
        """Calls until the next refit, where so many slots of each row hold keys."""
        assert self.index is not None
        soonest = min(self.index.refit_after(max(end, 1)) for end in ends)
        return -(-soonest // max(use.written, 1))


class _AsyncRead:
    """Numbers on their way from the device, for which nobody waits."""

    def __init__(self, numbers: Tensor) -> None:
        self.written = 0
        """Tokens written since, at most."""
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event() if numbers.is_cuda else None
        if self._event is not None:
            self._event.record()

    def is_there(self) -> bool:
        return self._event is None or self._event.query()

    def values(self) -> list[int]:
        return self._host.tolist()


_turns = itertools.count()
