"""LycheeCluster to the letter: whole chunks, found by way of clusters and coarse units."""

from __future__ import annotations

from sympy import sqrt

from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack
from lychee_compile.kernels.levels.expressions import dot, field, greatest, key, mean, norm, query
from lychee_compile.kernels.levels.groups import Chunks, Clusters

UNITS_PER_TOKEN, CLUSTERS_PER_TOKEN = 16, 4
"""Tokens in the units and in the clusters that are looked into, for each token that is read."""


def _ball(groups: Chunks | Clusters, of: str, keep: Keep | None = None) -> Level:
    """Return a level whose groups are ranked by the bound of the ball around their keys."""
    centre, radius = field(f"{of}_mean"), field(f"{of}_radius")
    bound = dot(query, centre) + norm(query) * radius
    around = sqrt(greatest(dot(key - centre, key - centre)))
    fields = {centre.name: mean(key), radius.name: around}
    return Level(groups, fields=fields, estimate=bound, bound=bound, keep=keep)


LYCHEECLUSTER = LevelStack(
    levels=(
        _ball(Clusters(limited=True), "unit", Keep(UNITS_PER_TOKEN)),
        _ball(Clusters(), "cluster", Keep(CLUSTERS_PER_TOKEN)),
        _ball(Chunks(), "chunk"),
    ),
)
"""LycheeCluster (arXiv 2603.08453): chunks below fine clusters below at most 64 coarse units.

Every group is a ball around the keys in it: a centre, their mean, and a radius. By the triangle
inequality no key scores above q.c + |q| r, and groups are ranked by this bound at all three levels.
Only the clusters of the best units are looked into, and only the chunks of the best clusters. The
best chunks are read whole. A chunk that decoding completes is grafted onto the nearest cluster.

Not as in the paper: chunks end where neighbouring keys differ or, on a CPU, at boundaries that
token ids tell. Query heads that share a KV head choose together, by the mean of their softmax
shares over groups, where one key of a group stands for all. The paper keeps a number of units and
clusters; here they are kept until they hold 16 and 4 times the tokens of the budget. The last chunk
is cut to the budget. Chunks are grafted some at a time, every 256 tokens or more, and are looked
into whatever the clusters say until then; all are clustered anew when they are twice as many.
"""
