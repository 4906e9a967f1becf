"""Exact scores of single keys, gathered from a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.reference.visible import Visible


def scores_at(
    inputs: ScoreInputs, visible: Visible, slot: Tensor, padding: Tensor, work: torch.dtype
) -> Tensor:
    """Return the scores of the slots [B, Hkv, Tq, S] in the dtype `work`: [B, Hkv, Tq, G, S].

    Padding and keys that the mask hides score -inf.
    """
    query, key, mask = inputs.query, inputs.key, inputs.mask
    assert key is not None
    query_heads, heads = query.shape[1], key.shape[1]
    grouped = query.unflatten(1, (heads, -1)).transpose(2, 3).to(work)
    raw = grouped @ rows_at(key, slot).to(work).transpose(-1, -2)
    score = capped(raw * inputs.scale, inputs.softcap)
    hidden = padding[..., None, :]
    if mask is not None:
        if mask.dtype != torch.bool:
            score = score + _mask_at(mask, slot, query_heads).to(work)
        seen = visible.mask if mask.dtype != torch.bool else mask
        if seen is not None:
            hidden = hidden | ~_mask_at(seen, slot, query_heads)
    return score.masked_fill(hidden, -torch.inf)


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
