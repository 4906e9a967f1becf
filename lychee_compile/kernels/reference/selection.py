"""Choosing what a query reads: sinks, recent tokens, and what a policy finds between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, query_rows
from lychee_compile.kernels.reference.visible import Visible, visible_keys


@dataclass(frozen=True)
class Selection:
    """Runs of slots to read, per row, KV head and query position."""

    run_start: Tensor
    run_length: Tensor
    """First slot and length of each run, int64 [B, Hkv, Tq, R]. Runs do not overlap: the first
    holds the sinks, the last the recent tokens, those between what the policy chose."""
    visible: Visible
    scale: float
    """What q.k was multiplied by."""
    log_unread_bound: Tensor | None = None
    """Upper bound of log sum of exp(score) over the unread keys, float32 [B, Hq, Tq]; None where
    it was not asked for."""

    def tokens(self) -> Tensor:
        """Slots read, int64 [B, Hkv, Tq, S], -1 where a row, head or query reads fewer than S.

        Slots that the mask hides from every head are left out.
        """
        ends = self.run_length.cumsum(-1)
        size = int(ends[..., -1].max())
        slot = torch.arange(size, device=ends.device).expand(*ends.shape[:-1], size).contiguous()
        run = torch.searchsorted(ends, slot, right=True)
        inside = run < ends.shape[-1]
        run = run.clamp(max=ends.shape[-1] - 1)
        offset = slot - (ends - self.run_length).gather(-1, run)
        token = torch.where(inside, self.run_start.gather(-1, run) + offset, -1)
        if self.visible.counts is not None and self.visible.mask is not None:
            seen = self.visible.mask.any(1)[:, None].expand(-1, token.shape[1], -1, -1)
            token = torch.where(seen.gather(-1, token.clamp(min=0)), token, -1)
        return token

    def token_mask(self) -> Tensor:
        """Whether each slot is read, sinks and recent tokens included: bool [B, Hkv, Tq, L]."""
        token = self.tokens()
        read = torch.zeros(
            *token.shape[:3], self.visible.kv_len + 1, dtype=torch.bool, device=token.device
        )
        read.scatter_(-1, torch.where(token < 0, self.visible.kv_len, token), True)
        return read[..., :-1]


def select(
    index: KVIndex,
    key: Tensor | None,
    query: Tensor,
    scale: float,
    kv_len: int,
    mask: Tensor | None = None,
    budget: int | Tensor | None = None,
    softcap: float | None = None,
    site: str = "",
) -> Selection:
    """Choose at most `budget` tokens per KV head for each position of `query` [B, Hq, Tq, D].

    Sinks, recent tokens and every visible token that the index does not hold are always read, even
    beyond the budget. `mask` is an SDPA mask over `kv_len` slots or None; `scale` multiplies q.k;
    `budget` may differ between heads, int64 [B, Hkv, Tq], and None reads all visible tokens.
    `softcap` as in `attend`; `key`, the cache, and `site` are for policies that want to know.
    """
    batch, _, query_len, _ = query.shape
    visible = visible_keys(mask, batch, query_len, kv_len, query.device)
    sinks, recent = index.always_read
    sinks_end = torch.minimum(visible.first + sinks, visible.end)
    recent_start = torch.minimum(visible.end - recent, index.tail[:, None])
    recent_start = torch.maximum(recent_start, sinks_end)
    uncovered = visible.first < index.start[:, None]
    recent_start = torch.where(uncovered, sinks_end, recent_start)
    recent_length = (visible.end - recent_start).clamp(min=0)
    between = recent_start > sinks_end
    inner = visible.tokens_within(sinks_end[..., None], recent_start[..., None])[..., 0]
    inner = torch.where(between, inner, 0)
    always = (sinks_end - visible.first).clamp(min=0) + recent_length
    shape = (batch, index.kv_heads, query_len)
    if budget is None:
        room = inner[:, None].expand(shape)
    else:
        room = (torch.as_tensor(budget, device=query.device) - always[:, None]).expand(shape)
        room = room.clamp(min=0)
    if bool((inner[:, None] <= room).all()):
        length = torch.where(between, recent_start - sinks_end, 0)
        chosen = _per_head(sinks_end, index.kv_heads), _per_head(length, index.kv_heads)
    else:
        rows = query_rows(query, index.kv_heads)
        chosen = index.choose(
            Question(
                rows, key, query_len, scale, softcap, visible, sinks_end, recent_start, room, site
            )
        )

    def joined(first: Tensor, chosen: Tensor, last: Tensor) -> Tensor:
        parts = _per_head(first, index.kv_heads), chosen, _per_head(last, index.kv_heads)
        return torch.cat(parts, -1)

    sinks_length = (sinks_end - visible.first).clamp(min=0)
    run_start = joined(visible.first, chosen[0], recent_start)
    run_length = joined(sinks_length, chosen[1], recent_length)
    return Selection(run_start, run_length, visible, scale)


def _per_head(value: Tensor, heads: int) -> Tensor:
    """[B, Tq] as [B, Hkv, Tq, 1]."""
    return value[:, None, :, None].expand(-1, heads, -1, 1)
