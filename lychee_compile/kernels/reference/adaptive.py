"""Attention whose budget widens until the share it may have missed is proved small enough."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lychee_compile.kernels.reference.attention import attend
from lychee_compile.kernels.reference.certificate import log_unread_bound, missed_share
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.nodes import rounding_slack
from lychee_compile.kernels.reference.question import Question, query_rows
from lychee_compile.kernels.reference.selection import Selection, select

WIDEST = 4
"""Budgets of more than 1/4 of the context are not tried: all keys cost as much as half of it."""


def certified_attention(
    index: KVIndex,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    budget: int,
    epsilon: float,
    softcap: float | None = None,
    extra: Tensor | None = None,
    site: str = "",
) -> tuple[Tensor, Selection, Tensor]:
    """Attention that misses at most the share `epsilon` of the softmax mass of any query head.

    Operands as in `attend`. Where the certificate of `budget` tokens is larger than `epsilon` the
    budget of that KV head doubles, while it is a small part of the context. Where that is not
    enough, every key is scored and as many values are read as it takes: then what is missed is
    known, not bounded. Returns the output [B, Hq, Tq, Dv], what was read, and the certificates,
    float32 [B, Hq, Tq]. The share is that of the keys alone: an attention sink (`extra`) only makes
    it smaller.
    """
    kv_len, heads = key.shape[2], key.shape[1]
    width = torch.full(
        (query.shape[0], heads, query.shape[2]), budget, dtype=torch.int64, device=query.device
    )
    while True:
        selection = select(index, key, query, scale, kv_len, mask, width, softcap, site)
        share = _certify(index, key, query, selection, mask, softcap)
        failing = _of_group(share, heads) > epsilon
        wider = torch.where(failing, 2 * width, width)
        if not bool(failing.any()) or WIDEST * int(wider.max()) > kv_len:
            break
        width = wider
    if bool(failing.any()):
        token, missed = _least_tokens(query, key, selection, softcap, epsilon)
        selection = _read_also(selection, token & failing[..., None])
        share = torch.where(failing.repeat_interleave(query.shape[1] // heads, 1), missed, share)
    output, _ = attend(query, key, value, selection, mask, scale, softcap, extra)
    return output, selection, share


def _certify(
    index: KVIndex,
    key: Tensor,
    query: Tensor,
    selection: Selection,
    mask: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Certificates of a selection: float32 [B, Hq, Tq]."""
    no_value = key[..., :1]
    _, log_read = attend(query, key, no_value, selection, mask, selection.scale, softcap)
    bounded = replace(
        selection, log_unread_bound=log_unread_bound(index, query, selection, softcap)
    )
    return missed_share(key, query, bounded, log_read)


def _of_group(share: Tensor, heads: int) -> Tensor:
    """The largest share of a group's heads: [B, Hq, Tq] -> [B, Hkv, Tq]."""
    return share.unflatten(1, (heads, -1)).amax(2)


def _least_tokens(
    query: Tensor, key: Tensor, selection: Selection, softcap: float | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Tokens that leave no head of a group more than `epsilon` unread: bool [B, Hkv, Tq, L].

    By exact scores: the tokens that matter most to the group, as many as it takes. The share that
    each head then misses at most is float32 [B, Hq, Tq].
    """
    batch, _, query_len, head_dim = query.shape
    heads, visible = key.shape[1], selection.visible
    rows = query_rows(query, heads)
    nowhere = torch.zeros_like(visible.first)
    everywhere = torch.full_like(visible.first, visible.kv_len)
    room = everywhere[:, None].expand(batch, heads, query_len)
    question = Question(
        rows, key, query_len, selection.scale, softcap, visible, nowhere, everywhere, room
    )
    scores = question.token_scores()
    share = scores.double().softmax(-1)
    order = share.amax(2).argsort(dim=-1, descending=True, stable=True)
    through = share.gather(-1, order[:, :, None].expand_as(share)).cumsum(-1)
    longest = torch.linalg.vector_norm(question.keys().float(), dim=-1).amax(-1)[..., None, None]
    reach = question.split(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))[..., 0]
    slack = 2 * rounding_slack(head_dim) * (1 + abs(selection.scale) * reach * longest)
    missed = (1 - through) + slack[..., None]
    enough = (missed <= epsilon).all(2)
    needed = (~enough).sum(-1, keepdim=True) + 1
    place = torch.arange(order.shape[-1], device=order.device)
    token = torch.zeros_like(enough).scatter(-1, order, place < needed)
    last = (needed - 1).clamp(max=order.shape[-1] - 1)[:, :, None].expand(*missed.shape[:-1], 1)
    left = torch.where((needed > order.shape[-1])[:, :, None], 0, missed.gather(-1, last))
    return token, left.squeeze(-1).flatten(1, 2).float()


def _read_also(selection: Selection, token: Tensor) -> Selection:
    """A selection that reads the slots where `token`, bool [B, Hkv, Tq, L], is set as well."""
    read = selection.token_mask() | token
    count = int(read.sum(-1).max())
    order = (~read).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]
    taken = read.gather(-1, order)
    return replace(selection, run_start=torch.where(taken, order, 0), run_length=taken.long())
