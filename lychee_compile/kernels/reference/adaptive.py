"""Attention whose budget widens until the share that it may miss is proved small enough."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lychee_compile.kernels.reference.attention import attend
from lychee_compile.kernels.reference.certificate import log_unread_bound, missed_share
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.nodes import rounding_slack
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.question import Question, query_rows
from lychee_compile.kernels.reference.selection import Selection, select

WIDEST = 4
"""Least ratio of context to budget: a wider budget costs more than scoring every key."""


def certified_attention(
    index: KVIndex, operands: Operands, budget: int, epsilon: float, site: str = ""
) -> tuple[Tensor, Selection, Tensor]:
    """Attend so that no query head misses more than the share `epsilon` of its softmax mass.

    The budget of a KV head doubles while its certificate is larger than `epsilon` and the budget is
    a small part of the context. If that is not enough, every key is scored and as many values are
    read as it takes: then the missed share is known, not bounded. Returns the output
    [B, Hq, Tq, Dv], the selection that was read, and the certificates, float32 [B, Hq, Tq]. The
    share is that of the keys alone: an attention sink (`extra`) only makes it smaller.
    """
    batch, _, query_len, _ = operands.query.shape
    heads, kv_len = operands.key.shape[1], operands.kv_len
    device = operands.query.device
    index.complete(operands.key)
    width = torch.full((batch, heads, query_len), budget, dtype=torch.int64, device=device)
    while True:
        selection = select(index, operands.score_inputs, width, site)
        share = _certify(index, operands, selection)
        failing = _of_group(share, heads) > epsilon
        wider = torch.where(failing, 2 * width, width)
        if not bool(failing.any()) or WIDEST * int(wider.max()) > kv_len:
            break
        width = wider
    if bool(failing.any()):
        token, missed = _least_tokens(operands, selection, epsilon)
        selection = _read_also(selection, token & failing[..., None])
        share = torch.where(failing.repeat_interleave(operands.group, 1), missed, share)
    output, _ = attend(operands, selection)
    return output, selection, share


def _certify(index: KVIndex, operands: Operands, selection: Selection) -> Tensor:
    """Return the certificates of a selection, float32 [B, Hq, Tq]."""
    query, key = operands.query, operands.key
    _, log_read = attend(
        replace(operands, value=key[..., :1], extra=None, extra_value=None), selection
    )
    bound = log_unread_bound(index, query, selection, operands.softcap)
    return missed_share(key, query, replace(selection, log_unread_bound=bound), log_read)


def _of_group(share: Tensor, heads: int) -> Tensor:
    """Return the largest share among the heads of each group: [B, Hq, Tq] -> [B, Hkv, Tq]."""
    return share.unflatten(1, (heads, -1)).amax(2)


def _least_tokens(
    operands: Operands, selection: Selection, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Find the fewest tokens that leave no head of a group more than `epsilon` unread.

    Tokens are ranked by exact scores. Returns the tokens, bool [B, Hkv, Tq, L], and the largest
    share that each head can then miss, float32 [B, Hq, Tq].
    """
    batch, _, query_len, head_dim = operands.query.shape
    heads, visible = operands.key.shape[1], selection.visible
    rows = query_rows(operands.query, heads)
    nowhere = torch.zeros_like(visible.first)
    everywhere = torch.full_like(visible.first, visible.kv_len)
    room = everywhere[:, None].expand(batch, heads, query_len)
    question = Question(
        query=rows,
        key=operands.key,
        query_len=query_len,
        scale=operands.scale,
        softcap=operands.softcap,
        visible=visible,
        begin=nowhere,
        end=everywhere,
        room=room,
        budget=room,
    )
    scores = question.token_scores()
    share = scores.double().softmax(-1)
    order = share.amax(2).argsort(dim=-1, descending=True, stable=True)
    through = share.gather(-1, order[:, :, None].expand_as(share)).cumsum(-1)
    longest = torch.linalg.vector_norm(question.keys().float(), dim=-1).amax(-1)[..., None, None]
    reach = question.split(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))[..., 0]
    slack = 2 * rounding_slack(head_dim) * (1 + abs(operands.scale) * reach * longest)
    missed = (1 - through) + slack[..., None]
    enough = (missed <= epsilon).all(2)
    needed = (~enough).sum(-1, keepdim=True) + 1
    number = torch.arange(order.shape[-1], device=order.device)
    token = torch.zeros_like(enough).scatter(-1, order, number < needed)
    last = (needed - 1).clamp(max=order.shape[-1] - 1)[:, :, None].expand(*missed.shape[:-1], 1)
    left = torch.where((needed > order.shape[-1])[:, :, None], 0, missed.gather(-1, last))
    return token, left.squeeze(-1).flatten(1, 2).float()


def _read_also(selection: Selection, token: Tensor) -> Selection:
    """Return a selection that also reads the slots where `token`, bool [B, Hkv, Tq, L], is set."""
    read = selection.token_mask() | token
    count = int(read.sum(-1).max())
    order = (~read).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]
    taken = read.gather(-1, order)
    return replace(selection, run_start=torch.where(taken, order, 0), run_length=taken.long())
