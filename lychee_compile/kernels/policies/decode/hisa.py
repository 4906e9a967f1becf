"""HISA: blocks first, by their mean key, then the best tokens of the best blocks."""

from __future__ import annotations

from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack, Pages, Tokens
from lychee_compile.kernels.levels.expressions import dot, field, key, mean, query

BLOCK = 128
"""Number of tokens of a block, as in the paper."""
CANDIDATES = 8192
"""Least number of tokens that are scored one by one, as in the paper: 64 blocks."""
CANDIDATES_PER_TOKEN = 4
"""Least number of tokens scored for each that is read: the paper scores 8192 to read 2048."""

HISA = LevelStack(
    levels=(
        Level(
            Pages(BLOCK),
            fields={"mean": mean(key)},
            estimate=dot(query, field("mean")),
            keep=Keep(CANDIDATES_PER_TOKEN, CANDIDATES),
            keeps_first=True,
        ),
        Level(Tokens(), estimate=dot(query, key)),
    ),
    sinks=0,
    recent=1,
)
"""HISA (arXiv 2603.28458): exact top tokens within the blocks whose mean key scores best.

A block of 128 neighbouring tokens is summarised by the mean of its keys and ranked by the score of
that mean. The first and the last block that a query sees are always candidates, then the best ones,
64 in all. Within them every key is read, and the tokens of largest score are taken, in any number
per block. Nothing but the query's own token is always read. A block is summarised when it is full;
the block being written is the last one and needs no summary.

Not as in the paper: it speeds up the indexer of DeepSeek's sparse attention, which has keys of its
own and sums weighted ReLU of their scores over its heads. Other models have no indexer, so the
attention's own scores rank blocks and tokens, for each KV head apart, by the mean of the softmax
shares over its query heads. A block counts for the tokens that it shows, and a bias with its
largest value in a block. The last block is a candidate because it has no summary yet: one that has
just become full is ranked like others.
"""
