"""What the kernels select from an index addressed by slot, in plain PyTorch: their specification.

Each token's score is estimated by its sketch; its rank is its share of the softmax, summed over the
query heads of a group. What a softmax sums up to is estimated block by block, by second-order
cumulants: it only weighs the heads of a group against each other. The best tokens are read besides
sinks and recent ones. A context of up to `flat_tokens` slots is scanned token by token; in a longer
one pages are ranked first, by the log of the mean of exp(score) over their keys, and only the
tokens of the best are looked at. Shares are told apart by an eighth of a factor of two: of the
tokens that the budget ends in any may be chosen, of the pages all are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.gpu.lychee.layout import (
    PAGE,
    PAGE_MIDDLE,
    PAGE_STEP,
    Field,
    SketchState,
    block_size,
    planes,
)
from lychee_compile.kernels.reference.sketch import STEPS, sketch_bits

Finish = Callable[[Tensor], Tensor]
"""From raw scores [B, Hkv, G, T, N] to those of the softmax: scale, soft-cap, biases."""


def token_scores(query: Tensor, state: SketchState) -> Tensor:
    """Estimates of q.k by sketches, [B, Hkv, G, T, slots], for `query` [B, Hkv, G, T, D]."""
    fine, coarse = planes(query.shape[-1])
    codes = torch.cat((_unpacked(state.fine, fine), _unpacked(state.coarse, coarse)), -1)
    weight, constant = _weights(query, state)
    size = _block(state)
    return (
        _blockwise(weight, codes, size)
        + constant.repeat_interleave(size, -1)[..., : codes.shape[2]]
    )


def page_scores(query: Tensor, state: SketchState, scale: float) -> Tensor:
    """What stands for the keys of a page, [B, Hkv, G, T, pages]: s + scale / 2 sum w^2 v."""
    fine, _ = planes(query.shape[-1])
    kept = state.spread.shape[-1]
    means = _unpacked(state.pages, fine, centred=False)
    weight, constant = _weights(query, state)
    weight = weight[..., :kept]
    variance = (weight.square() * state.spread[:, :, None, None]).sum(-1)
    constant = constant + scale / 2 * variance
    size = _block(state) // PAGE
    score = _blockwise(weight, means * PAGE_STEP - PAGE_MIDDLE, size)
    return score + constant.repeat_interleave(size, -1)[..., : means.shape[2]]


def select_slots(
    query: Tensor,
    state: SketchState,
    visible: Tensor,
    fresh: Tensor,
    finish: Finish,
    scale: float,
    budget: int,
    sinks: int,
    recent: int,
    pages: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots always read, log2 shares of those that may be chosen, and how many of these are.

    `query` is [B, Hkv, G, T, D], `visible` bool [B, Hkv, G, T, L], `fresh` int64 [B] the first slot
    that has no sketch yet. With `pages` only tokens of about so many pages may be chosen. Returns
    bool [B, Hkv, T, L], float32 [B, Hkv, T, L] (-inf: may not be chosen), int64 [B, Hkv, T].
    """
    kv_len = visible.shape[-1]
    anywhere = visible.any(2)
    slot = torch.arange(kv_len, device=query.device)
    first = torch.where(anywhere, slot, kv_len).amin(-1, keepdim=True)
    end = torch.where(anywhere, slot + 1, 0).amax(-1, keepdim=True)
    begin = torch.minimum(first + sinks, end)
    stop = torch.maximum(torch.minimum(end - recent, fresh[:, None, None, None]), begin)
    always = ((slot >= first) & (slot < begin)) | ((slot >= stop) & (slot < end))
    known = visible & (slot < fresh[:, None, None, None, None])
    total = log_denominator(query, state, fresh, finish, scale)
    possible = known.any(2) & (slot >= begin) & (slot < stop)
    if pages is not None:
        mass = finish(page_scores(query, state, scale))
        held = F.pad(known, (0, mass.shape[-1] * PAGE - kv_len)).unflatten(-1, (-1, PAGE)).any(-1)
        share = (mass - total).logsumexp(2).masked_fill(~held.any(2), -torch.inf)
        bins = share_bins(share.exp())
        first_left = bins.topk(min(pages + 1, bins.shape[-1]), -1).values[..., -1:]
        chosen = bins >= (first_left if bins.shape[-1] > pages else 1)
        possible = possible & chosen.repeat_interleave(PAGE, -1)[..., :kv_len]
    score = finish(token_scores(query, state)[..., :kv_len]).masked_fill(~known, -torch.inf)
    rank = ((score - total).logsumexp(2) / math.log(2)).masked_fill(~possible, -torch.inf)
    return always, rank, (budget - (begin - first) - (end - stop)).clamp(min=0)[..., 0]


def share_bins(share: Tensor) -> Tensor:
    """Bins of shares, eight to a factor of two: a float's exponent and first bits of mantissa."""
    return share.float().view(torch.int32) >> 20


def log_denominator(
    query: Tensor, state: SketchState, fresh: Tensor, finish: Finish, scale: float
) -> Tensor:
    """Estimated log of the sum of exp(score) over the keys before `fresh`: [B, Hkv, G, T, 1].

    Here `finish` is given one product for each block, [B, Hkv, G, T, S]. Where scores depend on a
    key's slot, it says what that comes to on average over slots of the block.
    """
    weight, constant = _weights(query, state)
    bits = torch.tensor(sketch_bits(query.shape[-1]), device=query.device)
    deviation = torch.where(bits == 4, 1 / STEPS[4], 1 / STEPS[2])
    mean = finish(constant + scale / 2 * (weight * deviation).square().sum(-1))
    size = _block(state)
    block = torch.arange(constant.shape[-1], device=query.device) * size
    held = (fresh[:, None] - block).clamp(max=size)[:, None, None, None]
    mass = mean + held.clamp(min=1).log()
    return mass.masked_fill(held <= 0, -torch.inf).logsumexp(-1, keepdim=True)


def _block(state: SketchState) -> int:
    return block_size(state.fine.shape[2])


def _weights(query: Tensor, state: SketchState) -> tuple[Tensor, Tensor]:
    """q.a step [B, Hkv, G, T, S, r], and q.centre [B, Hkv, G, T, S], for each block."""
    query = query.float()[..., None, :]
    axes = state.axes.float()[:, :, None, None]
    weight = (axes @ query[..., None])[..., 0] * state.step[:, :, None, None]
    return weight, (query * state.centre[:, :, None, None]).sum(-1)


def _unpacked(packed: Tensor, fields: Sequence[Field], centred: bool = True) -> Tensor:
    """Coordinates in steps, float32 [B, Hkv, N, r], or their bare codes."""
    return torch.cat(
        [
            ((packed[..., : field.width] >> field.shift) & (2**field.bits - 1)).float()
            - (field.offset if centred else 0)
            for field in fields
        ],
        -1,
    )


def _blockwise(weight: Tensor, codes: Tensor, size: int) -> Tensor:
    """Products [B, Hkv, G, T, N] of weights [B, Hkv, G, T, S, r] and codes [B, Hkv, N, r]."""
    parts = [
        torch.einsum("bhgtr,bhnr->bhgtn", weight[..., number, :], part)
        for number, part in enumerate(codes.split(size, 2))
    ]
    return torch.cat(parts, -1)
