"""Expressions of queries, keys and summaries: how a summary is made and what it estimates.

An expression is a sympy expression. `query` and `key` stand for one channel of a vector, and so
does `field(name)` for a summary that has channels. Functions of this module sum over channels or
over the keys of a group; all else is elementwise.

    dot(query, key)                                  the score of a key, before the softmax scale
    mean(key), least(key), greatest(key)             over the keys of a group, channel by channel
    mean((key - field("mean"))**2)                   a variance
    sqrt(greatest(dot(key - c, key - c)))            a radius around c = field("mean")
    dot(Max(query, 0), field("greatest")) + ...      an estimate for a group

`evaluate` walks an expression; an `Algebra` says what the operations are: on tensors
(`kernels/reference/level_values.py`) or as Triton source (`codegen/level_source.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce
from typing import Protocol, TypeVar

import sympy

V = TypeVar("V")


class _Reduction(sympy.Function):
    """A real function that sums or compares, and that sympy leaves as it is."""

    is_real = True
    is_commutative = True


class dot(_Reduction):  # noqa: N801  read as a function
    """Sum over channels of the product of two expressions."""

    nargs = 2


class mean(_Reduction):  # noqa: N801  read as a function
    """Mean over the keys of a group."""

    nargs = 1


class least(_Reduction):  # noqa: N801  read as a function
    """Least value over the keys of a group."""

    nargs = 1


class greatest(_Reduction):  # noqa: N801  read as a function
    """Greatest value over the keys of a group."""

    nargs = 1


query = sympy.Symbol("query", real=True)
"""A channel of the query."""
key = sympy.Symbol("key", real=True)
"""A channel of a key: of a group's keys in a summary, of the token itself in an estimate."""
softmax_scale = sympy.Symbol("softmax_scale", real=True)
"""The factor that the softmax multiplies q.k with."""
head_dim = sympy.Symbol("head_dim", positive=True)
"""Number of channels of a key."""

count = sympy.Symbol("count", positive=True)
"""Number of keys of a group, in a summary."""

RESERVED = (query.name, key.name, softmax_scale.name, head_dim.name, count.name)
"""Names that a summary cannot have."""


def field(name: str) -> sympy.Symbol:
    """Return the symbol of the summary `name`: one channel of it, if it has channels."""
    return sympy.Symbol(name, real=True)


def norm(vector: sympy.Expr) -> sympy.Expr:
    """Return the Euclidean length of an expression over its channels."""
    return sympy.sqrt(dot(vector, vector))


def weighted_mean(value: sympy.Expr, weight: sympy.Expr) -> sympy.Expr:
    """Return the mean of `value` over the keys of a group, by `weight`, which has no channels."""
    return mean(value * weight) / mean(weight)


class Algebra(Protocol[V]):
    """The operations of expressions on values of one kind."""

    def number(self, value: float) -> V:
        """Return a number."""

    def add(self, left: V, right: V) -> V:
        """Return a sum."""

    def multiply(self, left: V, right: V) -> V:
        """Return a product."""

    def power(self, base: V, exponent: float) -> V:
        """Return a power by a number."""

    def exp(self, value: V) -> V:
        """Return an exponential."""

    def log(self, value: V) -> V:
        """Return a natural logarithm."""

    def absolute(self, value: V) -> V:
        """Return an absolute value."""

    def maximum(self, left: V, right: V) -> V:
        """Return the larger value, element by element."""

    def minimum(self, left: V, right: V) -> V:
        """Return the smaller value, element by element."""

    def dot(self, left: V, right: V) -> V:
        """Return a sum of products over channels."""

    def mean(self, value: V) -> V:
        """Return the mean over the keys of a group."""

    def least(self, value: V) -> V:
        """Return the least value over the keys of a group."""

    def greatest(self, value: V) -> V:
        """Return the greatest value over the keys of a group."""


def evaluate(
    expression: sympy.Expr,
    algebra: Algebra[V],
    values: Mapping[str, V],
    known: dict[sympy.Expr, V] | None = None,
) -> V:
    """Return the value of an expression in an algebra, where symbols have `values` by name.

    Values of expressions that are `known` are taken from there; others are added. Raises ValueError
    for a symbol without a value and for a function that expressions do not have.
    """
    if isinstance(expression, sympy.Symbol):
        if expression.name not in values:
            names = ", ".join(sorted(values))
            raise ValueError(f"no {expression.name!r} here: {names} are known")
        return values[expression.name]
    if expression.is_number and not expression.has(_Reduction):
        return algebra.number(float(expression))
    if known is None or expression not in known:
        inner = [evaluate(each, algebra, values, known) for each in _operands(expression)]
        found = _apply(expression, algebra, inner)
        if known is None:
            return found
        known[expression] = found
    return known[expression]


@lru_cache(maxsize=4096)
def _operands(expression: sympy.Expr) -> Sequence[sympy.Expr]:
    """Return the operands of an expression, in an order that is the same in every process."""
    if isinstance(expression, sympy.Pow):
        return expression.args[:1]
    if isinstance(expression, dot):
        return expression.args
    return sorted(expression.args, key=sympy.default_sort_key)


def _apply(expression: sympy.Expr, algebra: Algebra[V], inner: Sequence[V]) -> V:
    if isinstance(expression, sympy.exp):  # before powers: sympy counts it as one
        return algebra.exp(inner[0])
    if isinstance(expression, sympy.Pow) and expression.exp.is_number:
        return algebra.power(inner[0], float(expression.exp))
    for kind, join in (
        (sympy.Add, algebra.add),
        (sympy.Mul, algebra.multiply),
        (sympy.Max, algebra.maximum),
        (sympy.Min, algebra.minimum),
    ):
        if isinstance(expression, kind):
            return reduce(join, inner)
    for kind, unary in (
        (sympy.log, algebra.log),
        (sympy.Abs, algebra.absolute),
        (mean, algebra.mean),
        (least, algebra.least),
        (greatest, algebra.greatest),
    ):
        if isinstance(expression, kind):
            return unary(inner[0])
    if isinstance(expression, dot):
        return algebra.dot(*inner)
    raise ValueError(f"an estimate or a summary cannot have {type(expression).__name__}")
