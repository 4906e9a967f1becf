"""StreamingLLM: the first and the last tokens, whatever the query."""

from __future__ import annotations

from lychee_compile.kernels.levels.declaration import LevelStack

STREAMING = LevelStack()
"""StreamingLLM (arXiv 2309.17453): attention sinks and a window that fills the budget.

Nothing is summarised and nothing is ranked. The `sinks` first tokens are read, and as many of the
last as the budget allows; `recent` of them even if the budget is smaller. The window moves with
every token. A choice by content must beat this policy.

Not as in the paper: tokens keep the positions they were encoded with, as the cache holds them
rotated, and what leaves the window stays in the cache.
"""
