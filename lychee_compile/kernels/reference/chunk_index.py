"""The plain form of policies that read chunks whole, below any number of levels of clusters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.reference.chunk_table import (
    bounds_of,
    cut_more,
    decided,
    mean_of_chunks,
    numbers_of_slots,
    open_from,
    summarise_chunks,
)
from lychee_compile.kernels.reference.clustered import (
    REBUILD,
    Columns,
    label_chunks,
    labels_of_slots,
    refit_after,
    write_columns,
)
from lychee_compile.kernels.reference.level_values import bound
from lychee_compile.kernels.reference.question import Question, Runs
from lychee_compile.kernels.reference.uneven_index import (
    UnevenIndex,
    below,
    empty_columns,
    with_room,
)


class ChunkIndex(UnevenIndex):
    """Chunks, which are read whole, and clusters of chunks that say which are looked into.

    Chunks begin at slot 0, whatever the first slot of a row, and are cut as tokens arrive. Those
    that this step has cut cannot be chosen yet. The last one chosen is cut to the budget.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.span = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        """Chunks of each row by number, int32 [B, N], see `chunk_table`."""
        self.open = self.start.clone()
        """First slot of each row that is in no chunk yet, int64 [B]."""
        self.compared = self.start.clone()
        """Number of keys of each row that were compared for boundaries, int64 [B]."""
        self.closed = torch.zeros_like(self.start, dtype=torch.bool)
        """Rows whose last chunk ends where they do, though nothing has decided that, bool [B]."""
        *above, last = self.stack.levels
        empty = [
            empty_columns(each, batch, kv_heads, head_dim, device) for each in self.stack.levels
        ]
        self.clusters: list[Columns] = empty[:-1]
        """Numbers of the clusters of each level, from coarse to fine."""
        self.fields = {name: empty[-1][name] for name in last.fields}
        """Fields of chunks by number, float32 [B, Hkv, N, D or 1]."""
        self.labels = [empty[-1]["tokens"].clone() for _ in above]
        """Cluster of each group of the level below, int64 [B, Hkv, N]; -1: none."""
        self.fitted = self.start.clone()
        """Number of tokens of each row at the last fit of clusters, int64 [B]."""
        self.clustered = 0
        """Number of chunks, in the row with most, when all were last clustered."""

    @property
    def unread(self) -> Tensor:
        """First token of each row that is always read: in no chunk before this step."""
        behind = open_from(self.span, self._used(), self.settings.chunk)
        return torch.maximum(torch.minimum(self.tail, behind), self.start)

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Cut new tokens into chunks, as far as cuts are decided; fit clusters if it is time."""
        self.end, chunk = end.clone(), self.settings.chunk
        self.closed = self.closed & (self.open == end)
        due = self.open + chunk[1] < end
        if bool(due.any()):
            last = int(end[due].max())
            self._reserve(self.settings.chunks_in(last))
            self._find_boundaries(key, due, last)
            begin, until = torch.where(due, self.open, last), torch.where(due, end, 0)
            number, real = cut_more(
                self.span, self.strengths.strength[:, :last], begin, until, chunk
            )
            self._summarise(key, number, real)
            opened = open_from(self.span, decided(self.span, end, chunk), chunk)
            self.open = torch.where(due, opened, self.open)
        self.tail = torch.maximum(self.open, self.start)
        since = end - self.fitted
        wanted = torch.tensor([refit_after(each) for each in self.fitted.tolist()])
        if self.clusters and bool((since >= wanted.to(since)).any()):
            self.fit(key)

    def fit(self, key: Tensor) -> None:
        """Add chunks to clusters, or cluster all anew if they are twice as many as before."""
        chunk, above = self.settings.chunk, self.stack.levels[:-1]
        used = decided(self.span, self.end, chunk)
        low, length = bounds_of(self.span, chunk)
        tokens = torch.where(used, low + length - torch.maximum(low, self.start[:, None]), 0)
        tokens = tokens.clamp(min=0)[:, None].expand(-1, self.kv_heads, -1)
        mean = mean_of_chunks(key, self.span, self.start, chunk)
        count, self.fitted = int(used.sum(1).max()), self.end.clone()
        rebuild = count >= REBUILD * self.clustered
        self.labels = label_chunks(
            above, mean, tokens, None if rebuild else self.labels, self.settings
        )
        self.clustered = count if rebuild else self.clustered
        of_slot = numbers_of_slots(self.span, used, int(self.end.max()), chunk)
        before = torch.arange(of_slot.shape[1], device=key.device) < self.start[:, None]
        labels = labels_of_slots(self.labels, of_slot.masked_fill(before, -1))
        for number, (level, label) in enumerate(zip(above, labels, strict=True)):
            room = max(int(self.labels[number].max()) + 1, 1)
            self.clusters[number] = with_room(self.clusters[number], room)
            write_columns(level, key, label, self.clusters[number], torch.zeros_like(label[..., 0]))
            if number > 0:
                more = self.clusters[number]["tokens"].shape[2] - self.labels[number - 1].shape[2]
                self.labels[number - 1] = F.pad(self.labels[number - 1], (0, more), value=-1)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on, and the chunks that they decided.

        Clusters stay as they are until the next fit.
        """
        super().truncate(keep)
        self.compared = torch.minimum(self.compared, keep)
        self.closed = self.closed & (keep >= self.open)
        chunk = self.settings.chunk
        kept = decided(self.span, keep, chunk) | self.closed[:, None]
        self.span = torch.where(kept, self.span, 0)
        self.open = open_from(self.span, kept, chunk)
        self.tail = torch.maximum(self.open, self.start)
        self.fitted = torch.minimum(self.fitted, keep)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        super().restart(rows, start)
        self.span = torch.where(rows[:, None], 0, self.span)
        self.open, self.compared, self.fitted = (
            torch.where(rows, 0, each) for each in (self.open, self.compared, self.fitted)
        )
        self.closed = self.closed & ~rows
        wide = rows[:, None, None]
        self.labels = [torch.where(wide, -1, each) for each in self.labels]
        for columns in self.clusters:
            columns["tokens"] = torch.where(wide, 0, columns["tokens"])

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Summarise anew the chunks of `slots`, int64 [B, T]; -1 is none. They leave clusters."""
        of_slot = numbers_of_slots(self.span, self.span > 0, key.shape[2], self.settings.chunk)
        number = torch.where(slots >= 0, of_slot.gather(1, slots.clamp(min=0)), -1)
        self._summarise(key, number.clamp(min=0), number >= 0)

    def close(self, key: Tensor, rows: Tensor) -> None:
        """Let the last tokens of the rows `rows`, bool [B], be a chunk, unless they are too few."""
        shortest = self.settings.chunk[0]
        length = torch.where(rows, self.end - self.open, 0)
        fits = length >= shortest
        if bool(fits.any()):
            number = self.open.div(shortest, rounding_mode="floor")
            self._reserve(int(number.max()) + 1)
            row = fits.nonzero()[:, 0]
            packed = (self.open % shortest << 16) + length
            self.span[row, number[row]] = packed[row].to(self.span.dtype)
            self._summarise(key, number[:, None], fits[:, None])
            self.open = torch.where(fits, self.end, self.open)
            self.tail = torch.maximum(self.open, self.start)
        self.closed = self.closed | fits

    def choose(self, question: Question) -> Runs:
        """Return the best chunks, the last of them cut to the budget."""
        rank, possible = self.chunk_ranks(question)
        low, length = bounds_of(self.span, self.settings.chunk)
        begin = torch.maximum(low[:, None], question.begin[..., None])[:, None]
        behind = torch.minimum((low + length)[:, None], question.end[..., None])[:, None]
        size = torch.where(possible, behind - begin, 0)
        order = rank.masked_fill(~possible, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )
        needed = self.needed(question, self.stack.levels[-1], self._groups(), order, size)
        size = torch.where(needed, size.gather(-1, order), 0)
        left = question.room[..., None] - (size.cumsum(-1) - size)
        taken = torch.minimum(left.clamp(min=0), size)
        most = int((taken > 0).sum(-1).max()) if taken.numel() else 0
        starts = begin.expand_as(rank).gather(-1, order)
        return starts[..., :most], taken[..., :most]

    def chunk_ranks(self, question: Question) -> tuple[Tensor, Tensor]:
        """Return the log share of each chunk, and which can be chosen: [B, Hkv, Tq, N]."""
        looked_into: Tensor | None = None
        for level, columns, label in zip(
            self.stack.levels, self.clusters, self.labels, strict=False
        ):
            if columns["tokens"].shape[2] > 0:
                kept = self.keep(question, level, columns, looked_into)
                looked_into = below(kept, label)
        return self.ranks(question, self.stack.levels[-1], self._groups(), looked_into)

    def _groups(self) -> Columns:
        """Return the numbers of chunks, as `clustered` has those of clusters."""
        low, length = (each[:, None] for each in bounds_of(self.span, self.settings.chunk))
        tokens = torch.where(self._used()[:, None], length, 0)
        return {**self.fields, "tokens": tokens, "first": low, "end": low + length}

    def bias(self, question: Question, begin: Tensor, end: Tensor) -> Tensor | float:
        """Return the largest bias of a slot of each chunk; clusters have none."""
        if question.visible.bias is None or begin.shape[-1] != self.span.shape[1]:
            return 0.0
        zeros = question.query.new_zeros(1).expand(
            *question.query.shape[:3], question.visible.kv_len
        )
        bias = question.finish(zeros)
        of_slot = numbers_of_slots(self.span, self._used(), bias.shape[-1], self.settings.chunk)
        place = torch.where(of_slot < 0, self.span.shape[1], of_slot)
        place = place[:, None, None, None].expand_as(bias)
        floor = bias.new_full((*bias.shape[:4], self.span.shape[1] + 1), -torch.inf)
        return floor.scatter_reduce(-1, place, bias, "amax")[..., :-1]

    def score_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """Return the bound of its chunk for each slot: [B, Hkv, R, N]."""
        level, slots = self.stack.levels[-1], int(self.tail.max())
        if level.bound is None or slots == 0 or self.span.shape[1] == 0:
            return None
        found = bound(level, query, self.fields, scale)
        assert found is not None
        of_slot = numbers_of_slots(self.span, self.span > 0, slots, self.settings.chunk)
        wide = of_slot[:, None, None].expand(*found.shape[:3], -1)
        return found.gather(-1, wide.clamp(min=0)).masked_fill(wide < 0, torch.inf)

    def _used(self) -> Tensor:
        """Return the chunks that were cut before this step, bool [B, N]."""
        before = decided(self.span, self.indexed, self.settings.chunk)
        return before | (self.closed[:, None] & (self.span > 0))

    def _find_boundaries(self, key: Tensor, due: Tensor, last: int) -> None:
        """Learn boundary strengths of the rows `due`, bool [B], from their keys up to `last`."""
        self.strengths.compare_keys(key, max(int(self.compared[due].min()) - 1, 0), last)
        self.compared = torch.where(due, torch.maximum(self.compared, self.end), self.compared)

    def _summarise(self, key: Tensor, number: Tensor, used: Tensor) -> None:
        """Take the fields of chunks `number`, int64 [B, M], where `used`, which leave clusters."""
        level, chunk = self.stack.levels[-1], self.settings.chunk
        summarise_chunks(level, key, self.span, number, used, self.start, chunk, self.fields)
        if self.labels:
            row, place = used.nonzero(as_tuple=True)
            self.labels[-1][row, :, number[row, place]] = -1

    def _reserve(self, count: int) -> None:
        """Make room for `count` chunks in each row, in amortised constant time per chunk."""
        more = count - self.span.shape[1]
        if more <= 0:
            return
        count += count // 4
        self.span = F.pad(self.span, (0, count - self.span.shape[1]))
        self.fields = with_room(self.fields, count)
        if self.labels:
            fine = self.labels[-1]
            self.labels[-1] = F.pad(fine, (0, count - fine.shape[2]), value=-1)
