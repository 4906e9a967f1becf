"""The plain form of a policy that is declared as levels: what it chooses, in PyTorch."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.levels.declaration import LevelStack, Pages
from lychee_compile.kernels.reference.dominant_pairs import (
    REFIT_GROWTH,
    channels_of,
    fitted_tokens,
    pick,
)
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.level_values import bound, estimate, summaries
from lychee_compile.kernels.reference.question import Choice, Question, Runs, group_mass

SUMMARISED_AT_ONCE = 32768
"""Number of keys that are summarised at a time, to bound the memory of building."""


class LevelIndex(KVIndex):
    """Summaries of pages at each level of a `LevelStack`, and the choice by them.

    Pages begin at multiples of their size, whatever the first slot of a row. A page is summarised
    once it is full, over all its keys: those that a mask hides too, as in front of a padded row. At
    the last level a page can be chosen once another has begun; before, it is always read. At a
    coarser level a page without a summary is always kept, so that its tokens can be chosen.
    """

    stack: ClassVar[LevelStack]
    """The declaration."""

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, config: IndexConfig, device: torch.device
    ) -> None:
        super().__init__(batch, kv_heads, head_dim, config, device)
        empty = torch.zeros(batch, kv_heads, 0, head_dim, device=device)
        self.summaries: list[dict[str, Tensor]] = [
            {name: empty[..., : head_dim if wide else 1] for name, wide in level.channels.items()}
            for level in self.stack.levels
        ]
        """Fields of the pages of each level, by name, float32 [B, Hkv, N, D or 1]."""
        self.full: list[Tensor] = [self.start.clone() for _ in self.stack.levels]
        """Number of pages of each level that are summarised, int64 [B]."""
        pairs = self.stack.pairs
        width = 0 if pairs is None else pairs.channels(head_dim)
        self.channels = torch.zeros(batch, kv_heads, width, dtype=torch.int64, device=device)
        """Channels that estimates of tokens read, int64 [B, Hkv, C], if the policy picks some."""
        self.fitted = self.start.clone()
        """Number of tokens of each row that these were chosen from, int64 [B]."""

    @property
    def always_read(self) -> tuple[int, int]:
        """Numbers of first and of last tokens that every query reads."""
        return self.always_read_of(self.config.budget)

    def always_read_of(self, budget: int | None) -> tuple[int, int]:
        """Return `always_read` for queries that read `budget` tokens; None: all, or any number."""
        return self.stack.always_read(self.config.sinks, self.config.recent, budget)

    @property
    def unread(self) -> Tensor:
        """First token of each row that is always read: it, or one of its page, was just written."""
        size = self.stack.last_size
        fresh = self.end if self.fresh is None else torch.minimum(self.fresh, self.end)
        return torch.maximum(torch.minimum(self.tail, fresh // size * size), self.start)

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Summarise the pages that have become full."""
        before, self.end = self.end, end.clone()
        for number, level in enumerate(self.stack.levels):
            if level.fields:
                size = level.groups.size
                # A page that was closed before it was full is summarised anew as it grows.
                known = torch.minimum(self.full[number], before // size)
                known = torch.where(end > before, known, self.full[number])
                self._summarise_range(number, key, known, end // size)
                self.full[number] = torch.maximum(known, end // size)
        self._fit(key)
        size = self.stack.last_size
        self.tail = torch.maximum((end - 1) // size * size if size > 1 else end, self.start)

    def truncate(self, keep: Tensor) -> None:
        """Forget the tokens from position `keep`, int64 [B], on, and the pages that had them."""
        super().truncate(keep)
        for number, level in enumerate(self.stack.levels):
            self.full[number] = torch.minimum(self.full[number], keep // level.groups.size)
        size = self.stack.last_size
        self.tail = torch.maximum(self.tail // size * size, self.start)

    def restart(self, rows: Tensor, start: Tensor) -> None:
        """Empty the rows where `rows`, bool [B], is set; they begin at `start`, int64 [B]."""
        super().restart(rows, start)
        self.full = [
            torch.where(rows, self.start // level.groups.size, full)
            for level, full in zip(self.stack.levels, self.full, strict=True)
        ]
        self.fitted = torch.where(rows, 0, self.fitted)

    def rewrite(self, key: Tensor, slots: Tensor) -> None:
        """Summarise anew the pages of `slots`, int64 [B, T]; -1 is none."""
        for number, level in enumerate(self.stack.levels):
            if level.fields:
                page = torch.where(slots >= 0, slots // level.groups.size, -1)
                for one in page[page >= 0].unique().tolist():
                    rows = (page == one).any(1) & (one < self.full[number])
                    at = torch.full_like(self.end, one)
                    self._summarise_range(number, key, at, torch.where(rows, at + 1, at))

    def close(self, key: Tensor, rows: Tensor) -> None:
        """Let the last page of the rows `rows`, bool [B], be chosen, however few keys it has."""
        for number, level in enumerate(self.stack.levels):
            if level.fields:
                most = -(-self.end // level.groups.size)
                full = torch.where(rows, most, self.full[number])
                self._summarise_range(number, key, self.full[number], full)
                self.full[number] = full
        self.tail = torch.where(rows, self.end, self.tail)

    def choose(self, question: Question) -> Choice:
        """Return the best groups of the last level, within the best of those above it."""
        if not self.stack.levels:
            begin = question.end[:, None, :, None].expand(*question.room.shape, 1)
            return begin, torch.zeros_like(begin)
        last, within = len(self.stack.levels) - 1, self.within(question)
        rank = self.ranks(question, last, within)
        if isinstance(self.stack.levels[last].groups, Pages):
            return _whole_pages(question, rank, self.stack.last_size)
        return question.take_tokens(rank, within)

    def within(self, question: Question) -> Tensor | None:
        """Return the slots that all levels but the last have kept, bool [B, Hkv, Tq, L].

        None: there is one level.
        """
        within: Tensor | None = None
        for number in range(len(self.stack.levels) - 1):
            within = self._kept(question, number, within)
        return within

    def ranks(self, question: Question, number: int, within: Tensor | None) -> Tensor:
        """Return the log shares of the groups of a level, float32 [B, Hkv, Tq, N].

        Shares are of the slots that the level above has kept, bool [B, Hkv, Tq, L]; None: of all.
        A page that has nothing to choose has -inf, and one that a coarser level always keeps inf.
        """
        level = self.stack.levels[number]
        if not isinstance(level.groups, Pages):
            query, keys = question.query, question.keys()
            if level.pairs is not None:
                query, keys = pick(query, self.channels), pick(keys, self.channels)
            raw = estimate(level, query, {"key": keys}, question.scale)
            known = self._known(question, within)
            share = question.share_of(question.scale * raw, known, of_all=True)
            return self._vote(share)
        rank, possible = self._page_shares(question, number, within)
        if level.keep is not None:
            rank = rank.masked_fill(self._forced(question, number, rank.shape[-1]), torch.inf)
        return rank.masked_fill(~possible, -torch.inf)

    def score_bound(self, query: Tensor, scale: float) -> Tensor | None:
        """Return the bound of its page at the last level for each slot: [B, Hkv, R, N]."""
        if not self.stack.levels or self.stack.last_size == 1:
            return None
        level, count = self.stack.levels[-1], int(self.tail.max())
        known = self.summaries[-1]
        if count == 0 or not known:
            return None
        found = bound(level, query, known, scale)
        if found is None:
            return None
        return found.repeat_interleave(level.groups.size, -1)[..., :count]

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count the summaries, and the keys that are scored one by one."""
        return self.stack.bytes_per_step(tokens, budget, self.head_dim)

    def _fit(self, key: Tensor) -> None:
        """Choose the channels of rows that are new, or have `REFIT_GROWTH` times as many tokens.

        Slots that this step wrote do not count, unless they are the first of their row.
        """
        if self.stack.pairs is None:
            return
        fresh = self.end if self.fresh is None else torch.minimum(self.fresh, self.end)
        tokens = fitted_tokens(torch.where(fresh > self.start, fresh, self.end))
        due = (tokens >= REFIT_GROWTH * self.fitted) & (tokens > 0)
        if bool(due.any()):
            found = channels_of(key, tokens, self.stack.pairs)
            self.channels = torch.where(due[:, None, None], found, self.channels)
            self.fitted = torch.where(due, tokens, self.fitted)

    def _known(self, question: Question, within: Tensor | None) -> Tensor:
        """Return the slots that shares are of: bool [B, 1 or Hkv, Tq, L].

        They are those that some head sees and that were there before this step, within those that
        a level above has kept.
        """
        slot = torch.arange(question.visible.kv_len, device=self.device)
        known = question.seen() & (slot >= self.start[:, None, None, None])
        if self.fresh is not None:
            known = known & (slot < self.fresh[:, None, None, None])
        return known if within is None else known & within

    def _kept(self, question: Question, number: int, within: Tensor | None) -> Tensor:
        """Return the slots of the groups kept at a level above the last: bool [B, Hkv, Tq, L]."""
        level = self.stack.levels[number]
        assert level.keep is not None
        rank, size = self.ranks(question, number, within), level.groups.size
        most = (level.keep.per_token * question.budget).clamp(min=level.keep.least) // size
        most = torch.maximum(most, (question.budget + size - 1) // size + 1)  # as `Keep.groups`
        best = rank.topk(min(int(most.max()), rank.shape[-1]), -1)
        inside = torch.arange(best.indices.shape[-1], device=rank.device) < most[..., None]
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, best.indices, inside)
        kept &= rank > -torch.inf
        return kept.repeat_interleave(size, -1)[..., : question.visible.kv_len]

    def _forced(self, question: Question, number: int, count: int) -> Tensor:
        """Return which of `count` pages of a coarser level are always kept: bool [B, 1, Tq, N]."""
        level = self.stack.levels[number]
        place = torch.arange(count, device=self.device)
        forced = place >= self._summarised(number)[:, None, None, None]
        if level.keeps_first:
            first = question.begin[:, None, :, None] // level.groups.size
            forced = forced | (place == first)
        return forced

    def _summarised(self, number: int) -> Tensor:
        """Return how many pages of a level had summaries before this step, int64 [B]."""
        full, size = self.full[number], self.stack.levels[number].groups.size
        return full if self.fresh is None else torch.minimum(full, self.fresh // size)

    def _page_shares(
        self, question: Question, number: int, within: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the log share of each page of a level, and which may be chosen: [B, Hkv, Tq, N].

        Shares are of the pages within those that the level above has kept, bool [B, Hkv, Tq, L]. A
        page without a summary has none.
        """
        level, slots = self.stack.levels[number], question.visible.kv_len
        size = level.groups.size
        count = -(-slots // size)
        known = self._known(question, within)
        tokens = _by_page(known, size).sum(-1)
        fields = {name: _resized(each, count) for name, each in self.summaries[number].items()}
        raw = estimate(level, question.query, fields, question.scale)
        score = question.split(question.capped(question.scale * raw))
        if question.visible.bias is not None:
            score = score + _largest_bias(question, known, size)
        place = torch.arange(count, device=self.device)
        there = (tokens > 0) & (place < self._summarised(number)[:, None, None, None])
        mass = group_mass(score, tokens).masked_fill(~there[:, :, None], -torch.inf)
        begin, end = question.begin[..., None], question.end[..., None]
        between = (place * size < end) & ((place + 1) * size > begin)
        return self._vote(question.share(mass, of_all=True)), between[:, None] & (tokens > 0)

    def _vote(self, share: Tensor) -> Tensor:
        """Return log shares [B, Hkv, Tq, N], their mean over all KV heads if the layer votes."""
        if self.stack.vote == "group":
            return share
        return (share.logsumexp(1, keepdim=True) - math.log(share.shape[1])).expand_as(share)

    def _summarise_range(self, number: int, key: Tensor, begin: Tensor, end: Tensor) -> None:
        """Summarise the pages [begin, end) of each row, int64 [B], at the level `number`."""
        level = self.stack.levels[number]
        size, due = level.groups.size, begin < end
        if not bool(due.any()):
            return
        first, last = int(begin[due].min()), int(end[due].max())
        self._reserve(number, last)
        at_once = max(SUMMARISED_AT_ONCE // size, 1)
        for low in range(first, last, at_once):
            pages = torch.arange(low, min(low + at_once, last), device=key.device)
            slot = (pages[:, None] * size + torch.arange(size, device=key.device)).flatten()
            keys = key[:, :, slot[0] : slot[-1] + 1]
            keys = F.pad(keys, (0, 0, 0, len(slot) - keys.shape[2]))
            valid = slot < self.end[:, None]
            shape = (len(pages), size)
            found = summaries(level, keys.unflatten(2, shape), valid[:, None].unflatten(2, shape))
            mine = ((pages >= begin[:, None]) & (pages < end[:, None]))[:, None, :, None]
            part = slice(low, low + len(pages))
            for name, value in found.items():
                held = self.summaries[number][name]
                held[:, :, part] = torch.where(mine, value, held[:, :, part])

    def _reserve(self, number: int, pages: int) -> None:
        """Make room for `pages` pages at a level, in amortised constant time per page."""
        for name, held in self.summaries[number].items():
            if pages > held.shape[2]:
                self.summaries[number][name] = _resized(held, pages + pages // 4)


def _whole_pages(question: Question, rank: Tensor, size: int) -> Runs:
    """Return the best pages by `rank` [B, Hkv, Tq, N], as many whole pages as there is room for.

    If all slots of a query fit, it reads all pages: those that are cut need no more room.
    """
    rank = rank.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    fits = (question.end - question.begin)[:, None] <= question.room
    most = torch.where(fits, rank.shape[-1], question.room // size)
    best = rank.topk(min(int(most.max()), rank.shape[-1]), -1)
    place = torch.arange(best.indices.shape[-1], device=rank.device)
    taken = (best.values > -torch.inf) & (place < most[..., None])
    taken = taken & question.needed(best.values, rank)
    begin = torch.maximum(best.indices * size, question.begin[:, None, :, None])
    end = torch.minimum((best.indices + 1) * size, question.end[:, None, :, None])
    return begin, torch.where(taken, end - begin, 0).clamp(min=0)


def _by_page(slots: Tensor, size: int) -> Tensor:
    """Return a mask of slots [..., L] by pages of `size` slots: [..., N, size]."""
    return F.pad(slots, (0, -slots.shape[-1] % size)).unflatten(-1, (-1, size))


def _largest_bias(question: Question, known: Tensor, size: int) -> Tensor:
    """Return the largest bias of a `known` token of each page: [B, Hkv, G, Tq, N]."""
    slots = question.visible.kv_len
    zeros = question.query.new_zeros(1).expand(*question.query.shape[:3], slots)
    bias = question.finish(zeros).masked_fill(~known[:, :, None], -torch.inf)
    bias = F.pad(bias, (0, -slots % size), value=-torch.inf)
    return bias.unflatten(-1, (-1, size)).amax(-1)


def _resized(values: Tensor, count: int) -> Tensor:
    """Return `values` [B, Hkv, N, D], cut or padded with zeros to `count` groups."""
    return F.pad(values, (0, 0, 0, count - values.shape[2]))
