"""LycheeCluster for whole sequences: centres of queries, pruned by a bound on both sides."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.reference.nodes import log_count
from lychee_compile.kernels.reference.prefill_question import PrefillQuestion
from lychee_compile.kernels.reference.tiles import pair_bound
from lychee_compile.kernels.sizes import PAGE, QUERY_TILE

CENTRES_PER_TILE = 8
"""Parts of a tile, each of which asks with the mean of its queries."""
SAMPLE = 16
"""One key in so many stands for all of them in the denominator of a part's softmax."""
NEGLIGIBLE_SHARE = 1e-4
"""Pages proved to hold together less than this share of the softmax are never looked into."""


def choose_by_centres(question: PrefillQuestion) -> Tensor:
    """The keys that matter most to any part of a tile.

    A part asks with the mean c of its queries; a key counts by its largest log share of the softmax
    of a part, s c.k less the log of the denominator, which every sixteenth key is enough for: it
    only weighs the parts against each other. Pages that provably hold next to nothing are left out.

    Single keys and not nodes of them, for one head and not those that share its keys: with a fifth
    of 32k keys the output is off by 0.055 so, by 0.090 with pages of sixteen, and by 0.068 where a
    tile is 32 positions of four heads (benchmarks/prefill/tile_choices.py).
    """
    return question.take(log_shares(question).masked_fill(_negligible(question), -torch.inf))


def log_shares(question: PrefillQuestion) -> Tensor:
    """The largest log share that any part of a tile gives each key: [B, Hq, tiles, L]."""
    parts = question.parts(QUERY_TILE // CENTRES_PER_TILE)
    scores = question.scores(parts.mean)
    total = scores[..., ::SAMPLE].logsumexp(-1, keepdim=True) + math.log(SAMPLE)
    shares = scores - total.masked_fill(total == -torch.inf, 0)
    unused = (parts.tokens == 0).unflatten(2, (question.tiles, CENTRES_PER_TILE))
    return shares.masked_fill(unused[..., None], -torch.inf).amax(3)


def _negligible(question: PrefillQuestion) -> Tensor:
    """Keys in pages that hold next to nothing of any query's softmax: bool [B, Hq, tiles, L].

    The most that a page may add is bounded by the triangle inequality on both sides. What all add
    at least is, by Jensen's inequality, n exp(s q.m) for a page of n keys with the mean m; the
    least s q.m of the queries of a part comes from the same bound.
    """
    if question.sight.bias is not None or question.softcap is not None:
        return torch.zeros_like(question.candidates)
    parts, pages, scale = (
        question.parts(QUERY_TILE // CENTRES_PER_TILE),
        question.key_nodes(PAGE),
        question.scale,
    )
    held = log_count(pages.tokens)[:, :, None]
    most = pair_bound(parts, pages, scale) + held
    means = replace(pages, radius=torch.zeros_like(pages.radius))
    least = (held - pair_bound(parts, means, -scale)).unflatten(2, (question.tiles, -1))
    missing = (-question.candidates.shape[-1]) % PAGE
    whole = F.pad(question.candidates, (0, missing)).unflatten(-1, (-1, PAGE)).all(-1)
    floor = least.masked_fill(~whole[:, :, :, None], -torch.inf).logsumexp(-1, keepdim=True)
    threshold = floor + math.log(NEGLIGIBLE_SHARE / pages.count)
    used = (parts.tokens > 0).unflatten(2, (question.tiles, -1))[..., None]
    small = (most.unflatten(2, (question.tiles, -1)) < threshold) | ~used
    return question.spread(small.all(3), PAGE)
