"""Softmax attention over selected keys, and the dense attention it approximates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Part:
    """Attention to some keys, in float32 at least, which can be joined with that to others."""

    mean: Tensor
    """Weighted mean of the values [B, Hq, Tq, Dv]; zeros for a query that sees none of the keys."""
    log_sum: Tensor
    """Log of the sum of the weights [B, Hq, Tq]; -inf for a query that sees none of the keys."""


PartOf = Callable[[Operands, Selection], tuple[Part, Tensor]]


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


def attend(
    operands: Operands, selection: Selection, part_of: PartOf | None = None
) -> tuple[Tensor, Tensor]:
    """Attend to the selected keys alone, with the mask and bias of the original call.

    Returns the output [B, Hq, Tq, Dv] in the query's dtype and the log-sum-exp of the scores that
    are read, float32 [B, Hq, Tq]. In the output a token counts as often as the selection says; in
    the log-sum-exp each counts once, so that it is less than that of all keys. A query that may see
    nothing gets zeros, as PyTorch's own attention gives. Computed in float32, or in float64 for
    float64 queries. `part_of` is a function that does what `attend_part` does; None: that itself.
    """
    part, log_read = (part_of or attend_part)(operands, selection)
    output = part.mean
    if operands.extra is not None:
        extra = operands.extra.to(output.dtype)
        output = _beside_extra(output, part.log_sum, extra, operands.extra_value)
        log_read = torch.logaddexp(log_read, extra)
    return output.to(operands.query.dtype), log_read.float()


def attend_part(operands: Operands, selection: Selection) -> tuple[Part, Tensor]:
    """Attend to the selected keys alone, as a part of an attention to more keys.

    Returns the part, in which a token counts as often as the selection says, and the log-sum-exp
    [B, Hq, Tq] in which each counts once. The extra logit of `operands` takes no part.
    """
    slot, padding = slots_read(selection)
    work = torch.promote_types(operands.query.dtype, torch.float32)
    score = scores_at(operands.score_inputs, selection.visible, slot, padding, work)
    log_read = log_counted = score.logsumexp(-1)
    if selection.log_weight is not None:
        score = score + selection.token_log_weight()[..., None, :].to(work)
        log_counted = score.logsumexp(-1)
    nothing = (log_counted == -torch.inf)[..., None]
    output = (score.softmax(-1) @ rows_at(operands.value, slot).to(work)).masked_fill(nothing, 0)
    output, log_read, log_counted = map(by_query_head, (output, log_read, log_counted))
    return Part(output, log_counted), log_read


def by_query_head(values: Tensor) -> Tensor:
    """Return values [B, Hkv, Tq, G, ...] as [B, Hq, Tq, ...]."""
    return values.transpose(2, 3).flatten(1, 2)


def _beside_extra(
    output: Tensor, log_sum: Tensor, extra: Tensor, extra_value: Tensor | None
) -> Tensor:
    """Return the output [B, Hq, Tq, Dv] over keys, and over one more of the logit `extra`.

    `log_sum`, [B, Hq, Tq], is the log-sum-exp of the keys. Without a value that key adds nothing.
    """
    log_total = torch.logaddexp(log_sum, extra)
    # -inf - -inf: nothing is seen
    of_keys, of_extra = ((each - log_total).exp().nan_to_num(0) for each in (log_sum, extra))
    output = output * of_keys[..., None]
    return output if extra_value is None else output + of_extra[..., None] * extra_value
