"""S2O (arXiv 2602.22575) for prefill: keys in order of importance, until the rest adds little."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.sizes import QUERY_TILE

BLOCK = 64
"""Number of keys read at a time."""
LEAST_SHARE = 1e-4
"""Least share of the softmax sum so far that the next block must add to be read."""


def choose_until_it_wanes(question: PrefillQuestion) -> Tensor:
    """Return the most important keys of a tile: the budget, or fewer if the rest adds little.

    As in the paper: single keys are put in order of importance, wherever they stand, and read in
    blocks of that order. Reading ends early at a block whose score falls below a threshold.

    Not as in the paper: importance is the score of the mean of a tile's queries, and the softmax
    sum is that of the same mean, so that all choices are made before any key is read. The paper's
    kernel stops while it runs, by the scores of the queries themselves, from which those of a mean
    can differ. If there is room for all keys, all are read.
    """
    importance = question.scores(question.parts(QUERY_TILE).mean)[:, :, :, 0]
    enough = keys_before_waning(question, importance)
    all_fit = question.room >= question.candidates.sum(-1)
    room = torch.where(all_fit, question.room, torch.minimum(question.room, enough))
    return replace(question, room=room).take(importance)


def keys_before_waning(question: PrefillQuestion, importance: Tensor) -> Tensor:
    """Return how many keys, in whole blocks, add enough: int64 [B, Hq, tiles].

    `importance`, [B, Hq, tiles, L], is the score of each key. Blocks beyond the largest room are
    not looked at.
    """
    always = importance.masked_fill(~question.sight.always, -torch.inf).logsumexp(-1, keepdim=True)
    most = min(max(int(question.room.max()), 1), importance.shape[-1])  # no further key has room
    most = -(-most // BLOCK) * BLOCK
    ranked = importance.masked_fill(~question.candidates, -torch.inf)
    best = ranked.topk(min(most, ranked.shape[-1]), dim=-1).values
    filled = F.pad(best, (0, most - best.shape[-1]), value=-torch.inf)
    blocks = filled.unflatten(-1, (-1, BLOCK)).logsumexp(-1)
    so_far = torch.cat((always, blocks), -1).logcumsumexp(-1)[..., :-1]
    adds = blocks >= so_far + math.log(LEAST_SHARE)
    return adds.long().cumprod(-1).sum(-1) * BLOCK
