"""Triton source of the bound of a level, of which no operand is rounded to the keys' dtype."""

from __future__ import annotations

from typing import NamedTuple

from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.level_source import PairSource, Source, group_values
from lychee_compile.kernels.levels.declaration import Level
from lychee_compile.kernels.levels.expressions import evaluate, head_dim

_ZERO = "0.0"


class BoundSource(NamedTuple):
    """Triton source of a bound of q.k [ROWS, N], and of the sizes of its terms."""

    bound: str
    terms: str
    """Sum of the absolute values of all terms: what rounding is relative to."""


class _Exact(PairSource):
    """Values of pairs, of which no product rounds an operand."""

    def maximum(self, left: Source, right: Source) -> Source:
        return self._beside_zero(super().maximum(left, right), left, right)

    def minimum(self, left: Source, right: Source) -> Source:
        return self._beside_zero(super().minimum(left, right), left, right)

    @staticmethod
    def _beside_zero(found: Source, left: Source, right: Source) -> Source:
        """Return `found` in the dtype of the keys if that holds it: the larger of a value and 0."""
        for value, other in ((left, right), (right, left)):
            if value.whole and other.text == _ZERO:
                return Source(f"{found.text}.to(queries.dtype)", value.axes, whole=True)
        return found

    def product(self, rows: Source, groups: Source) -> str:
        """Return the product of queries [ROWS, DIM] and groups [N, DIM], of exact operands."""
        if rows.whole and groups.whole:
            return super().product(rows, groups)
        wide = (f"{each.text}.to(tl.float32)" for each in (rows, groups))
        return f'tl.dot({next(wide)}, tl.trans({next(wide)}), input_precision="ieee")'


class _Sizes(_Exact):
    """Sizes of all terms, which bound the rounding of their sum."""

    def number(self, value: float) -> Source:
        return super().number(abs(value))

    def dot(self, left: Source, right: Source) -> Source:
        return super().dot(self._size(left), self._size(right))

    def _size(self, value: Source) -> Source:
        found = self.absolute(value)
        if not value.whole:
            return found
        return Source(f"{found.text}.to(queries.dtype)", value.axes, whole=True)


def bound_source(level: Level, precision: str, scale: float, channels: int) -> BoundSource:
    """Return Triton source of the bound of a level, from `queries` [ROWS, DIM].

    The arguments are those of `estimate_source`. Raises Unprintable for what has no Triton form.
    """
    assert level.bound is not None
    values = group_values(level.channels) | {
        "query": Source("queries", ("row", "channel"), whole=True),
        "softmax_scale": Source(repr(scale)),
    }
    bound = level.bound.subs(head_dim, channels)
    found = [evaluate(bound, algebra(precision), values) for algebra in (_Exact, _Sizes)]
    if any(set(each.axes) != {"row", "group"} for each in found):
        raise Unprintable(f"the bound {level.bound} does not depend on query and group")
    return BoundSource(*(each.text for each in found))
