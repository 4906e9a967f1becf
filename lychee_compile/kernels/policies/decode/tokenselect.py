"""TokenSelect: every token scored, and all heads voting."""

from __future__ import annotations

from lychee_compile.kernels.levels.declaration import Level, LevelStack, Tokens
from lychee_compile.kernels.levels.expressions import dot, key, query

TOKENSELECT = LevelStack(levels=(Level(Tokens(), estimate=dot(query, key)),), vote="layer")
"""TokenSelect (arXiv 2411.02886): exact scores of all tokens, and a soft vote of all heads.

There are no groups and no summaries. A softmax over the tokens to choose from makes shares of each
query head's scores. All heads of the layer add up their shares ("soft vote"). Every KV head reads
the tokens of most votes, beside the `sinks` first and the `recent` last tokens.

Not as in the paper: every query votes. The paper keeps a choice for the next queries as long as
they are alike, which saves time and never adds to what is read. Scores are scaled, capped and
biased as the attention's own are. Several query positions count as that many steps, where the paper
votes once for a chunk of them. Its 128 sinks, 512 recent and 2048 voted tokens are the options
`sinks`, `recent` and `budget`.
"""
