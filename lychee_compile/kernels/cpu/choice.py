"""The choice of tokens by their sketches, as `LycheeIndex.choose` makes it."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.cpu.library import FEWEST_SLOTS, kernels
from lychee_compile.kernels.reference.drawing import log_weight
from lychee_compile.kernels.reference.question import Choice, Question
from lychee_compile.kernels.reference.sketch import BLOCK, KeySketches


def choose(sketches: KeySketches, question: Question, slots: int) -> Choice | None:
    """Return the tokens of most estimated mass among the first `slots`, each a run, in order.

    None if plain PyTorch has to choose: there are few slots, holes, biases or masks of single
    heads, a share of the softmax is to be covered, or a key is not finite.
    """
    plain = question.visible.is_range and question.may_miss is None
    if not plain or sketches.any_lost or sketches.block != BLOCK:
        return None
    on_cpu = question.query.device.type == "cpu"
    if slots < FEWEST_SLOTS or not on_cpu or (compiled := kernels()) is None:
        return None
    begin, end = question.begin.contiguous(), question.end.clamp(max=slots).contiguous()
    span, first, last = (begin, end), int(begin.min()), int(end.max())
    if first >= last:
        return None
    weight, constant = sketches.weights(question.query, question.scale, -(-last // BLOCK))
    raw = compiled.scan(sketches.codes, weight, constant, first, last)
    share = compiled.log_shares(question.capped(raw), span)
    if share is None:
        return None
    room = question.room.contiguous()
    if question.salt is None:
        slot, count = compiled.best(share, span, room)
        return slot, _is_taken(slot, count).long()
    drawn = compiled.draw(share, span, room, question.salt)
    if drawn is None:
        return None
    slot, count, entry, cut = drawn
    taken = _is_taken(slot, count)
    weights = log_weight(cut[..., None] + 1, entry + 1)  # the first bin is a share here
    return slot, taken.long(), weights.masked_fill(~taken, 0)


def _is_taken(slot: Tensor, count: Tensor) -> Tensor:
    """Return which entries of `slot` [B, Hkv, Tq, M] are among the first `count`."""
    return torch.arange(slot.shape[-1], device=slot.device) < count[..., None]
