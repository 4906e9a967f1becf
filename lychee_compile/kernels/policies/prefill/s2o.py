"""S2O (arXiv 2602.22575) for whole sequences: keys in order of importance, read until it wanes."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.sizes import QUERY_TILE

BLOCK = 64
"""Keys read at a time."""
LEAST_SHARE = 1e-4
"""Reading stops where the next block would add less than this share of the softmax sum so far."""


def choose_until_it_wanes(question: PrefillQuestion) -> Tensor:
    """The most important keys of a tile, at most the budget, fewer where the rest adds little.

    As in the paper: single keys are put in order of importance, wherever they stand, and read in
    blocks of that order, which ends early where a block's score falls below a threshold.

    Not as in the paper: importance is the score of the mean of a tile's queries, and the softmax
    sum is that of the same mean, so that what is read is known before anything is; the paper's
    kernel stops while it runs, by the scores of the queries themselves, which a mean can belie.
    Where there is room for all keys, all are read.
    """
    importance = question.scores(question.parts(QUERY_TILE).mean)[:, :, :, 0]
    enough = keys_before_waning(question, importance)
    all_fit = question.room >= question.candidates.sum(-1)
    room = torch.where(all_fit, question.room, torch.minimum(question.room, enough))
    return replace(question, room=room).take(importance)


def keys_before_waning(question: PrefillQuestion, importance: Tensor) -> Tensor:
    """How many keys, in whole blocks, add enough: int64 [B, Hq, tiles].

    `importance`, [B, Hq, tiles, L], is the score of each key.
    """
    always = importance.masked_fill(~question.sight.always, -torch.inf).logsumexp(-1, keepdim=True)
    ranked = importance.masked_fill(~question.candidates, -torch.inf).sort(-1, descending=True)
    missing = (-importance.shape[-1]) % BLOCK
    filled = F.pad(ranked.values, (0, missing), value=-torch.inf)
    blocks = filled.unflatten(-1, (-1, BLOCK)).logsumexp(-1)
    so_far = torch.cat((always, blocks), -1).logcumsumexp(-1)[..., :-1]
    adds = blocks >= so_far + math.log(LEAST_SHARE)
    return adds.long().cumprod(-1).sum(-1) * BLOCK
