"""The axes of one attention, and index arithmetic over them.

An element of a tensor is named by one index per dimension, a sympy expression of axes: "b", "q", or
"4*b + h" if batch and heads share a dimension. Going back through a `view` divides such indices. If
a division cuts through an axis, the axis is really two, and `SplitAxis` is raised. The caller then
splits the axis and starts over (`with_finer_axes`), until no axis is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import sympy
import torch

from lychee_compile import torch_private

Index: TypeAlias = sympy.Expr
Indices: TypeAlias = tuple[Index, ...]
ZERO: Index = sympy.S.Zero
FINEST = 12
"""Largest number of times that the axes of one attention are split."""
Result = TypeVar("Result")


class Axis(sympy.Symbol):
    """A symbol that runs over a dimension or a part of one, unlike the symbols of sizes."""


class SplitAxis(Exception):  # noqa: N818  a request to start over, no failure
    """A request to split `axis` in two, of which the inner one has `inner` values."""

    def __init__(self, axis: Axis, inner: sympy.Expr) -> None:
        super().__init__(f"{axis} by {inner}")
        self.axis, self.inner = axis, inner


@dataclass(frozen=True)
class _Parts:
    outer: Axis
    inner: Axis
    inner_size: sympy.Expr


def size_expression(size: Any) -> sympy.Expr:
    """Return a size of a tensor, int, SymInt or an expression already, as a sympy expression."""
    if isinstance(size, sympy.Expr):
        return size
    if isinstance(size, torch.SymInt):
        return torch_private.symbolic_expression(size)
    return sympy.Integer(size)


def plain(size: sympy.Expr) -> int | sympy.Expr:
    """Return a size as an int if it is a number."""
    return int(size) if size.is_Integer else size


class Axes:
    """The axes seen so far, each with its size and the parts it was split into."""

    def __init__(self) -> None:
        self.sizes: dict[Axis, sympy.Expr] = {}
        self._parts: dict[Axis, _Parts] = {}
        self._equal_sizes: dict[sympy.Symbol, sympy.Expr] = {}

    def assume_equal(self, left: Any, right: Any) -> None:
        """Note that two sizes, which Dynamo may name apart, are equal in every run."""
        difference = sympy.expand(self.size(left) - self.size(right))
        for symbol in sorted(difference.free_symbols, key=str):
            if difference.coeff(symbol, 1) in (1, -1) and difference.diff(symbol, 2) == 0:
                solution = sympy.expand(symbol - difference / difference.coeff(symbol, 1))
                self._equal_sizes[symbol] = solution
                return

    def size(self, size: Any) -> sympy.Expr:
        """Return a size as an expression; equal sizes are written in the same symbols."""
        expression = size_expression(size)
        return expression.xreplace(self._equal_sizes) if self._equal_sizes else expression

    def agree_with(self, other: Axes) -> None:
        """Take over which sizes are equal in every run."""
        self._equal_sizes = dict(other._equal_sizes)

    def in_fewest_sizes(self, expression: Any) -> Any:
        """Return an expression with as few symbols of sizes as their equality allows.

        A difference of two sizes that always are equal would leave both in it.
        """
        for symbol, equal in self._equal_sizes.items():
            for other in sorted(equal.free_symbols & expression.free_symbols, key=str):
                solution = sympy.solve(equal - symbol, other)
                shorter = expression.xreplace({other: solution[0]}) if len(solution) == 1 else None
                if shorter is None:
                    continue
                shorter = shorter.replace(lambda each: each.is_Add, sympy.expand)
                if len(shorter.free_symbols) < len(expression.free_symbols):
                    expression = shorter
        return expression

    def rejoined(self, expression: Any) -> Any:
        """Return an expression with the axes that were split in the place of their parts.

        A part that is left alone becomes a quotient or a remainder.
        """
        for whole, parts in reversed(self._parts.items()):
            expression = self._rejoined(expression, whole, parts)
        if not expression.has(sympy.Mod):
            return expression
        return expression.replace(lambda each: each.is_Add, _with_whole_indices)

    def _rejoined(self, expression: Any, whole: Axis, parts: _Parts) -> Any:
        if not expression.has(parts.outer, parts.inner):
            return expression
        if isinstance(expression, sympy.Expr) and expression.is_polynomial(parts.outer):
            joined = sympy.expand(
                expression.subs(parts.outer, (whole - parts.inner) / parts.inner_size)
            )
            if not joined.has(parts.inner) and not joined.has(sympy.Rational):
                return joined
        if isinstance(expression, Axis):
            size = parts.inner_size
            outer = expression == parts.outer
            return sympy.floor(whole / size) if outer else sympy.Mod(whole, size)
        return expression.func(*(self._rejoined(each, whole, parts) for each in expression.args))

    def index(self, name: str, size: Any) -> Index:
        """Return the index that runs over a whole dimension `name`: an axis, its parts, or 0."""
        expression = self.size(size)
        if expression == 1:
            return ZERO
        axis = _symbol(name)
        self.sizes.setdefault(axis, expression)
        return self._refined(axis)

    def _refined(self, axis: Axis) -> Index:
        parts = self._parts.get(axis)
        if parts is None:
            return axis
        return self._refined(parts.outer) * parts.inner_size + self._refined(parts.inner)

    def split(self, request: SplitAxis) -> None:
        """Split an axis in two."""
        axis, inner_size = request.axis, request.inner
        outer, inner = _symbol(f"{axis}_0"), _symbol(f"{axis}_1")
        self.sizes[outer] = _divide_exactly(self.sizes[axis], inner_size) or ZERO
        self.sizes[inner] = inner_size
        self._parts[axis] = _Parts(outer, inner, inner_size)

    def product(self, axes: Iterable[Axis]) -> sympy.Expr:
        """Return the number of values that the axes have together."""
        return sympy.Mul(*(self.sizes[axis] for axis in axes))

    def divide(self, index: Index, size: sympy.Expr) -> tuple[Index, Index]:
        """Return quotient and remainder of an index by a size.

        Raises `SplitAxis` if the size cuts an axis in two.
        """
        if size == 1:
            return index, ZERO
        if self.is_below(index, size):
            return ZERO, index
        quotient: list[Index] = []
        remainder: list[Index] = []
        for term in sympy.Add.make_args(sympy.expand(index)):
            times = _divide_exactly(term, size)
            (remainder if times is None else quotient).append(term if times is None else times)
        rest = sympy.Add(*remainder)
        if self.is_below(rest, size):
            return sympy.Add(*quotient), rest
        for term in remainder:
            self._split_across(term, size)
        return sympy.floor(index / size), sympy.Mod(index, size)

    def _split_across(self, term: Index, size: sympy.Expr) -> None:
        """Raise `SplitAxis` if `term` is a multiple of an axis that `size` cuts in two."""
        stride, axis = _stride(term)
        inner = None if axis is None else _divide_exactly(size, stride)
        if axis is None or inner is None or inner in (1, self.sizes[axis]) or stride.is_negative:
            return  # no split makes an offset or a flip whole
        if _divide_exactly(self.sizes[axis], inner) is not None:
            raise SplitAxis(axis, inner)

    def is_below(self, index: Index, size: sympy.Expr) -> bool:
        """True if 0 <= index < size is proved."""
        if index.is_Integer and size.is_Integer:
            return bool(0 <= index < size)
        largest = ZERO
        for term in sympy.Add.make_args(index):
            stride, axis = _stride(term)
            if axis is not None and stride.is_positive:
                largest += stride * (self.sizes[axis] - 1)
            elif not term.atoms(Axis) and term.is_nonnegative:
                largest += term
            else:
                return False
        return bool(sympy.expand(size - 1 - largest).is_nonnegative)

    def reshape(
        self, indices: Sequence[Index], sizes: Sequence[Any], source: Sequence[Any]
    ) -> Indices:
        """Return the indices before a reshape from the sizes `source` to `sizes`."""
        result: list[Index] = []
        for outer, inner in _groups(tuple(map(self.size, sizes)), tuple(map(self.size, source))):
            flat = ZERO
            for place in outer:
                flat = flat * self.size(sizes[place]) + indices[place]
            flat = flat if len(outer) < 2 else sympy.expand(flat)
            part: list[Index] = []
            for place in reversed(inner[1:]):
                flat, rest = self.divide(flat, self.size(source[place]))
                part.append(rest)
            result.extend([flat, *reversed(part)] if inner else [])
        return tuple(result)

    def digits(self, index: Index, size: Any) -> tuple[Axis, ...] | None:
        """Return the axes that make up an index over a whole dimension, outermost first.

        None if the index is anything but axes side by side, such as a part of a dimension.
        """
        if isinstance(index, Axis):
            return (index,) if _equal(self.sizes[index], self.size(size)) else None
        if index == 0:
            return () if self.size(size) == 1 else None
        terms: list[tuple[sympy.Expr, Axis]] = []
        for term in sympy.Add.make_args(sympy.expand(index)):
            stride, axis = _stride(term)
            if axis is None:
                return None
            terms.append((stride, axis))
        digits: list[Axis] = []
        stride = sympy.S.One
        while terms:
            following = next((each for each in terms if _equal(each[0], stride)), None)
            if following is None:
                return None
            if following[1] in digits:
                return None
            terms.remove(following)
            digits.insert(0, following[1])
            stride *= self.sizes[following[1]]
        return tuple(digits) if _equal(stride, self.size(size)) else None


def _with_whole_indices(total: sympy.Add) -> sympy.Expr:
    """Return a sum with `index` in the place of `size*floor(index/size) + Mod(index, size)`."""
    for rest in total.atoms(sympy.Mod):
        index, size = rest.args
        times, quotient = total.coeff(rest), sympy.floor(index / size)
        if times != 0 and sympy.expand(total.coeff(quotient) - times * size) == 0:
            whole = total - times * rest - times * size * quotient + times * index
            return _with_whole_indices(sympy.expand(whole))
    return total


def free_axes(indices: Iterable[Index]) -> frozenset[Axis]:
    """Return the axes that occur in some indices."""
    return frozenset(axis for index in indices for axis in index.atoms(Axis))


def with_finer_axes(match: Callable[[Axes], Result]) -> Result | None:
    """Return `match` of axes fine enough for every view in the way; None if none are."""
    axes = Axes()
    for _ in range(FINEST):
        try:
            return match(axes)
        except SplitAxis as request:
            axes.split(request)
    return None


@lru_cache(maxsize=4096)
def _symbol(name: str) -> Axis:
    return Axis(name, integer=True, nonnegative=True)


@lru_cache(maxsize=4096)
def _stride(term: Index) -> tuple[sympy.Expr, Axis | None]:
    """Return a term as a number times an axis; the axis is None if there is none."""
    factors = sympy.Mul.make_args(term)
    axes = [factor for factor in factors if isinstance(factor, Axis)]
    rest = [factor for factor in factors if not isinstance(factor, Axis)]
    if len(axes) != 1 or any(factor.atoms(Axis) for factor in rest):
        return term, None
    return sympy.Mul(*rest), axes[0]


def _equal(left: sympy.Expr, right: sympy.Expr) -> bool:
    return bool(left == right) or sympy.expand(left - right) == 0


def _divide_exactly(value: sympy.Expr, by: sympy.Expr) -> sympy.Expr | None:
    """Return `value / by` if that is a whole number whatever the symbols are, else None."""
    if value.is_Integer and by.is_Integer:
        return sympy.Integer(value // by) if by != 0 and value % by == 0 else None
    ratio = sympy.cancel(value / by)
    numerator, denominator = sympy.fraction(ratio)
    return numerator if denominator == 1 else None


@lru_cache(maxsize=4096)
def _groups(
    sizes: tuple[sympy.Expr, ...], source: tuple[sympy.Expr, ...]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Return the finest pairs of dimensions of a reshaped tensor, and of its source, that match."""
    groups = []
    left, right = 0, 0
    while left < len(sizes) or right < len(source):
        outer, inner = (
            list(range(left, min(left + 1, len(sizes)))),
            list(range(right, min(right + 1, len(source)))),
        )
        while True:
            reshaped = sympy.Mul(*(sizes[place] for place in outer))
            original = sympy.Mul(*(source[place] for place in inner))
            if _equal(reshaped, original):
                break
            more_outer, more_inner = (
                left + len(outer) < len(sizes),
                right + len(inner) < len(source),
            )
            if more_outer and (
                not more_inner
                or _divide_exactly(original, reshaped) is not None
                or (reshaped - original).is_negative
            ):
                outer.append(left + len(outer))
            elif more_inner:
                inner.append(right + len(inner))
            else:
                break
        groups.append((tuple(outer), tuple(inner)))
        left, right = left + len(outer), right + len(inner)
    return tuple(groups)
