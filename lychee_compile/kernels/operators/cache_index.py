"""The reference's index of one key cache, kept true while the cache is written and rewound."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.index_log import indexing
from lychee_compile.kernels.out_of_memory import ran_out, warn_of_memory
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.fingerprints import fingerprints
from lychee_compile.kernels.reference.loaded_tensor import row_of
from lychee_compile.kernels.trust import Trust

logger = logging.getLogger(__name__)

SAMPLES = 16
"""Least number of indexed keys of a row that every step compares with their fingerprints, other
keys each time. So a write is found that left no trace in the tensor's version, as one through
`.data` or a raw kernel."""
LONGEST_STEP = 64
"""Largest number of new keys of a row that are read together with those of other rows."""


@dataclass(frozen=True)
class CacheWrite:
    """A write of one call to a key cache."""

    first: Tensor
    """First slot of each row that a query sees, int64 [B]; L or more if none sees any."""
    positions: Tensor
    """Slots written, int64 [B, T]."""
    strengths: Tensor | None
    """Strength of the boundary after each token written, uint8 [B, T]; None if not known."""
    seen_end: Tensor | None = None
    """Slot of each row after the last one that a query sees, int64 [B]; None: the slot after the
    last one written."""

    @property
    def end(self) -> Tensor:
        """Slot after the last one that holds a key, int64 [B]."""
        written = self.positions.max(1).values + 1
        return written if self.seen_end is None else torch.maximum(written, self.seen_end)

    @property
    def wraps(self) -> Tensor:
        """Rows that see slots behind one written, and not written themselves: bool [B].

        As in a ring buffer that is full. The keys behind the slots written stay then. Otherwise
        they are gone.
        """
        return self.end - self.positions.min(1).values > self.positions.shape[1]


class CacheIndex:
    """The index of one key cache [B, Hkv, L, D], and the evidence that it describes the cache.

    Every indexed key has a fingerprint. A write at a position forgets all keys from there on. If
    the row goes on seeing later ones (`CacheWrite.wraps`), it replaces the keys written instead. A
    distrusted index is compared with the cache key by key before it is used again, and keys that
    differ are indexed anew.
    """

    def __init__(self, key: Tensor, config: IndexConfig) -> None:
        self.config = config
        self.trust = Trust.TRUSTED
        """Trust in the index, which is empty at first and so describes every cache."""
        self.updates = 0
        """Number of updates so far."""
        self._empty(key)

    def _empty(self, key: Tensor) -> None:
        """Begin with an index of no key."""
        batch, heads, _, head_dim = key.shape
        self.index = make_index(batch, heads, head_dim, self.config, key.device)
        self.known = torch.zeros(batch, dtype=torch.int64, device=key.device)
        """Number of keys of each row that have a fingerprint, int64 [B]."""
        self.fingerprint = torch.zeros(batch, 0, dtype=torch.int64, device=key.device)
        """Fingerprints of the keys in the first slots, int64 [B, N]."""

    def distrust(self) -> None:
        """Compare all known keys at the next update: somebody else may have written the cache."""
        if self.trust is Trust.TRUSTED:
            self.trust = Trust.DISTRUSTED

    def forget(self, first: Tensor) -> None:
        """Forget the keys of each row from the slot `first` [b], int64 [B], on: they have moved."""
        if self.trust is not Trust.GIVEN_UP and len(first) == len(self.known):
            self._forget(first)

    def update(self, key: Tensor, write: CacheWrite, build: bool) -> None:
        """Follow a write to the cache `key` [B, Hkv, L, D].

        With `build` the index is brought up to date. Without, as in a dense prefill, only what
        cannot be learnt later is noted. If memory runs out, the index is given up, with a warning:
        it stays empty, so that attention reads every visible key.
        """
        if self.trust is Trust.GIVEN_UP:
            return
        try:
            self._follow(key, write, build)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            self.trust = Trust.GIVEN_UP
            self._empty(key)
            warn_of_memory()

    def _follow(self, key: Tensor, write: CacheWrite, build: bool) -> None:
        self.updates += 1
        end, wraps = write.end, write.wraps & build
        self._forget(torch.where(wraps, self.known, write.positions.min(1).values))
        replaced = wraps[:, None] & (write.positions < self.known[:, None])
        self._take_again(key, write.positions, replaced)
        if self.trust is Trust.DISTRUSTED or self._sample_differs(key):
            self._compare(key)
        self.trust = Trust.TRUSTED
        self._restart(write.first, key.shape[2])
        if write.strengths is not None:
            self.index.strengths.note(write.positions, write.strengths)
        self._fingerprint(key, end)
        if build:
            with indexing(key, int((end - self.index.tail).max())):
                self._build(key, write.positions, wraps, end)

    def _build(self, key: Tensor, positions: Tensor, wraps: Tensor, end: Tensor) -> None:
        """Bring the index up to date with the slots `positions`, int64 [B, T], just written.

        The rows that wrap, bool [B], hold keys behind them. All rows end at `end`, int64 [B].
        """
        index = self.index
        held = (positions >= index.start[:, None]) & (positions < index.tail[:, None])
        held &= wraps[:, None]
        # Rows of packed requests wrap too, but may still grow.
        full = wraps & ((index.end == end) | (index.tail == index.start))
        index.newest = None
        index.step = positions.min(1).values
        index.fresh = torch.where(wraps, end, index.step)
        if bool(held.any()):
            index.rewrite(key, torch.where(held, positions, -1))
        index.extend(key, end)
        if bool(wraps.any()):
            index.close(key, full)
            index.newest = torch.where(wraps[:, None], positions, key.shape[2])

    def _take_again(self, key: Tensor, positions: Tensor, replaced: Tensor) -> None:
        """Take fingerprints at `positions`, int64 [B, T], anew where `replaced`, bool [B, T]."""
        if not bool(replaced.any()):
            return
        self._take(key, positions, replaced)

    def _restart(self, first: Tensor, length: int) -> None:
        """Empty the rows that begin before their index does, or begin elsewhere and are empty.

        Rows that see nothing stay as they are.
        """
        first = torch.where(first < length, first, self.index.start)
        earlier = first < self.index.start
        fresh = self.index.tail == self.index.start
        if bool((earlier | (fresh & (first != self.index.start))).any()):
            self.index.restart(earlier | fresh, first)

    def _forget(self, keep: Tensor) -> None:
        """Forget the keys from position `keep`, int64 [B], on: they are not those indexed."""
        if bool((keep < self.known).any()):
            self.known = torch.minimum(self.known, keep)
            self.index.truncate(self.known)

    def _fingerprint(self, key: Tensor, end: Tensor) -> None:
        """Take the fingerprints of the keys from the last known one to `end`, int64 [B].

        Rows that have few new keys may have them at very different places.
        """
        count = end - self.known
        if not bool((count > 0).any()):
            return
        self._reserve(int(end.max()), key.shape[2])
        few = (count > 0) & (count <= LONGEST_STEP)
        if bool(few.any()):
            slot = self.known[:, None] + torch.arange(int(count[few].max()), device=key.device)
            self._take(key, slot, few[:, None] & (slot < end[:, None]))
        for row in (count > LONGEST_STEP).nonzero().flatten().tolist():
            begin, last = int(self.known[row]), int(end[row])
            keys = row_of(key, row)[:, :, begin:last]
            self.fingerprint[row, begin:last] = fingerprints(keys)[0]
        self.known = torch.maximum(self.known, end)

    def _reserve(self, last: int, length: int) -> None:
        """Make room for fingerprints of the first `last` keys of a cache of so many slots."""
        room = self.fingerprint.shape[1]
        if last > room:
            more = max(last, min(length, room * 3 // 2)) - room
            self.fingerprint = F.pad(self.fingerprint, (0, more))

    def _take(self, key: Tensor, slot: Tensor, wanted: Tensor) -> None:
        """Take fingerprints at `slot`, int64 [B, T], anew where `wanted`, bool [B, T]."""
        taken = fingerprints(_keys_at(key, torch.where(wanted, slot, 0)))
        row, place = wanted.nonzero(as_tuple=True)
        self.fingerprint[row, slot[row, place]] = taken[row, place]

    def _sample_differs(self, key: Tensor) -> bool:
        """True if one of a few known keys of a row differs from its fingerprint."""
        if int(self.known.max()) == 0:
            return False
        known = self.known[:, None]
        step = (known // SAMPLES).clamp(min=1)
        slot = self.updates % step + step * torch.arange(2 * SAMPLES, device=key.device)
        wanted = slot < known
        slot = torch.where(wanted, slot, 0)
        differs = fingerprints(_keys_at(key, slot)) != self.fingerprint.gather(1, slot)
        return bool((differs & wanted).any())

    def _compare(self, key: Tensor) -> None:
        """Compare every known key. Each row forgets its keys from the first difference on."""
        agreed = self.known.clamp(max=key.shape[2])
        for row in agreed.nonzero().flatten().tolist():
            last = int(agreed[row])
            found = fingerprints(row_of(key, row)[:, :, :last])[0]
            differs = found != self.fingerprint[row, :last]
            if bool(differs.any()):
                agreed[row] = differs.to(torch.uint8).argmax()
        if bool((agreed < self.known).any()):
            logger.info("cached keys changed from position %d on", int(agreed.min()))
        self._forget(agreed)


def _keys_at(key: Tensor, slot: Tensor) -> Tensor:
    """Return keys [B, Hkv, T, D] of `key` [B, Hkv, L, D], at slots of each row, int64 [B, T]."""
    return key.gather(2, slot[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]))
