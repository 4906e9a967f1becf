"""Softmax attention over selected keys, and the dense attention it approximates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import Selection
from lychee_compile.kernels.reference.softcap import capped

FEW_QUERIES = 16
"""Largest number of query positions over which a mask is repeated rather than keys and values."""


def dense_attention(operands: Operands) -> Tensor:
    """Return attention over every key, [B, Hq, Tq, Dv] in the query's dtype."""
    query, mask, scale = operands.query, operands.mask, operands.scale
    key, value = operands.key, operands.value
    plain = operands.softcap is None and operands.extra is None
    if plain and operands.group > 1 and query.shape[2] <= FEW_QUERIES:
        return _grouped_attention(operands)
    if operands.group > 1:  # repeated, not `enable_gqa`: that has no fused kernel on a CPU
        key, value = (each.repeat_interleave(operands.group, dim=1) for each in (key, value))
    key, value = key.to(query.dtype), value.to(query.dtype)
    if plain:
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    score = capped((query @ key.transpose(-1, -2)).float() * scale, operands.softcap)
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
    if operands.extra is not None:
        column = operands.extra.float().expand(*score.shape[:-1])[..., None]
        score = torch.cat((score, column), -1)
    nothing = (score == -torch.inf).all(-1, keepdim=True)
    weight = score.softmax(-1).masked_fill(nothing, 0)[..., : operands.kv_len]
    return weight.to(query.dtype) @ value


def _grouped_attention(operands: Operands) -> Tensor:
    """Return attention over every key, with the query heads of a group as positions of one head.

    So keys and values [B, Hkv, L, D] are read as they are, not repeated.
    """
    query, mask, group = operands.query, operands.mask, operands.group
    heads, query_len, dtype = operands.key.shape[1], query.shape[2], query.dtype
    rows = query.unflatten(1, (heads, group)).flatten(2, 3)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.shape[1] > 1:
            wide = mask.expand(-1, -1, query_len, -1)
            mask = wide.unflatten(1, (heads, group)).flatten(2, 3)
        elif mask.shape[2] > 1:
            mask = mask.repeat(1, 1, group, 1)
    key, value = operands.key.to(dtype), operands.value.to(dtype)
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=operands.scale)
    return output.unflatten(2, (group, query_len)).flatten(1, 2)


def attend(operands: Operands, selection: Selection) -> tuple[Tensor, Tensor]:
    """Attend to the selected keys alone, with the mask and bias of the original call.

    Returns the output [B, Hq, Tq, Dv] in the query's dtype and the log-sum-exp of its scores,
    float32 [B, Hq, Tq]. A query that may see nothing gets zeros, as PyTorch's own attention gives.
    Computed in float32, or in float64 for float64 queries.
    """
    query, value = operands.query, operands.value
    batch, query_heads, query_len, _ = query.shape
    heads = operands.key.shape[1]
    slot, padding = slots_read(selection)
    work = torch.promote_types(query.dtype, torch.float32)
    score = _scores_at(operands, selection, slot, padding, work)
    weight, log_total = score.softmax(-1), score.logsumexp(-1)
    if operands.extra is not None:
        wide = operands.extra.to(work).expand(batch, query_heads, query_len)
        log_keys, wide = log_total, wide.unflatten(1, (heads, -1)).transpose(2, 3)
        log_total = torch.logaddexp(log_keys, wide)
        weight = weight * (log_keys - log_total).exp()[..., None]
    nothing = (score == -torch.inf).all(-1)
    output = (weight @ rows_at(value, slot).to(work)).masked_fill(nothing[..., None], 0)
    output = output.transpose(2, 3).reshape(batch, query_heads, query_len, -1)
    return output.to(query.dtype), log_total.transpose(2, 3).flatten(1, 2).float()


def _scores_at(
    operands: Operands, selection: Selection, slot: Tensor, padding: Tensor, work: torch.dtype
) -> Tensor:
    """Return the scores of the slots [B, Hkv, Tq, S] in the dtype `work`: [B, Hkv, Tq, G, S].

    Padding and keys that the mask hides score -inf.
    """
    query, mask = operands.query, operands.mask
    query_heads, heads = query.shape[1], operands.key.shape[1]
    grouped = query.unflatten(1, (heads, operands.group)).transpose(2, 3).to(work)
    raw = grouped @ rows_at(operands.key, slot).to(work).transpose(-1, -2)
    score = capped(raw * operands.scale, operands.softcap)
    hidden = padding[..., None, :]
    if mask is not None:
        if mask.dtype != torch.bool:
            score = score + _mask_at(mask, slot, query_heads).to(work)
        seen = selection.visible.mask if mask.dtype != torch.bool else mask
        if seen is not None:
            hidden = hidden | ~_mask_at(seen, slot, query_heads)
    return score.masked_fill(hidden, -torch.inf)


def slots_read(selection: Selection) -> tuple[Tensor, Tensor]:
    """Return the slots read, int64 [B, Hkv, Tq, S], and which of them are padding, bool.

    Padding names the last slot that the query sees: a hidden slot may hold anything, even NaN.
    """
    token = selection.tokens()
    padding = token < 0
    last = (selection.visible.end - 1).clamp(min=0)
    return torch.where(padding, last[:, None, :, None], token), padding


def rows_at(tensor: Tensor, slot: Tensor) -> Tensor:
    """Return the rows of `tensor` [B, H, L, D] at slots int64 [B, H, Tq, S]: [B, H, Tq, S, D]."""
    batch, heads, length, head_dim = tensor.shape
    if tensor.is_contiguous():
        base = torch.arange(batch * heads, device=slot.device).view(batch, heads, 1, 1) * length
        flat = tensor.view(-1, head_dim).index_select(0, (base + slot).flatten())
        return flat.view(*slot.shape, head_dim)
    row = torch.arange(batch, device=slot.device)[:, None, None, None]
    head = torch.arange(heads, device=slot.device)[:, None, None]
    return tensor[row, head, slot]


def _mask_at(mask: Tensor, slot: Tensor, query_heads: int) -> Tensor:
    """Return an SDPA mask at the slots [B, Hkv, Tq, S], as scores lie: [B, Hkv, Tq, 1 or G, S]."""
    batch, heads, query_len, _ = slot.shape
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[1] == 1:
        wide = mask.expand(batch, heads, query_len, -1)
        return wide.gather(-1, slot)[:, :, :, None]
    wide = mask.expand(batch, query_heads, query_len, -1).unflatten(
        1, (heads, query_heads // heads)
    )
    return wide.transpose(2, 3).gather(
        -1, slot[:, :, :, None].expand(-1, -1, -1, wide.shape[2], -1)
    )
