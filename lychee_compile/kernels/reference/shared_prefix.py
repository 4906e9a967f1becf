"""Attention of all rows of a batch to keys that they share, read once for all of them.

    keys = cat((prefix.expand(B, ...), own), 2)

Rows become query positions of one row: the scores of all of them are one matrix product with the
prefix. Their attention to the prefix is then joined with that to their own keys, by log-sum-exp.
The result is that of attention to all keys at once, but for rounding (Juravsky et al., Hydragen,
2024; Zheng et al., BatchLLM, 2024).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lychee_compile.kernels.reference.attention import Part
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.visible import with_four_axes

SCATTERED = 2
"""Number of tokens of a prefix that are read whole in the time of one that a query chooses."""


def as_positions(rows: Tensor) -> Tensor:
    """Return a tensor [B, H, T, ...] with rows as positions, [1, H, B * T, ...]."""
    return rows.transpose(0, 1).flatten(1, 2)[None]


def as_rows(positions: Tensor, batch: int) -> Tensor:
    """Return a tensor [1, H, B * T, ...] with positions as rows again, [B, H, T, ...]."""
    return positions[0].unflatten(1, (batch, -1)).transpose(0, 1)


def over_prefix(operands: Operands) -> Operands:
    """Return the operands of B rows over keys [1, Hkv, n, D] with rows as positions of one row.

    The mask is broadcastable to [B, Hq, T, n], and becomes one of [1, Hq, B * T, n].
    """
    query, mask = operands.query, operands.mask
    if mask is not None:
        mask = with_four_axes(mask).expand(query.shape[0], -1, query.shape[2], -1)
        mask = as_positions(mask)
    return replace(operands, query=as_positions(query), mask=mask)


def attend_to_all(operands: Operands) -> Part:
    """Return attention to all visible keys as a part, in one product for each KV head.

    The extra logit of `operands` takes no part.
    """
    query, key, value = operands.query, operands.key, operands.value
    work = torch.promote_types(query.dtype, torch.float32)
    heads, group = key.shape[1], operands.group
    rows = query.unflatten(1, (heads, group)).flatten(2, 3).to(work)
    score = capped(rows @ key.to(work).mT * operands.scale, operands.softcap)
    score = score.unflatten(2, (group, -1)).flatten(1, 2)
    visible = operands.score_inputs.visible()
    if visible.bias is not None:
        score = score + visible.bias.to(work)
    if visible.mask is not None:
        score = score.masked_fill(~visible.mask, -torch.inf)
    log_sum = score.logsumexp(-1)
    nothing = (log_sum == -torch.inf)[..., None]
    weight = score.softmax(-1).masked_fill(nothing, 0).unflatten(1, (heads, group)).flatten(2, 3)
    mean = (weight @ value.to(work)).unflatten(2, (group, -1)).flatten(1, 2)
    return Part(mean, log_sum)


def joined(first: Part, second: Part) -> Part:
    """Return attention to the keys of both parts together."""
    log_sum = torch.logaddexp(first.log_sum, second.log_sum)
    # -inf - -inf: no key of either is seen
    shares = ((each.log_sum - log_sum).exp().nan_to_num(0)[..., None] for each in (first, second))
    mean = sum(share * each.mean for share, each in zip(shares, (first, second), strict=True))
    assert isinstance(mean, Tensor)
    return Part(mean, log_sum)


def reads_whole(queries: int, tokens: int, budget: int | None) -> bool:
    """True if a prefix of `tokens` tokens is better read whole by so many queries of each head.

    A product reads each token once, for all queries. Choices of tokens take longer to make and to
    read: on one H200, 16 queries with a budget of 1,024 took 1.4 times as long as all 32k tokens.
    """
    return budget is None or SCATTERED * queries * budget >= tokens
