"""Selection of the tokens that a query reads: sinks, recent tokens, and a policy's choice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.decode_drawing import salt_of
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.question import Question, query_rows
from lychee_compile.kernels.reference.recency import (
    Span,
    around,
    hide,
    newest_of,
    recent_spans,
)
from lychee_compile.kernels.reference.runs import expand_runs
from lychee_compile.kernels.reference.scores import scores_at
from lychee_compile.kernels.reference.visible import Visible


@dataclass(frozen=True)
class Selection:
    """Runs of slots to read, per row, KV head and query position."""

    run_start: Tensor
    run_length: Tensor
    """First slot and length of each run, int64 [B, Hkv, Tq, R]. Runs do not overlap. The first run
    holds the sinks, the last the recent tokens, and the runs between them the policy's choice. In a
    cache that wraps, one of those between holds the newest tokens."""
    visible: Visible
    """Keys that each query position may see."""
    scale: float
    """Softmax scale that the tokens were chosen with."""
    log_unread_bound: Tensor | None = None
    """Upper bound of log sum of exp(score) over the unread keys, float32 [B, Hq, Tq]; None if
    nobody computed it."""
    log_weight: Tensor | None = None
    """Logarithm of how many tokens each token of a run stands for, float32 [B, Hkv, Tq, R]; None:
    each for itself."""

    @cached_property
    def _expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, their runs, and which of them are real, as `expand_runs` returns them."""
        return expand_runs(self.run_start, self.run_length)

    def token_log_weight(self) -> Tensor:
        """Return the logarithms of how many tokens each of `tokens` stands for: float32.

        The result is [B, Hkv, Tq, S]. The selection must have weights.
        """
        assert self.log_weight is not None
        _, run, _ = self._expanded
        return self.log_weight.gather(-1, run)

    def tokens(self) -> Tensor:
        """Return the slots read, int64 [B, Hkv, Tq, S]; -1 pads queries that read fewer than S.

        Slots that the mask hides from every head are left out.
        """
        slot, _, real = self._expanded
        token = torch.where(real, slot, -1)
        if self.visible.counts is not None and self.visible.mask is not None:
            seen = self.visible.mask.any(1)[:, None].expand(-1, token.shape[1], -1, -1)
            token = torch.where(seen.gather(-1, token.clamp(min=0)), token, -1)
        return token

    def token_mask(self) -> Tensor:
        """Return a mask of the slots read, sinks and recent ones included: bool [B, Hkv, Tq, L]."""
        token = self.tokens()
        read = torch.zeros(
            *token.shape[:3], self.visible.kv_len + 1, dtype=torch.bool, device=token.device
        )
        read.scatter_(-1, torch.where(token < 0, self.visible.kv_len, token), True)
        return read[..., :-1]


def select(
    index: KVIndex, inputs: ScoreInputs, budget: int | Tensor | None = None, site: str = ""
) -> Selection:
    """Choose at most `budget` tokens per KV head and query position.

    Sinks, recent tokens and every visible token that the index does not hold are always read, even
    beyond the budget. `budget` may differ between heads, int64 [B, Hkv, Tq], and None reads all
    visible tokens. `site`, the module path of the attention, is for policies that remember. If the
    index has a `coverage`, a head may need fewer tokens than its budget.
    """
    visible, heads = inputs.visible(), index.kv_heads
    always = _always_read(index, visible, budget if isinstance(budget, int) else None)
    choosable = always.choosable(visible)
    shape = (inputs.query.shape[0], heads, inputs.query.shape[2])
    count = always.count(visible)
    drawn = index.config.draws(budget if isinstance(budget, int) else 0)
    if budget is None:
        budget = (choosable + count)[:, None]
    most = torch.as_tensor(budget, device=inputs.query.device).expand(shape)
    room = (most - count[:, None]).clamp(min=0)
    coverage = index.config.coverage if index.estimates_shares else None
    coverage = None if coverage == 1 else coverage  # as much as the budget allows
    fits = choosable[:, None] <= room if coverage is None else choosable == 0
    if bool(fits.all()):
        length = (always.recent_start - always.sinks_end).clamp(min=0)
        chosen = _Chosen(_per_head(always.sinks_end, heads), _per_head(length, heads))
    else:
        question = _question(inputs, always.beside(visible), always, room, most, site)
        if coverage is not None:
            log_always = _log_always(inputs, visible, always, heads)
            question = replace(question, may_miss=1 - coverage, log_always=log_always)
        chosen = _chosen(index, question, always.apart, drawn)
    return _with_always_read(chosen, always, visible, inputs.scale)


class _Chosen(NamedTuple):
    """Runs between the sinks and the recent tokens, each [B, Hkv, Tq, R], as in a `Selection`."""

    start: Tensor
    length: Tensor
    log_weight: Tensor | None = None


def _chosen(index: KVIndex, question: Question, apart: Span | None, drawn: bool) -> _Chosen:
    """Return the policy's choice; tokens of small shares are drawn by chance if `drawn`.

    The slots `apart`, which are newer than all others of a cache that wraps, become one more run.
    """
    if drawn:
        step = index.end if index.step is None else index.step
        question = replace(question, salt=salt_of(step, index.kv_heads))
    start, length, *weights = index.choose(question)
    log_weight = weights[0] if weights else None
    if apart is None:
        return _Chosen(start, length, log_weight)
    if log_weight is not None:  # `around` cuts every run in two, and adds one
        log_weight = F.pad(torch.cat((log_weight, log_weight), -1), (0, 1))
    return _Chosen(*around(start, length, apart), log_weight)


def _with_always_read(
    chosen: _Chosen, always: _AlwaysRead, visible: Visible, scale: float
) -> Selection:
    """Return the selection of what is chosen and of the sinks and recent tokens."""
    start, length, log_weight = chosen
    heads = start.shape[1]
    sinks, recent = always.sinks_length(visible), always.recent_length(visible)
    first, last = _per_head(visible.first, heads), _per_head(always.recent_start, heads)
    start = torch.cat((first, start, last), -1)
    length = torch.cat((_per_head(sinks, heads), length, _per_head(recent, heads)), -1)
    if log_weight is not None:
        log_weight = F.pad(log_weight, (1, 1))  # sinks and recent tokens stand for themselves
    return Selection(start, length, visible, scale, log_weight=log_weight)


def slots_read(selection: Selection) -> tuple[Tensor, Tensor]:
    """Return the slots read, int64 [B, Hkv, Tq, S], and which of them are padding, bool.

    Padding names the last slot that the query sees: a hidden slot may hold anything, even NaN.
    """
    token = selection.tokens()
    padding = token < 0
    last = (selection.visible.end - 1).clamp(min=0)
    return torch.where(padding, last[:, None, :, None], token), padding


@dataclass(frozen=True)
class _AlwaysRead:
    """Slots that each query position always reads, int64 [B, Tq]: sinks and recent tokens."""

    sinks_end: Tensor
    """One past the last sink."""
    recent_start: Tensor
    """First recent token, or first token that the index does not hold."""
    newest: Tensor
    """Newest slot that the position sees."""
    apart: Span | None
    """The newest slots, if the cache wraps so that some before `recent_start` are newer."""

    def sinks_length(self, visible: Visible) -> Tensor:
        """Return the number of slots of the sinks, int64 [B, Tq]."""
        return (self.sinks_end - visible.first).clamp(min=0)

    def recent_length(self, visible: Visible) -> Tensor:
        """Return the number of slots from `recent_start` on, int64 [B, Tq]."""
        return (visible.end - self.recent_start).clamp(min=0)

    def count(self, visible: Visible) -> Tensor:
        """Return the number of slots always read, int64 [B, Tq]."""
        count = self.sinks_length(visible) + self.recent_length(visible)
        return count if self.apart is None else count + self.apart[1] - self.apart[0]

    def runs(self, visible: Visible, heads: int) -> tuple[Tensor, Tensor]:
        """Return the first slots and lengths of all that is always read, [B, Hkv, Tq, 2 or 3]."""
        starts, lengths = [visible.first, self.recent_start], [self.sinks_length(visible)]
        lengths.append(self.recent_length(visible))
        if self.apart is not None:
            starts.append(self.apart[0])
            lengths.append(self.apart[1] - self.apart[0])
        both = (torch.cat([_per_head(each, heads) for each in of], -1) for of in (starts, lengths))
        start, length = both
        return start, length

    def choosable(self, visible: Visible) -> Tensor:
        """Return the number of visible tokens between sinks and recent ones, int64 [B, Tq]."""
        begin, end = self.sinks_end[..., None], self.recent_start[..., None]
        inner = self.beside(visible).tokens_within(begin, end)[..., 0]
        return torch.where(self.recent_start > self.sinks_end, inner, 0)

    def beside(self, visible: Visible) -> Visible:
        """Return what each position sees but for the newest slots that lie apart."""
        return visible if self.apart is None else hide(visible, self.apart)


def _always_read(index: KVIndex, visible: Visible, budget: int | None) -> _AlwaysRead:
    """Return what is always read. A row that begins before its index does is read in full."""
    sinks, recent = index.always_read_of(budget)
    sinks_end = torch.minimum(visible.first + sinks, visible.end)
    newest, tail = newest_of(index.newest, visible), index.unread[:, None]
    uncovered = visible.first < index.start[:, None]
    tail = torch.where(uncovered, sinks_end, tail)
    apart, recent_start = recent_spans(newest, visible, recent, sinks_end, tail)
    wraps = index.newest is not None and bool((apart[0] < apart[1]).any())
    return _AlwaysRead(sinks_end, recent_start, newest, apart if wraps else None)


def _question(
    inputs: ScoreInputs,
    visible: Visible,
    always: _AlwaysRead,
    room: Tensor,
    budget: Tensor,
    site: str,
) -> Question:
    """Return the question to the policy: `room` and `budget` are int64 [B, Hkv, Tq]."""
    return Question(
        query=query_rows(inputs.query, room.shape[1]),
        key=inputs.key,
        query_len=inputs.query.shape[2],
        scale=inputs.scale,
        softcap=inputs.softcap,
        visible=visible,
        begin=always.sinks_end,
        end=always.recent_start,
        room=room,
        budget=budget,
        site=site,
        newest=always.newest,
    )


def _log_always(
    inputs: ScoreInputs, visible: Visible, always: _AlwaysRead, heads: int
) -> Tensor | None:
    """Return log sum of exp(score) over what is always read, [B, Hkv, G, Tq]; None without keys."""
    if inputs.key is None:
        return None
    starts, lengths = always.runs(visible, heads)
    slot, padding = slots_read(Selection(starts, lengths, visible, inputs.scale))
    score = scores_at(inputs, visible, slot, padding, torch.float32)
    return score.logsumexp(-1).transpose(2, 3)


def _per_head(value: Tensor, heads: int) -> Tensor:
    """Return a value [B, Tq] once for each KV head: [B, Hkv, Tq, 1]."""
    return value[:, None, :, None].expand(-1, heads, -1, 1)
