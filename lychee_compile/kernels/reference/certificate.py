"""Certificates: upper bounds of the share of the softmax that a selection misses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.nodes import rounding_slack
from lychee_compile.kernels.reference.question import query_rows
from lychee_compile.kernels.reference.scores import rows_at
from lychee_compile.kernels.reference.selection import Selection, slots_read
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.visible import per_kv_head


def log_unread_bound(
    index: KVIndex, query: Tensor, selection: Selection, softcap: float | None = None
) -> Tensor:
    """Bound log sum of exp(score) over the unread keys from above: float32 [B, Hq, Tq].

    `query` is [B, Hq, Tq, D]; `softcap` bends scores to softcap tanh(score / softcap). The bound is
    infinite if the index has no bound for an unread key.
    """
    heads, visible = index.kv_heads, selection.visible
    group, query_len = query.shape[1] // heads, query.shape[2]
    unread = ~selection.token_mask()[:, :, None]
    if visible.mask is not None:
        unread = unread & per_kv_head(visible.mask, heads, group)
    unread = unread.expand(-1, -1, group, -1, -1)
    if not bool(unread.any()):
        return query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    rows = query_rows(query, heads)
    bound = index.score_bound(rows, selection.scale)
    if bound is None:
        bound = rows.new_full((*rows.shape[:3], 0), torch.inf)
    bound = F.pad(bound, (0, max(visible.kv_len - bound.shape[-1], 0)), value=torch.inf)
    slot = torch.arange(visible.kv_len, device=query.device)
    known = (slot >= index.start[:, None]) & (slot < index.tail[:, None])
    bound = bound[..., : visible.kv_len].masked_fill(~known[:, None, None], torch.inf)
    bound = capped(bound, softcap).unflatten(2, (group, query_len))
    if visible.bias is not None:
        bound = bound + per_kv_head(visible.bias, heads, group).float()
    bound = bound.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return bound.masked_fill(~unread, -torch.inf).logsumexp(-1).flatten(1, 2)


def missed_share(key: Tensor, query: Tensor, selection: Selection, log_read: Tensor) -> Tensor:
    """Bound the share of the softmax mass that was not read from above: float32 [B, Hq, Tq].

    The bound is M / (1 + M), rounded up, where M is the bound of the unread mass relative to the
    mass read. `key` is [B, Hkv, L, D], `log_read` the log-sum-exp that `attend` returns. The
    selection must carry its `log_unread_bound`.
    """
    assert selection.log_unread_bound is not None
    slot, _ = slots_read(selection)
    lengths = torch.linalg.vector_norm(rows_at(key, slot).float(), dim=-1)
    longest = F.pad(lengths, (0, 1)).amax(-1)  # there may be none
    group = query.shape[1] // key.shape[1]
    reach = torch.linalg.vector_norm(query.float(), dim=-1) * longest.repeat_interleave(group, 1)
    return bounded_share(
        selection.log_unread_bound, log_read, selection.scale, reach, query.shape[-1]
    )


def bounded_share(
    log_unread: Tensor, log_read: Tensor, scale: float, reach: Tensor, head_dim: int
) -> Tensor:
    """Bound the share of a softmax in its unread part from above, float32.

    `log_unread` bounds the log of the unread mass. `log_read` is the log-sum-exp of the scores
    read, in float32. `reach` is the largest |q| |k|, so that `scale` times it bounds those scores.
    """
    slack = rounding_slack(head_dim)
    log_floor = log_read - slack * abs(scale) * reach - slack * log_read.abs() - slack
    share = torch.sigmoid(log_unread + slack * log_unread.abs() - log_floor) * (1 + slack)
    tiny = torch.finfo(torch.float32).tiny  # no share that is missed rounds to none
    share = share.nan_to_num(nan=1.0).clamp(tiny, 1.0)
    return torch.where(log_unread == -torch.inf, 0.0, share)
