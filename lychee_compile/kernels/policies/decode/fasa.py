"""FASA: tokens ranked by the few rotary pairs of channels that tell which of them matter."""

from __future__ import annotations

from lychee_compile.kernels.levels.declaration import DominantPairs, Level, LevelStack, Tokens
from lychee_compile.kernels.levels.expressions import dot, key, query

PAIRS = DominantPairs(one_in=4)
"""A quarter of all pairs, as in the paper: 16 of 64."""

FASA = LevelStack(levels=(Level(Tokens(PAIRS), estimate=dot(query, key)),), sinks=0, recent=1)
"""FASA (arXiv 2602.03152): the tokens of largest score over the dominant rotary pairs of a head.

Rotary positions turn the channels of a head in pairs, each at a frequency of its own. Few pairs of
a head order the tokens much as all do. The score of every token is summed over these pairs alone,
and attention over the tokens of largest score reads all channels. Nothing but the query's own token
is always read. A choice reads a quarter of the channels of the keys.

Not as in the paper: dominant pairs are not found in advance, by how often the best tokens of a pair
alone are the best tokens of the head. They are chosen for each row from the keys at hand: those
whose two channels vary most between tokens. The choice is made anew whenever four times as many
tokens have come. Query heads that share a KV head share its pairs, and choose together, by the mean
of the softmax shares over their heads. Pairs are (i, i + D/2) or (2i, 2i + 1), whichever has
channels more alike in energy; if only some channels are rotated, pairs are still those of the whole
head. A cache keeps the channels of a key side by side, and memory is read some 16 channels at a
time: a GPU saves less than three quarters of the reading unless the chosen channels are neighbours.
"""
