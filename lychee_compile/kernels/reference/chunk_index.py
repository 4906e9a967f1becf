"""The plain form of policies that read chunks whole, below any number of levels of clusters."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.groups import Chunks
from lychee_compile.kernels.reference.child_lists import Listed
from lychee_compile.kernels.reference.chunk_clusters import ChunkClusters
from lychee_compile.kernels.reference.chunk_table import (
    bounds_of,
    cut_more,
    decided,
    number_at,
    numbers_of_slots,
    open_from,
    summarise_chunks,
)
from lychee_compile.kernels.reference.level_values import bound
from lychee_compile.kernels.reference.question import Choice, Question, Runs
from lychee_compile.kernels.reference.rows import alike
from lychee_compile.kernels.reference.runs import packed
from lychee_compile.kernels.reference.uneven_index import UnevenIndex, empty_columns, with_room


class ChunkIndex(UnevenIndex):
    """Chunks, which are read whole, and clusters of chunks that say which are looked into.

    Chunks begin at slot 0, whatever the first slot of a row, and are cut as tokens arrive. Those
    that this step has cut cannot be chosen yet. The last one chosen is cut to the budget. A step
    scores the groups below those that it has kept, and chunks that are in no cluster yet.
    """

    late: ClassVar[bool] = False
    """True if chunks are summarised and clustered by `complete` alone, once somebody asks."""
    from_start: ClassVar[bool] = False
    """True if chunks begin at the first slot of a row."""

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        self.span = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        """Chunks of each row by number, int32 [B, N], see `chunk_table`."""
        self.waiting = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        """Chunks whose fields have not been taken from their keys of now, bool [B, N]."""
        self.any_waiting = False
        """True if some chunk may be waiting."""
        self.open = self.start.clone()
        """First slot of each row that is in no chunk yet, int64 [B]."""
        self.compared = self.start.clone()
        """Number of keys of each row that were compared for boundaries, int64 [B]."""
        self.closed = torch.zeros_like(self.start, dtype=torch.bool)
        """Rows whose last chunk ends where they do, though nothing has decided that, bool [B]."""
        empty = empty_columns(self.stack.levels[-1], batch, kv_heads, head_dim, device)
        self.fields = {name: empty[name] for name in self.stack.levels[-1].fields}
        """Fields of chunks by number, float32 [B, Hkv, N, D or 1]."""
        self.above = ChunkClusters(self.stack.levels, batch, kv_heads, head_dim, device)
        """Clusters of the chunks, if the policy has any."""

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
            self._changed(number, real)
            opened = open_from(self.span, decided(self.span, end, chunk), chunk)
            self.open = torch.where(due, opened, self.open)
        self.tail = torch.maximum(self.open, self.start)
        self._unless_late(key)

    def complete(self, key: Tensor) -> None:
        """Take the fields of chunks that are new or were rewritten; fit clusters if it is time."""
        if self.any_waiting:
            number, real = packed(self.waiting & (self.span > 0))
            level, chunk = self.stack.levels[-1], self.settings.chunk
            summarise_chunks(level, key, self.span, number, real, self.start, chunk, self.fields)
            self.waiting, self.any_waiting = torch.zeros_like(self.waiting), False
        if self.above.is_due(self.end):
            self.fit(key)

    def fit(self, key: Tensor) -> None:
        """Add chunks to clusters, or cluster all anew if they are twice as many as before."""
        used = decided(self.span, self.end, self.settings.chunk)
        self.above.fit(key, self.span, used, self.fields, self.start, self.end, self.settings)

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
        self.open = torch.maximum(open_from(self.span, kept, chunk), self._origin())
        self.tail = torch.maximum(self.open, self.start)
        self.above.forget(keep)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        super().restart(rows, start)
        self.span = torch.where(rows[:, None], 0, self.span)
        self.waiting = self.waiting & ~rows[:, None]
        self.open = torch.where(rows, self._origin(), self.open)
        self.compared = torch.where(rows, 0, self.compared)
        self.closed = self.closed & ~rows
        self.above.restart(rows)

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Summarise anew the chunks of `slots`, int64 [B, T]; -1 is none. They leave clusters."""
        number = number_at(self.span, slots, self.settings.chunk)
        self._changed(number.clamp(min=0), number >= 0)
        self.above.count_rewritten((slots >= 0).sum(1))
        self._unless_late(key)

    def close(self, key: Tensor, rows: Tensor) -> None:
        """Let the last tokens of the rows `rows`, bool [B], be a chunk, unless they are too few."""
        shortest = self.settings.chunk[0]
        length = torch.where(rows, self.end - self.open, 0)
        fits = length >= shortest
        if bool(fits.any()):
            number = self.open.div(shortest, rounding_mode="floor")
            self._reserve(int(number.max()) + 1)
            row = fits.nonzero()[:, 0]
            packed_span = (self.open % shortest << 16) + length
            self.span[row, number[row]] = packed_span[row].to(self.span.dtype)
            self._changed(number[:, None], fits[:, None])
            self.open = torch.where(fits, self.end, self.open)
            self.tail = torch.maximum(self.open, self.start)
            self._unless_late(key)
        self.closed = self.closed | fits

    def partition(self) -> tuple[Tensor, Tensor]:
        """Return all tokens as groups in order: (starts, lengths), int64 [B, C].

        The last group of a row holds the tokens that are in no chunk yet. Length 0: no group.
        """
        used = self._used()
        number, real = packed(used)
        low, length = bounds_of(self.span.gather(1, number), self.settings.chunk, number)
        first, behind = torch.maximum(low, self.start[:, None]), low + length
        tail = open_from(self.span, used, self.settings.chunk)[:, None]
        tail = torch.maximum(tail, self.start[:, None])
        lengths = torch.cat((torch.where(real, behind - first, 0), self.end[:, None] - tail), 1)
        lengths = lengths.clamp(min=0)
        return torch.where(lengths > 0, torch.cat((first, tail), 1), 0), lengths

    def choose(self, question: Question) -> Choice:
        """Return the best chunks, the last of them cut to the budget."""
        assert self.config.budget is not None
        return self.best_chunks(question, self.config.budget, question.room, covers=True)

    def best_chunks(
        self, question: Question, budget: int | Tensor, room: Tensor, covers: bool = False
    ) -> Runs:
        """Return the best chunks of `room` tokens, int64 [B, Hkv, Tq], the last of them cut.

        Clusters are kept until they hold their multiples of `budget`, int or int64 [B, Hkv, Tq]. If
        the choice `covers` the share that is asked for, it ends there.
        """
        listed = self.look_into(question, budget)
        groups = self.chunk_columns(listed)
        within = None if listed is None else listed.within
        rank, possible = self.ranks(question, self.stack.levels[-1], groups, within)
        first, end = groups["first"][:, :, None], groups["end"][:, :, None]
        begin = torch.maximum(first, question.begin[:, None, :, None])
        behind = torch.minimum(end, question.end[:, None, :, None])
        size = torch.where(possible, behind - begin, 0)
        rank = rank.masked_fill(~possible, -torch.inf)
        order = rank.argsort(dim=-1, descending=True, stable=True)
        if covers:
            needed = self.needed(question, self.stack.levels[-1], groups, order, size)
            size = torch.where(needed, size.gather(-1, order), 0)
        else:
            size = size.gather(-1, order)
        left = room[..., None] - (size.cumsum(-1) - size)
        taken = torch.minimum(left.clamp(min=0), size)
        most = int((taken > 0).sum(-1).max()) if taken.numel() else 0
        starts = begin.expand_as(rank).gather(-1, order)
        return starts[..., :most], taken[..., :most]

    def look_into(self, question: Question, budget: int | Tensor) -> Listed | None:
        """Return the chunks below the clusters that are kept, and those in none; None: all."""
        listed: Listed | None = None
        if not self.above.fitted_any:
            return None
        for number, level in enumerate(self.stack.levels[:-1]):
            columns = self.above.columns[number]
            groups = columns if listed is None else listed.columns(columns)
            within = None if listed is None else listed.within
            kept = self.keep(question, level, groups, within, budget)
            listed = self.above.below(number, kept, listed)
        assert listed is not None
        return self.above.with_free(listed, self.span)

    def chunk_columns(self, listed: Listed | None) -> dict[str, Tensor]:
        """Return the fields of the listed chunks, and the numbers `tokens`, `first` and `end`."""
        span, number = torch.where(self._used(), self.span, 0)[:, None], None
        fields = self.fields
        if listed is not None:
            span, number, fields = listed.rows(span), listed.number, listed.columns(fields)
        low, length = bounds_of(span, self.settings.chunk, number)
        return {**fields, "tokens": length, "first": low, "end": low + length}

    def bias(self, question: Question, level: Level, begin: Tensor, end: Tensor) -> Tensor | float:
        """Return the largest bias of a slot of each chunk; clusters have none."""
        if question.visible.bias is None or not isinstance(level.groups, Chunks):
            return 0.0
        zeros = question.query.new_zeros(1).expand(
            *question.query.shape[:3], question.visible.kv_len
        )
        bias = question.finish(zeros)
        slot = begin[..., None] + torch.arange(self.settings.chunk[1], device=begin.device)
        inside = (slot < end[..., None])[:, :, None].flatten(-2)
        at = slot.clamp(max=bias.shape[-1] - 1)[:, :, None].flatten(-2)
        shape = (*bias.shape[:4], at.shape[-1])
        found = bias.gather(-1, at.expand(shape)).masked_fill(~inside, -torch.inf)
        return found.unflatten(-1, slot.shape[-2:]).amax(-1)

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

    def _origin(self) -> Tensor:
        """Return the first slot of the first chunk of each row, int64 [B]."""
        return self.start if self.from_start else torch.zeros_like(self.start)

    def _find_boundaries(self, key: Tensor, due: Tensor, last: int) -> None:
        """Learn boundary strengths of the rows `due`, bool [B], from their keys up to `last`."""
        end = torch.where(due, self.end, self.compared)
        for row, rows in alike(self.compared, end):
            first, until = int(self.compared[rows].min()) - 1, int(end[rows].max())
            self.strengths.compare_keys(key, max(first, 0), until, row)
        self.strengths.reserve(last)
        self.compared = torch.where(due, torch.maximum(self.compared, self.end), self.compared)

    def _changed(self, number: Tensor, used: Tensor) -> None:
        """Note chunks `number`, int64 [B, M], where `used`, as new. They leave their clusters."""
        row, place = used.nonzero(as_tuple=True)
        self.waiting[row, number[row, place]] = True
        self.any_waiting = True
        self.above.free(row, number[row, place])

    def _unless_late(self, key: Tensor) -> None:
        """Do at once what `complete` does, unless that is left for later."""
        if not self.late:
            self.complete(key)

    def _reserve(self, count: int) -> None:
        """Make room for `count` chunks in each row, in amortised constant time per chunk."""
        if count <= self.span.shape[1]:
            return
        count += count // 4
        more = count - self.span.shape[1]
        self.span, self.waiting = F.pad(self.span, (0, more)), F.pad(self.waiting, (0, more))
        self.fields = with_room(self.fields, count)
        self.above.reserve(count)
