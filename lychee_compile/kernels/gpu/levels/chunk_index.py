"""The index of one key cache on a device for policies that read chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.index import DeviceIndex
from lychee_compile.kernels.gpu.levels.index import LevelDeviceIndex, columns_of
from lychee_compile.kernels.gpu.levels.layout import LevelLayout
from lychee_compile.kernels.reference.child_lists import ChildLists
from lychee_compile.kernels.reference.chunk_table import (
    bounds_of,
    cut_more,
    decided,
    mean_of_chunks,
    numbers_of_slots,
    summarise_chunks,
)
from lychee_compile.kernels.reference.chunking import similarity_strengths
from lychee_compile.kernels.reference.clustered import (
    REBUILD,
    REFIT,
    label_chunks,
    labels_of_slots,
    refit_after,
    write_columns,
)

COMPARED_AT_ONCE = 8192
"""Number of keys of a row whose boundaries are rated at a time, to bound the memory of building."""


class ChunkTables:
    """Chunks of one cache, and clusters of these, in memory that an index has for them."""

    def __init__(self, layout: LevelLayout, named: Mapping[str, Tensor]) -> None:
        self.layout, self.named = layout, named
        self.clustered = 0
        """Number of chunks, in the row with most, when all were last clustered."""

    def build(self, key: Tensor, ends: Sequence[int]) -> None:
        """Cut, summarise and cluster the keys in the slots [0, ends[b]) of `key` [B, Hkv, L, D].

        The memory is all zeros before.
        """
        rows, last = len(ends), max(ends)
        end = torch.tensor(ends, device=key.device)
        start, chunk = torch.zeros_like(end), self.layout.settings.chunk
        strength = self._strengths(key[:, :, :last])
        span = torch.zeros_like(self.named["span"][:rows, 0])
        number, real = cut_more(span, strength, start, end, chunk)
        self.named["strength"][:rows, :, :last] = strength[:, None]
        self.named["span"][:rows] = span[:, None]
        last_level = len(self.layout.stack.levels) - 1
        into = columns_of(self.layout.stack, self.named, last_level, rows)
        summarise_chunks(self.layout.stack.levels[-1], key, span, number, real, start, chunk, into)
        self.clustered = 0
        self.refit(key, end)

    def refit(self, key: Tensor, end: Tensor) -> None:
        """Add the chunks that have come since to clusters, or cluster all anew if they are many.

        Rows end at `end`, int64 [B].
        """
        if int(end.max()) >= REFIT:
            self._fit(key, end)

    def _strengths(self, key: Tensor) -> Tensor:
        """Return the strength of the boundary behind each of the keys, uint8 [B, L]."""
        batch, _, length, _ = key.shape
        strength = torch.zeros(batch, length, dtype=torch.uint8, device=key.device)
        if self.layout.settings.by_similarity:
            for begin in range(0, length - 1, COMPARED_AT_ONCE):
                block = similarity_strengths(key[:, :, begin : begin + COMPARED_AT_ONCE + 1])
                strength[:, begin : begin + block.shape[1]] = block
        return strength

    def _fit(self, key: Tensor, end: Tensor) -> None:
        """Label the chunks in the slots [0, end), int64 [B], and take the numbers of clusters."""
        above, chunk = self.layout.stack.levels[:-1], self.layout.settings.chunk
        if not above:
            return
        rows, heads, last = len(end), self.layout.kv_heads, int(end.max())
        numbers = self.layout.settings.chunks_in(last)
        span, start = self.named["span"][:rows, 0, :numbers], torch.zeros_like(end)
        used = decided(span, end, chunk)
        tokens = torch.where(used, bounds_of(span, chunk)[1], 0)[:, None].expand(-1, heads, -1)
        mean = mean_of_chunks(key, span, start, chunk)
        count = int(used.sum(1).max())
        rebuild = count >= REBUILD * self.clustered
        before = [self.named[f"label_{number}"][:rows].long() - 1 for number in self._below]
        before[-1] = before[-1][:, :, :numbers]
        labels = label_chunks(
            above, mean, tokens, None if rebuild else before, self.layout.settings
        )
        self.clustered = count if rebuild else self.clustered
        of_slot = numbers_of_slots(span, used, last, chunk)
        for number, label in enumerate(labels_of_slots(labels, of_slot)):
            none = torch.zeros_like(label[..., 0])
            into = columns_of(self.layout.stack, self.named, number, rows)
            write_columns(above[number], key, label, into, none)
        self._list(labels, used)

    @property
    def _below(self) -> range:
        """The levels whose groups are in clusters."""
        return range(1, len(self.layout.stack.levels))

    def _list(self, labels: Sequence[Tensor], used: Tensor) -> None:
        """Keep the labels of the groups of each level, int64 [B, Hkv, N], as lists by cluster.

        `used`, bool [B, N], are the chunks that there are.
        """
        rows, named, groups = len(used), self.named, self.layout.groups
        for number, short in zip(self._below, labels, strict=True):
            room = groups[number] - short.shape[2]
            label = torch.nn.functional.pad(short, (0, room), value=-1)
            if f"tokens_{number}" in named:
                there = named[f"tokens_{number}"][:rows] > 0
            else:
                there = torch.nn.functional.pad(used, (0, room))[:, None]
            lists = ChildLists.of(label, groups[number - 1])
            named[f"label_{number}"][:rows] = (label + 1).to(torch.int32)
            named[f"order_{number}"][:rows] = lists.member.to(torch.int32)
            named[f"open_{number}"][:rows, :, 0] = first_open(label, there).to(torch.int32)
            named[f"begin_{number - 1}"][:rows] = lists.bounds[..., :-1].to(torch.int32)
            named[f"children_{number - 1}"][:rows] = lists.bounds.diff().to(torch.int32)


class ChunkDeviceIndex(LevelDeviceIndex):
    """Chunks of one cache, and clusters of these. Kernels cut and summarise what steps append."""

    def __init__(self, layout: LevelLayout, device: torch.device) -> None:
        super().__init__(layout, device)
        self.tables = ChunkTables(layout, self.named)
        """Tables of the chunks and of their clusters."""

    def _take_counts(self, other: DeviceIndex) -> None:
        if isinstance(other, ChunkDeviceIndex):
            self.tables.clustered = max(self.tables.clustered, other.tables.clustered)

    def build(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Cut, summarise and cluster the keys in the slots [0, ends[b]) of `key` [B, Hkv, L, D]."""
        self.clear()
        self.tables.build(key, ends)
        self.record(module, key, ends)

    def refit_after(self, end: int) -> int:
        """Return how many keys may follow those in the slots [0, end) before the next `refit`."""
        return refit_after(end)

    def refit(self, module: ModuleType, key: Tensor, ends: Sequence[int]) -> None:
        """Add the chunks that have come since to clusters, or cluster all anew if they are many."""
        self.tables.refit(key, self.written(len(ends)))


def first_open(label: Tensor, used: Tensor) -> Tensor:
    """Return the first group that is `used`, bool [B, Hkv, N], and in no cluster: [B, Hkv].

    `label`, int64 [B, Hkv, N], is the cluster of each group; -1: none. If all are in one, the
    result is N.
    """
    number = torch.arange(label.shape[-1], device=label.device)
    waits = torch.where(used & (label < 0), number, label.shape[-1])
    return torch.nn.functional.pad(waits, (0, 1), value=label.shape[-1]).amin(-1)
