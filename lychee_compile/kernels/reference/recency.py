"""The newest tokens of a cache that wraps: they do not lie in its last slots.

Recency counts back from the slot written last. The recent tokens of a query are the last `recent`
slots up to that one. If there are fewer above the sinks, the others are the last of all slots, as
the order of a ring buffer has it. In a cache that does not wrap, the slot written last is the last
one that a query sees.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.visible import Visible

Span = tuple[Tensor, Tensor]
"""Slots [begin, end) of each query position, each int64 [B, Tq]; none if they are equal."""


def newest_of(newest: Tensor | None, visible: Visible) -> Tensor:
    """Return the newest slot that each query position sees, int64 [B, Tq].

    `newest`, int64 [B, T], are the slots written last, in order; None: nothing wraps.
    """
    last = visible.end - 1
    if newest is None:
        return last
    own = newest if newest.shape[1] == last.shape[1] else newest[:, -1:]
    return torch.minimum(own, last)


def recent_spans(
    newest: Tensor, visible: Visible, recent: int, sinks_end: Tensor, tail: Tensor
) -> tuple[Span, Tensor]:
    """Return the newest slots as a span, and the slot from which all later ones are read too.

    All are int64 [B, Tq]. Slots from `tail` on are always read. The span is empty if nothing but
    the sinks lies between it and the last slots, or if the newest slot is the last one.
    """
    stop = torch.maximum(newest + 1, sinks_end)
    begin = torch.maximum(torch.minimum(stop - recent, tail), sinks_end)
    left = recent - (stop - begin)
    last = torch.minimum(visible.end - left.clamp(min=0), tail)
    joined = last <= stop
    last = torch.where(joined, begin, last)
    return (begin, torch.where(joined, begin, stop)), last


def hide(visible: Visible, span: Span) -> Visible:
    """Return what each position sees but for the slots of `span`."""
    slot = torch.arange(visible.kv_len, device=span[0].device)
    other = ((slot < span[0][..., None]) | (slot >= span[1][..., None]))[:, None]
    mask = other if visible.mask is None else visible.mask & other
    counts = F.pad(mask.any(1).long().cumsum(-1), (1, 0))
    return replace(visible, mask=mask, counts=counts)


def around(start: Tensor, length: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Return runs of slots [B, Hkv, Tq, R] without those of `span`, and `span` as another run."""
    begin, stop = (each[:, None, :, None] for each in span)
    end = start + length
    before = torch.minimum(end, begin) - start
    behind = torch.maximum(start, stop)
    shape = (*start.shape[:3], 1)
    own, size = begin.expand(shape), (stop - begin).expand(shape)
    starts = torch.cat((start, behind, own), -1)
    return starts, torch.cat((before.clamp(min=0), (end - behind).clamp(min=0), size), -1)
