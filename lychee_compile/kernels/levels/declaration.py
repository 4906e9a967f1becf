"""A decode policy as a stack of levels, coarse to fine: groups of keys, summaries, estimates.

A step ranks the groups of the first level by their estimated share of the softmax, keeps the best,
ranks the groups of the next level within these, and so on. The groups that it keeps at the last
level are read whole; tokens are groups of one key. What all policies share is not declared: sinks
and recent tokens are read, the share of a group is that of all its visible keys, and query heads
that share a KV head choose together, by the mean of their shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import sympy

from lychee_compile.kernels.levels.expressions import (
    RESERVED,
    count,
    dot,
    greatest,
    head_dim,
    key,
    least,
    mean,
    query,
    softmax_scale,
)
from lychee_compile.kernels.levels.groups import Chunks, Clusters, TokenClusters

LARGEST_PAGE = 256
"""Largest number of keys of a page."""
VOTES = ("group", "layer")
"""Values of `LevelStack.vote`."""


@dataclass(frozen=True)
class Pages:
    """Neighbouring slots: page i has the slots [i * size, (i + 1) * size)."""

    size: int
    """Number of slots, a power of two from 2 to `LARGEST_PAGE`."""

    def __post_init__(self) -> None:
        if self.size not in (2**power for power in range(1, LARGEST_PAGE.bit_length())):
            raise ValueError(
                f"a page has a power of two of slots, from 2 to {LARGEST_PAGE}; got {self.size}"
            )


@dataclass(frozen=True)
class DominantPairs:
    """The rotary pairs of channels in which the keys of a KV head differ most."""

    one_in: int = 4
    """Number of pairs of which one is kept."""

    def __post_init__(self) -> None:
        if self.one_in < 1:
            raise ValueError(f"one pair in at least 1 is kept; got one in {self.one_in}")

    def channels(self, head_dim: int) -> int:
        """Return how many channels are kept of so many."""
        return min(2 * max(head_dim // 2 // self.one_in, 1), head_dim)


@dataclass(frozen=True)
class Tokens:
    """Single keys. The estimate of a token reads its `key` in the cache."""

    size: int = field(default=1, init=False)
    """Number of slots: 1."""
    pairs: DominantPairs | None = None
    """Channels of query and key that the estimate reads; None: all."""


@dataclass(frozen=True)
class Keep:
    """Number of tokens that the groups kept at a level hold, for the next level to choose from."""

    per_token: int
    """Tokens kept for each token of the budget."""
    least: int = 0
    """Least number of tokens kept."""

    def tokens(self, budget: int) -> int:
        """Return how many tokens are kept for a budget of so many."""
        return max(self.per_token * budget, self.least)

    def groups(self, budget: int, size: int) -> int:
        """Return how many groups of `size` slots are kept for a budget of so many tokens.

        They are at least those that neighbouring slots lie in which the budget holds.
        """
        return max(self.tokens(budget) // size, -(-budget // size) + 1)


@dataclass(frozen=True)
class Level:
    """Groups of keys that are ranked together."""

    groups: Pages | Tokens | Chunks | Clusters | TokenClusters
    estimate: sympy.Expr
    """Estimated score q.k of a group, before softmax scale and soft-cap: an expression of `query`,
    `softmax_scale`, `head_dim` and the fields; of `key` too at a level of tokens. The logarithm of
    the mean of exp(score) over the group would be best; for a token it is the score."""
    fields: Mapping[str, sympy.Expr] = field(default_factory=dict)
    """Summaries of a group by name, each an expression of `key`, `count`, `head_dim` and the fields
    before it."""
    bound: sympy.Expr | None = None
    """Upper bound of q.k over the keys of a group, for a positive scale; None: there is none."""
    keep: Keep | None = None
    """Tokens kept for the next level; None at the last level, where `budget` decides."""
    keeps_first: bool = False
    """True if the first group that a query sees is always kept."""

    def __post_init__(self) -> None:
        if isinstance(self.groups, Tokens) and self.fields:
            raise ValueError("a token has no fields: its estimate reads the key itself")
        known = {key, count, head_dim}
        for name, summary in self.fields.items():
            if name in RESERVED or not name.isidentifier():
                raise ValueError(f"a field cannot be called {name!r}")
            _expect_symbols(f"field {name!r}", summary, known)
            known.add(sympy.Symbol(name, real=True))
        known = known - {key, count} if self.fields else {key, head_dim}
        for name, expression in (("estimate", self.estimate), ("bound", self.bound)):
            if expression is not None:
                _expect_symbols(name, expression, {query, softmax_scale, *known})
                if expression.has(mean, least, greatest):
                    raise ValueError(f"{name} {expression}: only a field is taken over keys")

    @property
    def reads_keys(self) -> bool:
        """True if the estimate reads the keys themselves."""
        return self.estimate.has(key)

    @property
    def rounds_fields(self) -> bool:
        """True if fields are made of others as these are stored: the bound must hold for those."""
        wide = {sympy.Symbol(name, real=True) for name, each in self.channels.items() if each}
        made = [each for each in self.fields.values() if each.free_symbols & wide]
        return self.bound is not None and bool(made)

    @property
    def pairs(self) -> DominantPairs | None:
        """Channels of queries and keys that the estimate reads; None: all."""
        return self.groups.pairs if isinstance(self.groups, Tokens) else None

    def key_channels(self, head_dim: int) -> int:
        """Return how many channels of a key the estimate reads, of so many."""
        if not self.reads_keys:
            return 0
        return head_dim if self.pairs is None else self.pairs.channels(head_dim)

    @cached_property
    def channels(self) -> Mapping[str, bool]:
        """True for each field that has a value per channel, False for a single number."""
        found: dict[str, bool] = {}
        for name, summary in self.fields.items():
            found[name] = _has_channels(summary, found)
        return found


@dataclass(frozen=True)
class LevelStack:
    """A decode policy: levels from coarse to fine, and what is read whatever the query."""

    levels: tuple[Level, ...] = ()
    """None: the last tokens fill the budget."""
    sinks: int | None = None
    """Number of first tokens that are always read; None: as the option `sinks` says."""
    recent: int | None = None
    """Number of last tokens that are always read; None: as the option `recent` says."""
    vote: str = "group"
    """One of `VOTES`: the query heads of a KV head choose together, or those of the whole layer."""
    dense_layers: int = 0
    """Number of first attentions that the paper leaves dense."""

    def __post_init__(self) -> None:
        if self.vote not in VOTES:
            raise ValueError(f"vote={self.vote!r}: expected one of {', '.join(VOTES)}")
        if self.uneven:
            _check_uneven(self.levels, self.vote)
        sizes = [level.groups.size for level in self.levels]
        if not self.uneven and any(fine >= coarse for coarse, fine in pairwise(sizes)):
            raise ValueError(f"levels go from coarse to fine, got groups of {sizes} slots")
        names = [name for level in self.levels for name in level.fields]
        if len(set(names)) < len(names):
            raise ValueError(f"each field needs a name of its own, got {', '.join(names)}")
        for number, level in enumerate(self.levels, 1):
            if (level.keep is None) != (number == len(self.levels)):
                raise ValueError("`keep` is for every level but the last, which `budget` ends")

    def always_read(self, sinks: int, recent: int, budget: int | None) -> tuple[int, int]:
        """Return how many first and last tokens are always read, for options of these values."""
        if not self.levels and budget is not None:  # the window fills the budget
            return sinks, max(recent, budget - sinks)
        return (
            sinks if self.sinks is None else self.sinks,
            recent if self.recent is None else self.recent,
        )

    def least_budget(self, sinks: int, recent: int) -> int:
        """Return the budget from which on a group can be chosen, for options of these values."""
        sinks, recent = self.always_read(sinks, recent, None)
        if self.uneven:
            return sinks + recent + 1
        size = self.last_size
        return sinks + (max(recent, size) + size if self.levels else recent)

    @property
    def uneven(self) -> bool:
        """True if groups differ in length: each then counts with the share of one of its keys."""
        return any(not isinstance(level.groups, Pages | Tokens) for level in self.levels)

    @property
    def last_size(self) -> int:
        """Number of slots of the groups that are read whole: 1 for tokens."""
        return self.levels[-1].groups.size if self.levels else 1

    @property
    def has_bound(self) -> bool:
        """True if the groups that are read whole, pages or chunks, have a bound."""
        last = self.levels[-1] if self.levels else None
        return (
            last is not None and last.bound is not None and isinstance(last.groups, Pages | Chunks)
        )

    @property
    def pairs(self) -> DominantPairs | None:
        """Channels that the last level reads of queries and keys; None: all."""
        return self.levels[-1].pairs if self.levels else None

    @property
    def reads_keys(self) -> bool:
        """True if a choice reads the keys themselves."""
        return any(level.reads_keys for level in self.levels)

    def bytes_per_step(self, tokens: int, budget: int, head_dim: int) -> int:
        """Return the bytes that a choice among `tokens` reads, per row and KV head.

        Numbers have 2 bytes. A level reads what its estimate needs of the groups kept above it.
        """
        total, left = 0, tokens
        for level in self.levels:
            numbers = sum(head_dim if wide else 1 for wide in level.channels.values())
            numbers += level.key_channels(head_dim)
            total += 2 * numbers * (left // level.groups.size)
            left = left if level.keep is None else min(left, level.keep.tokens(budget))
        return total


def _check_uneven(levels: tuple[Level, ...], vote: str) -> None:
    """Raise ValueError unless levels are clusters above chunks, or clusters of tokens.

    Each KV head has clusters of its own, so that heads of a layer cannot vote on these together.
    """
    *above, last = (level.groups for level in levels)
    of_chunks = isinstance(last, Chunks) and all(isinstance(each, Clusters) for each in above)
    if not of_chunks and not (isinstance(last, TokenClusters) and not above):
        raise ValueError(
            "levels of uneven groups are Clusters, any number, above Chunks, or TokenClusters "
            f"alone; got {', '.join(type(level.groups).__name__ for level in levels)}"
        )
    if vote == "layer" and not all(isinstance(level.groups, Chunks) for level in levels):
        raise ValueError("vote='layer' is for groups that all KV heads share: clusters are no such")
    if any(level.keeps_first for level in levels):
        raise ValueError("`keeps_first` is for levels of pages")


def _expect_symbols(what: str, expression: sympy.Expr, known: set[sympy.Symbol]) -> None:
    """Raise ValueError if an expression has symbols that are not known where it stands."""
    unknown = sorted(symbol.name for symbol in expression.free_symbols - known)
    if unknown:
        names = ", ".join(sorted(symbol.name for symbol in known))
        raise ValueError(f"{what} has {', '.join(unknown)}; what it may have is {names}")


def _has_channels(expression: sympy.Expr, fields: Mapping[str, bool]) -> bool:
    """True if an expression has a value per channel, for fields with and without channels."""
    if isinstance(expression, sympy.Symbol):
        return fields.get(expression.name, expression in (key, query))
    if isinstance(expression, dot):
        return False
    return any(_has_channels(each, fields) for each in expression.args)
