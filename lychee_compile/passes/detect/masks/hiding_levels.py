"""Tell if keys are hidden by numbers of different size, so that some rows see the smaller one.

    scores = scores.masked_fill(future, -1e9).masked_fill(own, -5e4)

A row that has nothing but hidden keys gives all weight to those at -5e4. They are visible to this
row, and hidden from all others: no condition on single keys says that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.passes.symbolic.axes import Axes, Axis

MOST = 16
"""Largest number of conditions that are told apart; more count as different levels."""


@dataclass
class HidingLevels:
    """The numbers that scores of hidden keys have, each with its condition."""

    _levels: dict[Boolean, sympy.Expr] = field(default_factory=dict)

    def fill(self, condition: Boolean, level: sympy.Expr) -> None:
        """Note that keys have the score `level` under a condition, whatever they had before."""
        self._levels[condition] = level

    def add(self, branches: Iterable[tuple[Boolean, sympy.Expr]]) -> None:
        """Note numbers that are added to scores, each under a condition that excludes the others.

        A key that was hidden already is hidden by the sum.
        """
        before = dict(self._levels)
        for condition, level in branches:
            self._levels[condition] = level + before.get(condition, 0)
            for other, lower in before.items():
                both = sympy.And(condition, other)
                if both not in (sympy.false, condition) and len(self._levels) < MOST:
                    self._levels[both] = level + lower

    @property
    def differ(self) -> list[float]:
        """The levels from the lowest up, if there are two or more; else nothing."""
        levels = sorted({float(each) for each in self._levels.values()})
        return levels if len(levels) > 1 else []


def every_row_sees_a_key(hidden: Collection[Boolean], keys: frozenset[Axis], axes: Axes) -> bool:
    """True if it is proved that each row sees the first key, or that at its own position."""
    if len(keys) != 1:
        return False
    (key,) = keys
    others = {axis for each in hidden for axis in each.atoms(Axis)} - keys
    own = [axis for axis in others if (axes.sizes[key] - axes.sizes[axis]).is_nonnegative]
    places = [sympy.S.Zero, *sorted(own, key=str)]
    return any(all(each.subs(key, place) == sympy.false for each in hidden) for place in places)
