"""The index of one key cache, kept true while the cache is written, rewound and reused."""

from __future__ import annotations

import logging
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.out_of_memory import ran_out, warn_of_memory
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.fingerprints import fingerprints

logger = logging.getLogger(__name__)

WORTH_LOGGING = 512
"""Tokens that an update of a prompt indexes, at least."""
SAMPLES = 16
"""Indexed keys compared with their fingerprints at every step, a different set each time: finds a
write that left no trace in the tensor's version, such as one through `.data` or a raw kernel."""


class CacheIndex:
    """Index over one key cache [B, Hkv, L, D], and what proves that it still describes it.

    Every indexed key has a fingerprint. A write at a position forgets what lies behind it; a cache
    whose version moved without us (`suspect`) is compared key by key before it is used again, and
    what differs is indexed anew.
    """

    def __init__(self, key: Tensor, config: IndexConfig) -> None:
        self.config = config
        self.suspect = False
        """Whether somebody else may have written the cache since the last update."""
        self.given_up = False
        """Whether memory ran out: the index stays empty, so that every visible key is read."""
        self.updates = 0
        self._empty(key)

    def _empty(self, key: Tensor) -> None:
        """Begin with an index of no key."""
        batch, heads, _, head_dim = key.shape
        self.index = make_index(batch, heads, head_dim, self.config, key.device)
        self.known = torch.zeros(batch, dtype=torch.int64, device=key.device)
        """Keys of each row that have a fingerprint, int64 [B]."""
        self.fingerprint = torch.zeros(batch, 0, dtype=torch.int64, device=key.device)

    def update(
        self,
        key: Tensor,
        first: Tensor,
        positions: Tensor,
        strengths: Tensor | None,
        build: bool,
    ) -> None:
        """Follow the keys just written to `key` [B, Hkv, L, D] at `positions`, int64 [B, T].

        `first` is the first valid slot of each row, int64 [B]; `strengths`, uint8 [B, T], the
        boundary after each token written, where known. With `build` the index is brought up to
        date; without, as in a dense prefill, only what cannot be learnt later is noted. Where
        memory runs out, the index is given up, with a warning.
        """
        if self.given_up:
            return
        try:
            self._follow(key, first, positions, strengths, build)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            self.given_up = True
            self._empty(key)
            warn_of_memory()

    def _follow(
        self,
        key: Tensor,
        first: Tensor,
        positions: Tensor,
        strengths: Tensor | None,
        build: bool,
    ) -> None:
        self.updates += 1
        written = positions.min(1).values
        end = positions.max(1).values + 1
        self._forget(written)
        if self.suspect or self._sample_differs(key):
            self._compare(key)
        self.suspect = False
        earlier = first < self.index.start
        fresh = self.index.tail == self.index.start
        if bool((earlier | (fresh & (first != self.index.start))).any()):
            self.index.restart(earlier | fresh, first)
        if strengths is not None:
            self.index.strengths.note(positions, strengths)
        self._fingerprint(key, end)
        if build:
            self._extend(key, end)

    def _extend(self, key: Tensor, end: Tensor) -> None:
        waiting = int((end - self.index.tail).max())
        started = time.perf_counter()
        self.index.extend(key, end)
        if waiting > WORTH_LOGGING:
            logger.info(
                "indexed %d tokens of %d KV heads in %.0f ms",
                waiting,
                self.index.kv_heads,
                1e3 * (time.perf_counter() - started),
            )

    def _forget(self, keep: Tensor) -> None:
        """Keys from position `keep`, int64 [B], on are not those that were indexed."""
        if bool((keep < self.known).any()):
            self.known = torch.minimum(self.known, keep)
            self.index.truncate(self.known)

    def _fingerprint(self, key: Tensor, end: Tensor) -> None:
        """Take the fingerprints of the keys between the known ones and `end`, int64 [B]."""
        due = self.known < end
        if not bool(due.any()):
            return
        begin, last = int(self.known[due].min()), int(end.max())
        if last > self.fingerprint.shape[1]:
            room = max(last, min(key.shape[2], self.fingerprint.shape[1] * 3 // 2))
            self.fingerprint = F.pad(self.fingerprint, (0, room - self.fingerprint.shape[1]))
        position = torch.arange(begin, last, device=key.device)
        fresh = (position >= self.known[:, None]) & (position < end[:, None])
        old = self.fingerprint[:, begin:last]
        self.fingerprint[:, begin:last] = torch.where(
            fresh, fingerprints(key[:, :, begin:last]), old
        )
        self.known = torch.maximum(self.known, end)

    def _sample_differs(self, key: Tensor) -> bool:
        """Compare a few keys, spread over the known ones and different at every update."""
        known = int(self.known.min())
        if known == 0:
            return False
        step = max(known // SAMPLES, 1)
        slot = torch.arange(self.updates % step, known, step, device=key.device)
        return not torch.equal(
            fingerprints(key.index_select(2, slot)), self.fingerprint.index_select(1, slot)
        )

    def _compare(self, key: Tensor) -> None:
        """Compare every known key and forget those from the first difference on, row by row."""
        last = min(int(self.known.max()), key.shape[2])
        if last == 0:
            return
        position = torch.arange(last, device=key.device)
        differs = fingerprints(key[:, :, :last]) != self.fingerprint[:, :last]
        differs &= position < self.known[:, None]
        agreed = torch.where(differs.any(1), differs.to(torch.uint8).argmax(1), self.known)
        if bool((agreed < self.known).any()):
            logger.info("cached keys changed from position %d on", int(agreed.min()))
        self._forget(torch.clamp(agreed, max=last))
