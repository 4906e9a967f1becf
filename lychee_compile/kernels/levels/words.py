"""Words for a declaration of levels, as reports and tables show them."""

from __future__ import annotations

from lychee_compile.kernels.levels.declaration import Keep, Level, LevelStack, Pages


def describe(stack: LevelStack) -> str:
    """Return in words what a declared policy ranks, by what, and what it reads of it.

    For example "pages of 16 by least, greatest; read whole". Pages, or whatever groups a level has,
    come from coarse to fine.
    """
    if not stack.levels:
        return "the last tokens, as many as the budget says"
    parts = [_of_level(level) for level in stack.levels]
    if stack.last_size > 1:
        parts[-1] += "; read whole"
    if stack.vote == "layer":
        parts[-1] += "; all heads of a layer vote"
    return "; then ".join(parts)


def describe_always(stack: LevelStack) -> str:
    """Return in words which tokens a declared policy always reads, beside the newest."""
    first = "first `sinks`" if stack.sinks is None else f"first {stack.sinks}"
    last = "last `recent`" if stack.recent is None else f"last {stack.recent}"
    listed = [] if stack.sinks == 0 else [first]
    listed += [] if stack.recent == 1 else [last]
    if stack.last_size > 1:
        listed.append(f"the page of {stack.last_size} being written")
    return ", ".join(listed) or "the newest"


def _of_level(level: Level) -> str:
    """Return groups, summaries and how much of them is kept, in words."""
    if level.pairs is not None:
        by = f"one in {level.pairs.one_in} pairs of channels of their keys"
    else:
        by = ", ".join([*level.fields, *(["their keys"] if level.reads_keys else [])])
    return f"{_groups(level)} by {by}{_kept(level.keep)}"


def _groups(level: Level) -> str:
    if isinstance(level.groups, Pages):
        return f"pages of {level.groups.size}"
    return type(level.groups).__name__.lower()


def _kept(keep: Keep | None) -> str:
    if keep is None:
        return ""
    kept = f", of which {keep.per_token} times the budget"
    return kept + (f", at least {keep.least:,} tokens, are kept" if keep.least else " is kept")
