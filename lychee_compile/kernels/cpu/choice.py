"""The choice of tokens by their sketches, as `LycheeIndex.choose` makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.cpu.library import FEWEST_SLOTS, Ranges, kernels
from lychee_compile.kernels.reference.drawing import log_weight
from lychee_compile.kernels.reference.question import Choice, Question
from lychee_compile.kernels.reference.sketch import BLOCK, KeySketches


def choose(sketches: KeySketches, question: Question, slots: int) -> Choice | None:
    """Return the tokens of most estimated mass among the first `slots`, each a run, in order.

    None if plain PyTorch has to choose: there are few slots, holes, biases or masks of single
    heads, a share of the softmax is to be covered, or a key is not finite.
    """
    if not _is_plain(question) or sketches.any_lost or sketches.block != BLOCK:
        return None
    on_cpu = question.query.device.type == "cpu"
    if slots < FEWEST_SLOTS or not on_cpu or (compiled := kernels()) is None:
        return None
    ranges = Ranges(question.begin.contiguous(), question.end.clamp(max=slots).contiguous())
    first, last = int(ranges.begin.min()), int(ranges.end.max())
    if first >= last:
        return None
    weight, constant = sketches.weights(question.query, question.scale, -(-last // BLOCK))
    raw = compiled.scan(sketches.codes, weight, constant, first, last)
    share = compiled.log_shares(question.capped(raw), ranges)
    if share is None:
        return None
    room = question.room.contiguous()
    if question.salt is None:
        slot, count = compiled.best(share, ranges, room)
        return slot, _is_taken(slot, count).long()
    drawn = compiled.draw(share, ranges, room, question.salt)
    if drawn is None:
        return None
    slot, count, entry, cut = drawn
    taken = _is_taken(slot, count)
    weights = log_weight(cut[..., None] + 1, entry + 1)  # the first bin is a share here
    return slot, taken.long(), weights.masked_fill(~taken, 0)


def _is_plain(question: Question) -> bool:
    """True if each query may choose all slots of a range, as far as they are its own."""
    visible = question.visible
    one_head = visible.mask is None or visible.mask.shape[1] == 1
    whole = one_head and visible.counts is None and visible.bias is None
    return whole and question.may_miss is None


def _is_taken(slot: Tensor, count: Tensor) -> Tensor:
    """Return which entries of `slot` [B, Hkv, Tq, M] are among the first `count`."""
    return torch.arange(slot.shape[-1], device=slot.device) < count[..., None]
