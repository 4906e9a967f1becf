"""DHSA for decoding: chunks of varying length, ranked by the sum of their keys."""

from __future__ import annotations

from sympy import sqrt

from lychee_compile.kernels.levels.declaration import Level, LevelStack
from lychee_compile.kernels.levels.expressions import count, dot, field, key, mean, query
from lychee_compile.kernels.levels.groups import Chunks

DHSA = LevelStack(
    levels=(
        Level(
            Chunks(),
            fields={"vector": mean(key) * sqrt(count)},
            estimate=dot(query, field("vector")),
        ),
    ),
    sinks=0,
    recent=1,
)
"""DHSA (arXiv 2510.24606): the tokens of the chunks that are most like the query.

Chunks are summarised by the sum of their keys over the square root of their number, so that long
chunks neither win nor lose by their length. The similarity of a chunk stands for that of its
tokens, and the tokens of largest similarity are read, up to the budget: the best chunks, of which
the last is cut. While decoding, the query is a chunk of its own. The last tokens, in no chunk yet,
are always read.

Not as in the paper: its boundaries come from a predictor trained for each model; here they are
where neighbouring keys differ most, between 8 and 16 tokens apart (`chunk`). Query heads that share
a KV head choose together, by the mean of their softmax shares over chunks.
"""
