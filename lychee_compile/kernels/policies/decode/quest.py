"""Quest: pages of sixteen tokens, ranked by the box around their keys."""

from __future__ import annotations

from sympy import Max, Min

from lychee_compile.kernels.levels.declaration import Level, LevelStack, Pages
from lychee_compile.kernels.levels.expressions import dot, field, greatest, key, least, query
from lychee_compile.kernels.sizes import PAGE

BEST_CORNER = dot(Max(query, 0), field("greatest")) + dot(Min(query, 0), field("least"))
"""Sum over channels of max(q least, q greatest): the score of the best corner of a box."""

QUEST = LevelStack(
    levels=(
        Level(
            Pages(PAGE),
            fields={"least": least(key), "greatest": greatest(key)},
            estimate=BEST_CORNER,
            bound=BEST_CORNER,
        ),
    ),
    sinks=0,
    recent=1,
    dense_layers=2,
)
"""Quest (arXiv 2406.10774): the pages whose bounding box may hold the largest scores.

A page of 16 neighbouring tokens is summarised by the least and the greatest value of each key
channel. It is ranked by the score of the best corner of that box, and pages are read whole, best
first. Only the page that decoding is writing is always read: neither sinks nor a window are. The
first two layers stay dense.

Not as in the paper: query heads that share a KV head choose together, by the mean of their softmax
shares over pages (the paper has no grouped queries; one head ranks as it does), and a page cut by a
mask counts for the tokens it shows. At least the query's own token is read; it is in a full page if
several positions are computed at once.
"""
