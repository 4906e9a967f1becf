"""Softmax attention over selected keys, and the dense attention it approximates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.scores import rows_at, scores_at
from lychee_compile.kernels.reference.selection import Selection, slots_read
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.visible import with_four_axes

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
    weight = score.softmax(-1).masked_fill(nothing, 0)
    output = weight[..., : operands.kv_len].to(query.dtype) @ value
    if operands.extra_value is not None:
        output = output + (weight[..., -1:] * operands.extra_value).to(query.dtype)
    return output


def _grouped_attention(operands: Operands) -> Tensor:
    """Return attention over every key, with the query heads of a group as positions of one head.

    So keys and values [B, Hkv, L, D] are read as they are, not repeated.
    """
    query, mask, group = operands.query, operands.mask, operands.group
    heads, query_len, dtype = operands.key.shape[1], query.shape[2], query.dtype
    rows = query.unflatten(1, (heads, group)).flatten(2, 3)
    if mask is not None:
        mask = with_four_axes(mask if mask.dtype == torch.bool else mask.to(dtype))
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
    float32 [B, Hq, Tq]. A token that stands for several counts as often. A query that
    may see nothing gets zeros, as PyTorch's own attention gives.
    Computed in float32, or in float64 for float64 queries.
    """
    query, value = operands.query, operands.value
    batch, query_heads, query_len, _ = query.shape
    heads = operands.key.shape[1]
    slot, padding = slots_read(selection)
    work = torch.promote_types(query.dtype, torch.float32)
    score = scores_at(operands.score_inputs, selection.visible, slot, padding, work)
    if selection.log_weight is not None:
        score = score + selection.token_log_weight()[..., None, :].to(work)
    weight, log_total = score.softmax(-1), score.logsumexp(-1)
    if operands.extra is not None:
        wide = operands.extra.to(work).expand(batch, query_heads, query_len)
        log_keys, wide = log_total, wide.unflatten(1, (heads, -1)).transpose(2, 3)
        log_total = torch.logaddexp(log_keys, wide)
        weight = weight * (log_keys - log_total).exp()[..., None]
    nothing = (score == -torch.inf).all(-1)
    output = (weight @ rows_at(value, slot).to(work)).masked_fill(nothing[..., None], 0)
    output = output.transpose(2, 3).reshape(batch, query_heads, query_len, -1)
    log_total = log_total.transpose(2, 3).flatten(1, 2)
    if operands.extra is not None and operands.extra_value is not None:
        share = (operands.extra - log_total).exp().nan_to_num(0)  # -inf - -inf: nothing is seen
        output = output + share[..., None] * operands.extra_value
    return output.to(query.dtype), log_total.float()
