"""Clusters above the chunks of one cache, level by level, and when they are fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.reference.child_lists import ChildLists, Listed
from lychee_compile.kernels.reference.chunk_table import bounds_of, mean_of_chunks, numbers_of_slots
from lychee_compile.kernels.reference.clustered import (
    REBUILD,
    Columns,
    label_chunks,
    labels_of_slots,
    merge_columns,
    refit_after,
    write_columns,
)
from lychee_compile.kernels.reference.level_values import follows_from_moments, moments
from lychee_compile.kernels.reference.runs import packed
from lychee_compile.kernels.reference.uneven_index import empty_columns, with_room


class ChunkClusters:
    """Levels of clusters above chunks: labels, columns, and lists of the groups below each."""

    def __init__(
        self, levels: Sequence[Level], batch: int, heads: int, head_dim: int, device: torch.device
    ) -> None:
        self.levels = levels
        """Levels from coarse to fine; the last is that of the chunks."""
        empty = [empty_columns(each, batch, heads, head_dim, device) for each in levels[:-1]]
        self.columns: list[Columns] = empty
        """Numbers of the clusters of each level, see `clustered`."""
        none = torch.zeros(batch, heads, 0, dtype=torch.int64, device=device)
        self.labels = [none.clone() for _ in levels[:-1]]
        """Cluster of each group of the level below, int64 [B, Hkv, N]; -1: none."""
        self.fitted = torch.zeros(batch, dtype=torch.int64, device=device)
        """Number of tokens of each row at the last fit, int64 [B]."""
        self.rewritten = self.fitted.clone()
        """Number of slots of each row written anew since the last fit, int64 [B]."""
        self.aged = 0
        """Number of slots written anew since all were last clustered, in the row with most."""
        self.clustered = 0
        """Number of chunks, in the row with most, when all were last clustered."""
        self.frozen = False
        """True if chunks that were clustered once are never clustered anew."""
        self._lists: list[ChildLists] = []
        self._free: tuple[Tensor, Tensor] | None = None

    @property
    def fitted_any(self) -> bool:
        """True if there are clusters."""
        return bool(self.columns) and self.columns[-1]["tokens"].shape[2] > 0

    def is_due(self, end: Tensor) -> bool:
        """True if enough tokens have come since the last fit, in rows that end at `end`."""
        if not self.levels[:-1]:
            return False
        since = zip(
            (end - self.fitted + self.rewritten).tolist(), self.fitted.tolist(), strict=True
        )
        return any(count >= refit_after(fitted) for count, fitted in since)

    def fit(
        self,
        key: Tensor,
        span: Tensor,
        used: Tensor,
        fields: Columns,
        start: Tensor,
        end: Tensor,
        settings: GroupSettings,
    ) -> None:
        """Add the chunks `used`, bool [B, N], to clusters, or cluster all anew.

        They are all clustered anew if they are `REBUILD` times as many as before, or as many of
        their keys were written anew. `span` and `fields` are those of chunks by number. Rows are
        the slots [start, end), each int64 [B], of `key` [B, Hkv, L, D].
        """
        low, length = bounds_of(span, settings.chunk)
        tokens = torch.where(used, low + length - torch.maximum(low, start[:, None]), 0)
        chunks = {"tokens": tokens.clamp(min=0), "first": torch.maximum(low, start[:, None])}
        chunks["end"] = low + length
        heads = key.shape[1]
        chunks = {name: each[:, None].expand(-1, heads, -1) for name, each in chunks.items()}
        mean = moments(self.levels[-1], fields)[0]
        mean = mean_of_chunks(key, span, start, settings.chunk) if mean is None else mean
        self._label(mean, chunks["tokens"], int(used.sum(1).max()), int(end.max()), settings)
        self.fitted, self.rewritten = end.clone(), torch.zeros_like(end)

        def chunk_of_slot() -> Tensor:
            found = numbers_of_slots(span, used, int(end.max()), settings.chunk)
            before = torch.arange(found.shape[1], device=key.device) < start[:, None]
            return found.masked_fill(before, -1)

        self._write(key, chunk_of_slot, {**chunks, **fields})

    def forget(self, keep: Tensor) -> None:
        """Fit again when tokens from position `keep`, int64 [B], on have come again."""
        self.fitted = torch.minimum(self.fitted, keep)

    def restart(self, rows: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set."""
        self.fitted, self.rewritten = (
            torch.where(rows, 0, each) for each in (self.fitted, self.rewritten)
        )
        wide = rows[:, None, None]
        self.relabel([torch.where(wide, -1, each) for each in self.labels])
        for columns in self.columns:
            columns["tokens"] = torch.where(wide, 0, columns["tokens"])

    def count_rewritten(self, slots: Tensor) -> None:
        """Count slots of each row that were written anew, int64 [B]."""
        self.rewritten = self.rewritten + slots
        self.aged += int(slots.max())

    def free(self, row: Tensor, number: Tensor) -> None:
        """Take the chunks `number` of the rows `row`, each int64 [M], out of their clusters."""
        self._free = None
        if self.labels:
            self.labels[-1][row, :, number] = -1

    def reserve(self, count: int) -> None:
        """Make room for `count` chunks in each row."""
        if self.labels:
            more = count - self.labels[-1].shape[2]
            self.labels[-1] = F.pad(self.labels[-1], (0, more), value=-1)

    def relabel(self, labels: list[Tensor]) -> None:
        """Replace all labels, from coarse to fine; the columns are those of these labels."""
        self.labels, self._lists, self._free = labels, [], None

    def below(self, number: int, kept: Tensor, parents: Listed | None) -> Listed:
        """Return the groups below the clusters of a level that are `kept`, see `ChildLists`."""
        if not self._lists:
            counts = [columns["tokens"].shape[2] for columns in self.columns]
            self._lists = [
                ChildLists.of(label, count)
                for label, count in zip(self.labels, counts, strict=True)
            ]
        return self._lists[number].below(kept, parents, self.labels[number])

    def with_free(self, listed: Listed, span: Tensor) -> Listed:
        """Return the listed chunks and all that are in no cluster; `span` is that of the chunks."""
        label = self.labels[-1]
        if self._free is None:
            self._free = packed((span > 0) & (label < 0).any(1))
        number, real = (each[:, None].expand(-1, label.shape[1], -1) for each in self._free)
        real = real & (label.gather(-1, number) < 0)
        real = real[:, :, None].expand(-1, -1, listed.within.shape[2], -1)
        return Listed.of(
            torch.cat((listed.number, number), -1), torch.cat((listed.within, real), -1)
        )

    def _label(
        self, mean: Tensor, tokens: Tensor, count: int, last: int, settings: GroupSettings
    ) -> None:
        """Label the chunks, of which the fullest row has `count`."""
        rebuild = count >= REBUILD * self.clustered or REBUILD * self.aged >= last
        rebuild = self.clustered == 0 or (rebuild and not self.frozen)
        before = None if rebuild else self.labels
        self.relabel(label_chunks(self.levels[:-1], mean, tokens, before, settings))
        if rebuild:
            self.clustered, self.aged = count, 0

    def _write(self, key: Tensor, chunk_of_slot: Callable[[], Tensor], parts: Columns) -> None:
        """Write the columns of clusters, from the groups below them or from the keys.

        `chunk_of_slot` tells the chunk of each slot, int64 [B, L], -1 for none; `parts` are the
        columns of the chunks.
        """
        by_slot: list[Tensor] = []
        for number in reversed(range(len(self.labels))):
            more = parts["tokens"].shape[2] - self.labels[number].shape[2]
            self.labels[number] = F.pad(self.labels[number], (0, more), value=-1)
            level, label = self.levels[number], self.labels[number]
            columns = with_room(self.columns[number], max(int(label.max()) + 1, 1))
            mean, variance = moments(self.levels[number + 1], parts)
            if mean is not None and variance is not None and follows_from_moments(level):
                merge_columns(level, parts | {"mean": mean, "variance": variance}, label, columns)
            else:
                by_slot = by_slot or labels_of_slots(self.labels, chunk_of_slot())
                none = torch.zeros_like(label[..., 0])
                write_columns(level, key, by_slot[number], columns, none)
            self.columns[number] = parts = columns
