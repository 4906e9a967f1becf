"""Sparse attention of a prefill: each tile of queries reads the keys chosen for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.certificate import bounded_share
from lychee_compile.kernels.reference.drawing import Drawn, draws_keys
from lychee_compile.kernels.reference.nodes import log_count
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_question import (
    PrefillChoice,
    PrefillQuestion,
    as_drawn,
)
from lychee_compile.kernels.reference.scores import rows_at
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.tiles import Sight, TileSight, tile_sight
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

AT_ONCE = 8
"""Number of tiles in one question to a policy, to bound the memory of its scores."""


@dataclass(frozen=True)
class PrefillConfig:
    """Settings of a sparse prefill: which keys it reads, and how many. Lengths are in tokens."""

    choice: PrefillChoice
    """Chooses the keys that a tile reads beyond those it always reads."""
    budget: float = 0.2
    """Number of keys that a tile reads; below 1, the share of the keys that the tile sees."""
    sinks: int = 16
    """Number of first keys that every tile reads."""
    recent: int = 64
    """Number of last keys, and of neighbours of its own positions, that every tile reads."""
    epsilon: float | None = None
    """Largest share of the softmax mass that may be missed. Tiles read more, up to all keys, until
    a certificate proves it. None: the budget is kept and nothing is proved."""
    shortest: int = 0
    """Number of keys below which a tile reads all that it sees."""
    coverage: float | None = None
    """Share of the estimated softmax over the candidates at which a policy that draws keys ends,
    see `PrefillQuestion.draw`. None: at the budget alone."""

    def room(self, sight: TileSight, heads: int) -> Tensor:
        """Return how many keys may be chosen, int64 [B or 1, heads, tiles], by what tiles see."""
        counts = sight.some.sum(-1)
        allowed = torch.full_like(counts, int(self.budget))
        if self.budget < 1:
            allowed = (self.budget * counts).ceil().long()
        allowed = torch.where(counts < self.shortest, counts, allowed)
        return (allowed - sight.always.sum(-1)).clamp(min=0).expand(-1, heads, -1)


@dataclass(frozen=True)
class PrefillResult:
    """Output of a sparse prefill, and what it read."""

    output: Tensor
    """[B, Hq, T, Dv], in the dtype of the queries."""
    log_sum: Tensor
    """Log-sum-exp of the scores read, float32 [B, Hq, T]; drawn keys count for others too."""
    log_read: Tensor
    """The same, with each key that is read counted once."""
    certificate: Tensor
    """Upper bound of the share of the softmax that was not read, float32 [B, Hq, T]; 1 if nobody
    asked for it."""
    read: Tensor | None
    """Keys read, bool [B, Hq, tiles, L], with tiles of queries in the given order; None if that was
    not to be kept."""


def prefill_attention(
    operands: Operands,
    config: PrefillConfig,
    causal: bool = False,
    order: Tensor | None = None,
    certify: bool = False,
    keep_read: bool = True,
) -> PrefillResult:
    """Attend from T queries, tile by tile, over the keys that each tile reads.

    `causal` adds PyTorch's own causal mask, aligned to the first key. `order`, int64 [T], is a
    permutation of the queries that decides which of them share a tile; None keeps their order.
    `certify`, or an epsilon, bounds what the unread keys would have added. `keep_read`, which takes
    a byte for every tile and key, returns which keys were read. Computed in float32, or in float64
    for float64 queries.
    """
    batch, _, query_len, _ = operands.query.shape
    device = operands.query.device
    sight = Sight(operands.mask, causal, batch, query_len, operands.kv_len, device, order)
    attention = _Attention(
        operands if order is None else _reordered(operands, order),
        sight,
        config,
        certify or config.epsilon is not None,
    )
    slices = [
        attention.some_tiles(begin, min(begin + AT_ONCE * QUERY_TILE, query_len))[: 4 + keep_read]
        for begin in range(0, query_len, AT_ONCE * QUERY_TILE)
    ]
    parts = [torch.cat(part, 2) for part in zip(*slices, strict=True)]
    read = parts.pop() if keep_read else None
    if order is not None:
        back = order.argsort()
        parts = [each.index_select(2, back) for each in parts]
    output, log_sum, log_read, certificate = parts
    return PrefillResult(
        output.to(operands.query.dtype), log_sum.float(), log_read.float(), certificate, read
    )


def _reordered(operands: Operands, order: Tensor) -> Operands:
    """Return the operands with their queries in the given order; the mask stays as it is."""
    extra = None if operands.extra is None else in_order(operands.extra, order)
    return replace(operands, query=operands.query.index_select(2, order), extra=extra)


def in_order(extra: Tensor, order: Tensor) -> Tensor:
    """Return extra logits, broadcastable to [B, Hq, T], for the queries in the given order."""
    return extra if extra.shape[-1] == 1 else extra.index_select(-1, order)


@dataclass(frozen=True)
class _Attention:
    """A prefill attention, computed for some tiles of queries at a time."""

    operands: Operands
    sight: Sight
    config: PrefillConfig
    certify: bool

    @cached_property
    def known_key(self) -> Tensor:
        """Keys as float32 [B, Hkv, L, D], without the NaN that unseen keys may hold."""
        return self.operands.key.float().nan_to_num()

    @cached_property
    def facts(self) -> dict[object, Any]:
        """Facts of the keys that the policy has worked out."""
        return {}

    def some_tiles(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return what `PrefillResult` holds, in its order, of the queries [begin, end)."""
        question = self._question(begin, end)
        always = question.sight.always.expand_as(question.candidates)
        choose, room = self.config.choice, question.room
        while True:
            drawn = as_drawn(choose(replace(question, room=room)))
            read = always | drawn.read
            output, log_sum, log_read = self._attend(begin, end, replace(drawn, read=read))
            share = torch.ones_like(log_sum, dtype=torch.float32)
            if self.certify:
                share = self._missed(begin, end, question, ~read, log_sum)
            failing = _failing(share, self.config.epsilon) & (room < read.shape[-1])
            if not bool(failing.any()):
                return output, log_sum, log_read, share, read
            room = torch.where(failing, 2 * room + QUERY_TILE, room)

    def _question(self, begin: int, end: int) -> PrefillQuestion:
        operands, config = self.operands, self.config
        sight = tile_sight(self.sight, begin, end, config.sinks, config.recent)
        batch, heads, _, _ = operands.query.shape
        return PrefillQuestion(
            query=operands.query[:, :, begin:end].float(),
            key=self.known_key,
            scale=operands.scale,
            softcap=operands.softcap,
            sight=sight,
            room=config.room(sight, heads).expand(batch, -1, -1),
            draws=not self.certify and draws_keys(config.budget, operands.kv_len),
            coverage=config.coverage,
            facts=self.facts,
        )

    def _attend(self, begin: int, end: int, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [B, Hq, end - begin, Dv] and both log-sum-exps [B, Hq, end - begin]."""
        parts = [
            self._attend_tile(first, min(first + QUERY_TILE, end), drawn.of_tile(tile))
            for tile, first in enumerate(range(begin, end, QUERY_TILE))
        ]
        outputs, sums, sums_read = zip(*parts, strict=True)
        return torch.cat(outputs, 2), torch.cat(sums, 2), torch.cat(sums_read, 2)

    def _attend_tile(self, first: int, last: int, drawn: Drawn) -> tuple[Tensor, Tensor, Tensor]:
        """Attend from the queries [first, last) to the keys of their tile."""
        operands, read = self.operands, drawn.read
        query_len = operands.query.shape[2]
        work = torch.promote_types(operands.query.dtype, torch.float32)
        batch, heads, _ = read.shape
        slot = (~read).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(read.sum(-1).max())]
        seen = self._at(self.sight.rows(first, last), slot) & read.gather(-1, slot)[:, :, None]
        grouped = slot.unflatten(1, (operands.key.shape[1], -1))
        keys, values = (
            rows_at(each, grouped).flatten(1, 2).to(work) for each in (operands.key, operands.value)
        )
        values = values.masked_fill(~seen.any(2)[..., None], 0)
        score = operands.query[:, :, first:last].to(work) @ keys.transpose(-1, -2)
        score = capped(score * operands.scale, operands.softcap)
        bias = self.sight.bias(first, last)
        if bias is not None:
            score = score + self._at(bias, slot).to(work)
        score = score.masked_fill(~seen, -torch.inf)
        extra = None
        if operands.extra is not None:
            extra = operands.extra.to(work).expand(batch, heads, query_len)[:, :, first:last]
        log_read = log_sum = _log_sum(score, extra)
        if drawn.log_weight is not None:
            score = score + drawn.log_weight.gather(-1, slot)[:, :, None].to(work)
            log_sum = _log_sum(score, extra)
        nothing = log_sum == -torch.inf
        weight = (score - log_sum.masked_fill(nothing, 0)[..., None]).exp()
        return (weight @ values).masked_fill(nothing[..., None], 0), log_sum, log_read

    def _at(self, rows: Tensor, slot: Tensor) -> Tensor:
        """Return rows [B or 1, Hq or 1, P, L] at the slots [B, Hq, S]: [B, Hq, P, S]."""
        wide = rows.expand(*slot.shape[:2], -1, -1)
        return wide.gather(-1, slot[:, :, None].expand(-1, -1, wide.shape[2], -1))

    def _missed(
        self, begin: int, end: int, question: PrefillQuestion, unread: Tensor, log_sum: Tensor
    ) -> Tensor:
        """Bound the softmax share of the unread keys from above: float32 [B, Hq, end - begin].

        The bound is that of balls around pages of keys. Every query of a tile sees each key that
        the tile leaves out, except queries that see no key at all: those miss nothing.
        """
        scale, softcap = self.operands.scale, self.operands.softcap
        pages, unread = question.key_nodes(PAGE), unread & question.candidates
        padded = F.pad(unread, (0, (-unread.shape[-1]) % PAGE)).unflatten(-1, (-1, PAGE))
        counts = padded.sum(-1).repeat_interleave(QUERY_TILE, 2)[:, :, : end - begin]
        bound = capped(pages.score_bound(question.query, scale), softcap)
        bias = self.sight.bias(begin, end)
        if bias is not None:
            filled = F.pad(bias.float(), (0, (-bias.shape[-1]) % PAGE), value=-torch.inf)
            bound = bound + filled.unflatten(-1, (-1, PAGE)).amax(-1)
        bound = (bound + log_count(counts)).masked_fill(counts == 0, -torch.inf)
        longest = torch.linalg.vector_norm(question.key, dim=-1).amax(-1)[..., None]
        reach = torch.linalg.vector_norm(question.query, dim=-1) * question.per_query_head(longest)
        log_unread = bound.logsumexp(-1)
        head_dim = self.operands.query.shape[-1]
        share = bounded_share(log_unread, log_sum.float(), scale, reach, head_dim)
        return share.masked_fill(~self.sight.rows(begin, end).any(-1), 0)


def _log_sum(score: Tensor, extra: Tensor | None) -> Tensor:
    """Return the log-sum-exp of scores [..., S] and of an extra logit [...]."""
    log_sum = score.logsumexp(-1)
    return log_sum if extra is None else torch.logaddexp(log_sum, extra)


def _failing(share: Tensor, epsilon: float | None) -> Tensor:
    """Return which tiles have a query that may miss more than `epsilon`: bool [B, Hq, tiles]."""
    over = share > (1 if epsilon is None else epsilon)
    padded = F.pad(over, (0, (-over.shape[-1]) % QUERY_TILE))
    return padded.unflatten(-1, (-1, QUERY_TILE)).any(-1)
