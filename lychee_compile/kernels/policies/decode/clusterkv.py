"""ClusterKV: single tokens clustered by the direction of their keys."""

from __future__ import annotations

from lychee_compile.kernels.levels.declaration import Level, LevelStack
from lychee_compile.kernels.levels.expressions import dot, field, key, mean, query
from lychee_compile.kernels.levels.groups import TokenClusters

CLUSTERKV = LevelStack(
    levels=(
        Level(
            TokenClusters(size=80, window=320),
            fields={"centroid": mean(key)},
            estimate=dot(query, field("centroid")),
        ),
    ),
    recent=1,
    dense_layers=2,
)
"""ClusterKV (arXiv 2412.03213): clusters of tokens by cosine, ranked by their centroid.

Each KV head clusters the tokens behind the first 16 (`sinks`) by k-means, one cluster per 80
tokens. Keys are compared by cosine; the centroid is the mean of the keys. Clusters are ranked by
q.centroid and read whole, best first; the last is cut to the budget, its first tokens kept. New
tokens are always read until there are 320. Then they become 4 clusters of their own; older clusters
never change. The first two layers stay dense.

Not as in the paper: query heads that share a KV head choose together, by the mean of their softmax
shares over clusters (one head ranks as the paper does). Waiting tokens count towards the budget,
and on a GPU some more may wait. k-means starts from tokens spread evenly, so that it is repeatable.
After a rewind the tokens that are left keep their clusters, and these their centroids.
"""
