"""Attention of a whole sequence, each tile of queries over the keys that it reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.policies.registry import prefill_choice
from lychee_compile.kernels.reference.attention import rows_at
from lychee_compile.kernels.reference.certificate import bounded_share
from lychee_compile.kernels.reference.nodes import log_count
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.tiles import Sight, tile_sight
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

AT_ONCE = 8
"""Tiles that a policy is asked about at a time, to bound the memory of its scores."""


@dataclass(frozen=True)
class TileConfig:
    """How much of a whole sequence is read, and by which policy. Lengths are in tokens."""

    policy: str = "lychee"
    budget: float = 0.2
    """Keys that a tile reads: from 1 on their number, below it the share of those it sees."""
    sinks: int = 16
    recent: int = 64
    epsilon: float | None = None
    """Largest share of the softmax mass that may be missed: tiles read more, up to all keys, until
    a certificate proves it. None: the budget holds, and nothing is proved."""
    shortest: int = 0
    """Tiles that see fewer keys read all of them."""


@dataclass(frozen=True)
class TileResult:
    """What attention of a whole sequence gives, and what it took."""

    output: Tensor
    """[B, Hq, T, Dv], in the dtype of the queries."""
    log_sum: Tensor
    """Log-sum-exp of the scores read, float32 [B, Hq, T]."""
    certificate: Tensor
    """Upper bound of the share of the softmax that was not read, float32 [B, Hq, T]; 1 where nobody
    asked for it."""
    read: Tensor | None
    """Keys read, bool [B, Hq, tiles, L], where that was to be kept; tiles are of queries in the
    order given."""


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    config: TileConfig,
    softcap: float | None = None,
    extra: Tensor | None = None,
    order: Tensor | None = None,
    certify: bool = False,
    keep_read: bool = True,
) -> TileResult:
    """Attention of `query` [B, Hq, T, D] over what its tiles read of `key` [B, Hkv, L, D].

    `value` is [B, Hkv, L, Dv]; `mask` is an SDPA mask, bool or additive, `causal` PyTorch's own;
    `softcap` and `extra` as in `attend`. `order`, int64 [T], is the query at each place, where
    neighbours are to be others than those in the sequence. With `certify`, or an epsilon, it is
    bounded what the keys that were not read would have added; with `keep_read`, which takes a byte
    for every tile and key, what was read is told. Computed in float32, or in float64 for float64
    queries.
    """
    batch, _, query_len, _ = query.shape
    sight = Sight(mask, causal, batch, query_len, key.shape[2], query.device, order)
    if order is not None:
        query = query.index_select(2, order)
        extra = None if extra is None else in_order(extra, order)
    certify = certify or config.epsilon is not None
    attention = _Attention(query, key, value, sight, scale, softcap, extra, certify)
    positions = AT_ONCE * QUERY_TILE
    slices = [
        attention.some_tiles(begin, min(begin + positions, query_len), config)[: 3 + keep_read]
        for begin in range(0, query_len, positions)
    ]
    output, log_sum, certificate, *kept = (torch.cat(part, 2) for part in zip(*slices, strict=True))
    if order is not None:
        back = order.argsort()
        output, log_sum, certificate = (
            each.index_select(2, back) for each in (output, log_sum, certificate)
        )
    return TileResult(
        output.to(query.dtype), log_sum.float(), certificate, kept[0] if kept else None
    )


def in_order(extra: Tensor, order: Tensor) -> Tensor:
    """Extra logits, broadcastable to [B, Hq, T], of the queries in another order."""
    return extra if extra.shape[-1] == 1 else extra.index_select(-1, order)


@dataclass(frozen=True)
class _Attention:
    """One attention, its queries a whole sequence."""

    query: Tensor
    key: Tensor
    value: Tensor
    sight: Sight
    scale: float
    softcap: float | None
    extra: Tensor | None
    certify: bool

    @cached_property
    def known_key(self) -> Tensor:
        """float32 [B, Hkv, L, D]; what nobody sees may hold anything, NaN for one."""
        return self.key.float().nan_to_num()

    def some_tiles(
        self, begin: int, end: int, config: TileConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, log-sum-exp, certificates and keys read of the queries [begin, end)."""
        question = self._question(begin, end, config)
        always = question.sight.always.expand_as(question.candidates)
        choose, room = prefill_choice(config.policy), question.room
        while True:
            read = always | choose(replace(question, room=room))
            output, log_sum = self._attend(begin, end, read)
            share = torch.ones_like(log_sum, dtype=torch.float32)
            if self.certify:
                share = self._missed(begin, end, question, ~read, log_sum)
            failing = _failing(share, config.epsilon) & (room < read.shape[-1])
            if not bool(failing.any()):
                return output, log_sum, share, read
            room = torch.where(failing, 2 * room + QUERY_TILE, room)

    def _question(self, begin: int, end: int, config: TileConfig) -> PrefillQuestion:
        sight = tile_sight(self.sight, begin, end, config.sinks, config.recent)
        batch, heads, _, _ = self.query.shape
        counts = sight.some.sum(-1)
        allowed = torch.full_like(counts, int(config.budget))
        if config.budget < 1:
            allowed = (config.budget * counts).ceil().long()
        allowed = torch.where(counts < config.shortest, counts, allowed)
        room = (allowed - sight.always.sum(-1)).clamp(min=0).expand(batch, heads, -1)
        query = self.query[:, :, begin:end].float()
        return PrefillQuestion(query, self.known_key, self.scale, self.softcap, sight, room)

    def _attend(self, begin: int, end: int, read: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Hq, end - begin, Dv] and the log-sum-exp [B, Hq, end - begin]."""
        parts = [
            self._attend_tile(first, min(first + QUERY_TILE, end), read[:, :, place])
            for place, first in enumerate(range(begin, end, QUERY_TILE))
        ]
        outputs, sums = zip(*parts, strict=True)
        return torch.cat(outputs, 2), torch.cat(sums, 2)

    def _attend_tile(self, first: int, last: int, read: Tensor) -> tuple[Tensor, Tensor]:
        """Of the queries [first, last) over the keys where `read`, bool [B, Hq, L]."""
        work = torch.promote_types(self.query.dtype, torch.float32)
        batch, heads, _ = read.shape
        kv_heads = self.key.shape[1]
        slot = (~read).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(read.sum(-1).max())]
        seen = self._at(self.sight.rows(first, last), slot) & read.gather(-1, slot)[:, :, None]
        grouped = slot.unflatten(1, (kv_heads, -1))
        keys, values = (
            rows_at(each, grouped).flatten(1, 2).to(work) for each in (self.key, self.value)
        )
        values = values.masked_fill(~seen.any(2)[..., None], 0)
        score = self.query[:, :, first:last].to(work) @ keys.transpose(-1, -2)
        score = capped(score * self.scale, self.softcap)
        bias = self.sight.bias(first, last)
        if bias is not None:
            score = score + self._at(bias, slot).to(work)
        score = score.masked_fill(~seen, -torch.inf)
        log_sum = score.logsumexp(-1)
        if self.extra is not None:
            wide = self.extra.to(work).expand(batch, heads, self.query.shape[2])
            log_sum = torch.logaddexp(log_sum, wide[:, :, first:last])
        nothing = log_sum == -torch.inf
        weight = (score - log_sum.masked_fill(nothing, 0)[..., None]).exp()
        return (weight @ values).masked_fill(nothing[..., None], 0), log_sum

    def _at(self, rows: Tensor, slot: Tensor) -> Tensor:
        """What rows [B or 1, Hq or 1, P, L] hold for the slots [B, Hq, S]: [B, Hq, P, S]."""
        wide = rows.expand(*slot.shape[:2], -1, -1)
        return wide.gather(-1, slot[:, :, None].expand(-1, -1, wide.shape[2], -1))

    def _missed(
        self, begin: int, end: int, question: PrefillQuestion, unread: Tensor, log_sum: Tensor
    ) -> Tensor:
        """Upper bound of the share of the softmax in unread keys: float32 [B, Hq, end - begin].

        By the balls around pages of keys. All queries of a tile see what it leaves out, but those
        that see nothing at all, which miss nothing.
        """
        pages, unread = question.key_nodes(PAGE), unread & question.candidates
        padded = F.pad(unread, (0, (-unread.shape[-1]) % PAGE)).unflatten(-1, (-1, PAGE))
        counts = padded.sum(-1).repeat_interleave(QUERY_TILE, 2)[:, :, : end - begin]
        bound = capped(pages.score_bound(question.query, self.scale), self.softcap)
        bias = self.sight.bias(begin, end)
        if bias is not None:
            filled = F.pad(bias.float(), (0, (-bias.shape[-1]) % PAGE), value=-torch.inf)
            bound = bound + filled.unflatten(-1, (-1, PAGE)).amax(-1)
        bound = (bound + log_count(counts)).masked_fill(counts == 0, -torch.inf)
        longest = torch.linalg.vector_norm(question.key, dim=-1).amax(-1)[..., None]
        reach = torch.linalg.vector_norm(question.query, dim=-1) * question.per_query_head(longest)
        log_unread = bound.logsumexp(-1)
        head_dim = self.query.shape[-1]
        share = bounded_share(log_unread, log_sum.float(), self.scale, reach, head_dim)
        return share.masked_fill(~self.sight.rows(begin, end).any(-1), 0)


def _failing(share: Tensor, epsilon: float | None) -> Tensor:
    """Tiles of which some query may miss more than `epsilon`: bool [B, Hq, tiles]."""
    over = share > (1 if epsilon is None else epsilon)
    padded = F.pad(over, (0, (-over.shape[-1]) % QUERY_TILE))
    return padded.unflatten(-1, (-1, QUERY_TILE)).any(-1)
