"""LycheeCluster for prefill: centres of queries, pruned by a bound on both sides."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.drawing import Drawn
from lychee_compile.kernels.reference.nodes import log_count
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.tiles import pair_bound
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

CENTRES_PER_TILE = 8
"""Number of parts of a tile; the mean of a part's queries, its centre, stands for all of them."""
SAMPLE = 16
"""Number of keys of which one stands for all in the denominator of a part's softmax."""
NEGLIGIBLE_SHARE = 1e-4
"""Share of the softmax: pages proved to hold less than it together are never looked into."""


def choose_by_centres(question: PrefillQuestion) -> Drawn:
    """Return the keys that matter most to any part of a tile, and some of the others by chance.

    The mean c of a part's queries stands for them. A key counts by its largest log share of the
    softmax of a part over the candidates: s c.k less the log of the denominator. Every sixteenth
    key is enough for the denominator. What is always read is not in it: a mean query gives the
    first tokens far more than the queries do. Pages that provably hold next to nothing come last.

    Keys are drawn (`reference/drawing.py`): those of large shares are read, and of those of small
    shares a sample, whose keys count for the rest. With a fifth of 32k keys the output is off by
    0.036 then, and not by 0.055.

    Single keys are ranked and not nodes of them, for one head and not for those that share its
    keys. With the best fifth of 32k keys the output is then off by 0.055. It is off by 0.090 with
    pages of sixteen, and by 0.068 if a tile is 32 positions of four heads
    (benchmarks/prefill/tile_choices.py).
    """
    return question.draw(log_shares(question).masked_fill(_negligible(question), -torch.inf))


def log_shares(question: PrefillQuestion) -> Tensor:
    """Return the largest log share that any part of a tile gives each key: [B, Hq, tiles, L].

    A share is that of the part's softmax over the candidates.
    """
    parts = question.parts(QUERY_TILE // CENTRES_PER_TILE)
    scores = question.scores(parts.mean)
    apart = ~question.candidates[:, :, :, None, ::SAMPLE]
    sampled = scores[..., ::SAMPLE].masked_fill(apart, -torch.inf)
    total = sampled.logsumexp(-1, keepdim=True) + math.log(SAMPLE)
    shares = scores - total.masked_fill(total == -torch.inf, 0)
    unused = (parts.tokens == 0).unflatten(2, (question.tiles, CENTRES_PER_TILE))
    return shares.masked_fill(unused[..., None], -torch.inf).amax(3)


def _negligible(question: PrefillQuestion) -> Tensor:
    """Return the keys in pages that hold next to nothing of any query's softmax: bool.

    The triangle inequality on both sides bounds the most that a page may add. By Jensen's
    inequality a page of n keys with the mean m adds n exp(s q.m) at least; the least s q.m of the
    queries of a part comes from the same bound. The result is [B, Hq, tiles, L].
    """
    if question.sight.bias is not None or question.softcap is not None:
        return torch.zeros_like(question.candidates)
    parts, pages, scale = (
        question.parts(QUERY_TILE // CENTRES_PER_TILE),
        question.key_nodes(PAGE),
        question.scale,
    )
    log_tokens = log_count(pages.tokens)[:, :, None]
    most = pair_bound(parts, pages, scale) + log_tokens
    means = replace(pages, radius=torch.zeros_like(pages.radius))
    least = (log_tokens - pair_bound(parts, means, -scale)).unflatten(2, (question.tiles, -1))
    missing = (-question.candidates.shape[-1]) % PAGE
    whole = F.pad(question.candidates, (0, missing)).unflatten(-1, (-1, PAGE)).all(-1)
    floor = least.masked_fill(~whole[:, :, :, None], -torch.inf).logsumexp(-1, keepdim=True)
    threshold = floor + math.log(NEGLIGIBLE_SHARE / pages.tokens.shape[2])
    used = (parts.tokens > 0).unflatten(2, (question.tiles, -1))[..., None]
    small = (most.unflatten(2, (question.tiles, -1)) < threshold) | ~used
    return question.spread(small.all(3), PAGE)
