"""The specification of the kernels: what they select from the sketches, in plain PyTorch.

Each token's score is estimated by its sketch. Its rank is its share of the softmax, summed over the
query heads of a group. The denominator of the softmax is estimated block by block, by second-order
cumulants: it only weighs the heads of a group against each other. Sinks and recent tokens are
always read, and the best of the others. A context of up to `flat_tokens` tokens is scanned token by
token, however many slots its cache has. In a longer one pages are ranked first, by the log of the
mean of exp(score) over their keys, and only the tokens of the best pages are looked at. Shares
count by eighths of a factor of two. Any of the tokens in the eighth that the budget ends in may be
chosen; of pages, all of that eighth are. A choice that covers a share of the softmax ends earlier,
with all tokens of an eighth, once `missed_share` is small enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.codegen.parts.lychee import SMALLEST
from lychee_compile.kernels.gpu.lychee.layout import (
    PAGE_MIDDLE,
    PAGE_STEP,
    Field,
    SketchState,
    block_size,
    planes,
)
from lychee_compile.kernels.reference.sketch_axes import STEPS, sketch_bits
from lychee_compile.kernels.sizes import PAGE

Finish = Callable[[Tensor], Tensor]
"""A function from raw scores [B, Hkv, G, T, N] to those of the softmax: scale, soft-cap, biases."""


@dataclass(frozen=True)
class SelectionSizes:
    """Numbers of tokens to select."""

    budget: int
    sinks: int
    recent: int
    pages: int | None = None
    """About how many pages are looked into; None: all of them."""
    flat_pages: int = 0
    """All pages are looked into if a query position sees no more of them than this."""


def token_scores(query: Tensor, state: SketchState) -> Tensor:
    """Return estimates of q.k by sketches, [B, Hkv, G, T, slots], for `query` [B, Hkv, G, T, D]."""
    fine, coarse = planes(query.shape[-1])
    codes = torch.cat((unpacked(state.fine, fine), unpacked(state.coarse, coarse)), -1)
    weight, constant = _weights(query, state)
    size = _block(state)
    return (
        _blockwise(_rounded(weight), codes, size)
        + constant.repeat_interleave(size, -1)[..., : codes.shape[2]]
    )


def page_scores(query: Tensor, state: SketchState, scale: float) -> Tensor:
    """Return the raw score s + scale / 2 sum w^2 v of each page, [B, Hkv, G, T, pages].

    s is that of the page's mean, w are the weights of its coordinates, v their variances.
    """
    fine, _ = planes(query.shape[-1])
    kept = state.spread.shape[-1]
    means = unpacked(state.pages, fine, centred=False)
    weight, constant = _weights(query, state)
    rounded, weight = _rounded(weight)[..., :kept], weight[..., :kept]
    variance = (weight.square() * state.spread[:, :, None, None]).sum(-1)
    constant = constant + scale / 2 * variance
    size = _block(state) // PAGE
    score = _blockwise(rounded, means * PAGE_STEP - PAGE_MIDDLE, size)
    return score + constant.repeat_interleave(size, -1)[..., : means.shape[2]]


def select_slots(
    query: Tensor,
    state: SketchState,
    visible: Tensor,
    fresh: Tensor,
    finish: Finish,
    scale: float,
    sizes: SelectionSizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slots always read, log2 shares of the others, and how many of these to choose.

    `query` is [B, Hkv, G, T, D], `visible` bool [B, Hkv, G, T, L]; `fresh`, int64
    [B, 1 or Hkv, T], is the first slot that is new to each query. The results are bool
    [B, Hkv, T, L], float32 [B, Hkv, T, L] (-inf: may not be chosen) and int64 [B, Hkv, T].
    """
    kv_len = visible.shape[-1]
    anywhere = visible.any(2)
    slot = torch.arange(kv_len, device=query.device)
    first = torch.where(anywhere, slot, kv_len).amin(-1, keepdim=True)
    end = torch.where(anywhere, slot + 1, 0).amax(-1, keepdim=True)
    begin = torch.minimum(first + sizes.sinks, end)
    stop = torch.maximum(torch.minimum(end - sizes.recent, fresh[..., None]), begin)
    always = ((slot >= first) & (slot < begin)) | ((slot >= stop) & (slot < end))
    known = visible & (slot < fresh[:, :, None, :, None])
    total = log_denominator(query, state, fresh, finish, scale)
    possible = known.any(2) & (slot >= begin) & (slot < stop)
    if sizes.pages is not None:
        mass = finish(page_scores(query, state, scale))
        known_pages = F.pad(known, (0, mass.shape[-1] * PAGE - kv_len)).unflatten(-1, (-1, PAGE))
        share = (mass - total).logsumexp(2).masked_fill(~known_pages.any(-1).any(2), -torch.inf)
        possible = possible & _best_pages(share, sizes.pages, sizes.flat_pages)[..., :kv_len]
    score = finish(token_scores(query, state)[..., :kv_len]).masked_fill(~known, -torch.inf)
    rank = ((score - total).logsumexp(2) / math.log(2)).masked_fill(~possible, -torch.inf)
    return always, rank, (sizes.budget - (begin - first) - (end - stop)).clamp(min=0)[..., 0]


def missed_share(
    share: Tensor, by_head: Tensor, log_always: Tensor, total: Tensor, left_out: Tensor
) -> Tensor:
    """Return the share of the softmax in what is left out, as budgets by mass count: [B, Hkv, T].

    `share` are log2 shares as `select_slots` returns them, [B, Hkv, T, L]; `left_out`, bool of that
    shape, are slots that are not read. `by_head` [B, Hkv, G, T] are proportional to the mass of the
    tokens to choose from. `log_always` [B, Hkv, G, T] is the log of the sum of exp(score) over what
    is always read, by true scores, and `total` that of the estimated denominators,
    [B, Hkv, G, T, 1]. What is left out is taken to be as much for all heads, each with a softmax of
    its own: the mean over heads is returned.
    """
    mass = share.exp2()
    of_head = by_head / by_head.sum(2, keepdim=True).clamp(min=1e-30) * mass.sum(-1)[:, :, None]
    seen = of_head + (log_always - total[..., 0]).exp()
    weight = torch.where(seen > 0, 1 / seen.clamp(min=1e-30), 0).mean(2)
    return (mass * left_out).sum(-1) / share.new_tensor(by_head.shape[2]) * weight


def _best_pages(share: Tensor, pages: int, flat_pages: int) -> Tensor:
    """Return the slots of the `pages` pages of most log share [..., N], or somewhat more: bool.

    They are those of all pages if at most `flat_pages` have a share.
    """
    bins = share_bins(share.exp())
    first_left = bins.topk(min(pages + 1, bins.shape[-1]), -1).values[..., -1:]
    few = (bins > 0).sum(-1, keepdim=True) <= max(pages, flat_pages)
    chosen = bins >= torch.where(few, 1, first_left)
    return chosen.repeat_interleave(PAGE, -1)


def share_bins(share: Tensor) -> Tensor:
    """Return the bins of shares, eight to a factor of two.

    A bin is the exponent of a float32 and the first three bits of its mantissa.
    """
    return share.float().view(torch.int32) >> 20


def log_denominator(
    query: Tensor, state: SketchState, fresh: Tensor, finish: Finish, scale: float
) -> Tensor:
    """Return the estimated log of the sum of exp(score) over the keys before `fresh`.

    It is [B, Hkv, G, T, 1], and `fresh` int64 [B, 1 or Hkv, T]. `finish` gets one product for each
    of the S blocks, [B, Hkv, G, T, S]. If scores depend on a key's slot, `finish` must average them
    over the slots of the block.
    """
    weight, constant = _weights(query, state)
    bits = torch.tensor(sketch_bits(query.shape[-1]), device=query.device)
    deviation = torch.where(bits == 4, 1 / STEPS[4], 1 / STEPS[2])
    mean = finish(constant + scale / 2 * (weight * deviation).square().sum(-1))
    size = _block(state)
    block = torch.arange(constant.shape[-1], device=query.device) * size
    count = (fresh[..., None] - block).clamp(max=size)[:, :, None]
    mass = mean + count.clamp(min=1).log()
    return mass.masked_fill(count <= 0, -torch.inf).logsumexp(-1, keepdim=True)


def _block(state: SketchState) -> int:
    return block_size(state.fine.shape[2])


def _weights(query: Tensor, state: SketchState) -> tuple[Tensor, Tensor]:
    """Return q.a step, [B, Hkv, G, T, S, r], and q.centre, [B, Hkv, G, T, S], for each block."""
    query = query.float()[..., None, :]
    axes = state.axes.float()[:, :, None, None]
    weight = (axes @ query[..., None])[..., 0] * state.step[:, :, None, None]
    return weight, (query * state.centre[:, :, None, None]).sum(-1)


def _rounded(weight: Tensor) -> Tensor:
    """Return weights [..., r], each a whole number of 127ths of the greatest of its head.

    Codes and such weights are small integers, whose products are exact.
    """
    most = weight.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return (weight * (127 / most) + 0.5).floor() * (most / 127)


def unpacked(packed: Tensor, fields: Sequence[Field], centred: bool = True) -> Tensor:
    """Return coordinates in steps, float32 [B, Hkv, N, r], or bare codes unless `centred`."""
    return torch.cat(
        [
            ((packed[..., : field.width] >> field.shift) & (2**field.bits - 1)).float()
            - (field.offset if centred else 0)
            for field in fields
        ],
        -1,
    )


def _blockwise(weight: Tensor, codes: Tensor, size: int) -> Tensor:
    """Return the products of weights [B, Hkv, G, T, S, r] and codes [B, Hkv, N, r].

    They are [B, Hkv, G, T, N]; `size` keys in order have the weights of one block.
    """
    parts = [
        torch.einsum("bhgtr,bhnr->bhgtn", weight[..., number, :], part)
        for number, part in enumerate(codes.split(size, 2))
    ]
    return torch.cat(parts, -1)
