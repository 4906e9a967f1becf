"""LongHeads: chunks of 256 tokens, ranked by a key that stands for those that matter in it."""

from __future__ import annotations

from sympy import exp, sqrt

from lychee_compile.kernels.levels.declaration import Level, LevelStack, Pages
from lychee_compile.kernels.levels.expressions import (
    dot,
    field,
    greatest,
    head_dim,
    key,
    mean,
    query,
    weighted_mean,
)

CHUNK = 256
"""Number of tokens of a chunk, as in the paper."""

_MATCH = dot(key, mean(key))
REPRESENTATIVE = weighted_mean(key, exp((_MATCH - greatest(_MATCH)) / sqrt(head_dim)))
"""Attention of the mean key of a chunk to its keys, with the keys as values."""

LONGHEADS = LevelStack(
    levels=(
        Level(
            Pages(CHUNK),
            fields={"representative": REPRESENTATIVE},
            estimate=dot(query, field("representative")),
        ),
    ),
    sinks=CHUNK,
    recent=1,
)
"""LongHeads (arXiv 2402.10685): the chunks whose representative key has the largest score.

A chunk of 256 neighbouring tokens is summarised by one key, its representative: the mean of its
keys, weighted by the attention that a query of the chunk pays to them. Chunks are read whole, best
first. The first chunk and the one that decoding is writing are always read. A budget that has no
room for a third chunk is refused; the usual budget of 1,024 has room for four.

Not as in the paper: positions stay as they are, so that the context of a model grows no longer than
it was trained for. The query of a chunk is the mean of its keys. In the paper it is the mean of
what the attention of the chunk's queries to its keys gives, which a cache of keys does not tell.
Keys are taken as the cache holds them, rotated by their positions in the text; the paper rotates
them by their positions in the chunk. Query heads that share a KV head choose together, by the mean
of their softmax shares over chunks, and a chunk cut by a mask counts for the tokens that it shows.
"""
