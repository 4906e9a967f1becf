"""What an element of a tensor is, as a sympy expression of axes and of elements of graph inputs.

    arange(kv_len) <= arange(query_len)[:, None] + length        kv <= q + length

Numbers are expressions, bool tensors are sympy Booleans, and a choice is a `Piecewise` at the top.
Whatever is not elementwise stays an element of its tensor: `name[b, q]`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import sympy
import torch
import torch.fx
from sympy.logic.boolalg import Boolean, BooleanFunction

from lychee_compile.passes.axes import ZERO, Axes, Axis, Index, Indices, size_expression
from lychee_compile.passes.dataflow import (
    argument,
    first_input,
    is_tensor,
    operator_key,
    scalar_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.names import Names
from lychee_compile.passes.views import broadcast, source_of, storage_of

Element: TypeAlias = sympy.Expr | Boolean
LONGEST_CHOICE = 6
"""Branches up to which choices are followed; a tensor of more stays a tensor."""
DEEPEST = 40
"""Operators up to which an element is followed, so that no chain through a model is."""


class Flag(BooleanFunction):
    """An element of a bool tensor."""

    @classmethod
    def eval(cls, *_: Any) -> None:
        """Never evaluated: only a run knows it."""
        return

    def _sympystr(self, printer: Any) -> str:
        return printer.doprint(self.args[0])


class TooLarge(Exception):  # noqa: N818  the tensor stays a tensor
    """An expression became larger than anybody wants to read."""


class Elements:
    """Evaluates elements of the tensors of one graph."""

    def __init__(
        self,
        axes: Axes,
        names: Names,
        opaque: frozenset[torch.fx.Node] = frozenset(),
        given: Mapping[torch.fx.Node, Element] | None = None,
    ) -> None:
        self.axes, self.names = axes, names
        self._opaque = opaque
        self._given = dict(given or {})
        self._memo: dict[tuple[Any, Indices], Element] = {}
        self._depth = 0

    def of(self, value: Any, indices: Indices = ()) -> Element:
        """The element of a tensor node, or a number, at `indices`."""
        scalar = scalar_of(value)
        if scalar is not None:
            return scalar
        if value in self._given:
            return self._given[value]
        key = (value, indices)
        if key not in self._memo:
            self._memo[key] = self._bounded(value, indices)
        return self._memo[key]

    def _bounded(self, node: torch.fx.Node, indices: Indices) -> Element:
        self._depth += 1
        try:
            return (
                self.load(node, indices) if self._depth > DEEPEST else self._evaluate(node, indices)
            )
        except (TooLarge, TypeError, NotImplementedError):  # sympy raises where kinds do not mix
            return self.load(node, indices)
        finally:
            self._depth -= 1

    def is_opaque(self, node: torch.fx.Node) -> bool:
        """Whether `node` shows memory that is written to behind its back."""
        return bool(self._opaque) and storage_of(node) in self._opaque

    def load(self, node: torch.fx.Node, indices: Indices) -> Element:
        """An element that stays what it is, by name."""
        name = self.names.of(node)
        dtype = value_of(node).dtype if is_tensor(node) else torch.float32
        kind = {} if dtype.is_floating_point or dtype == torch.bool else {"integer": True}
        symbol = sympy.Symbol(name, **kind)
        element = sympy.Indexed(sympy.IndexedBase(symbol, **kind), *indices) if indices else symbol
        return Flag(element) if dtype == torch.bool else element

    def _evaluate(self, node: torch.fx.Node, indices: Indices) -> Element:
        if self.is_opaque(node) or node.op != "call_function":
            constant = self.names.constant(node)
            return self.load(node, indices) if constant is None else constant
        key = operator_key(node)
        if key in ("to", "_to_copy", "type_as", "view") and _changes_kind(node):
            return self._converted(node, indices)
        viewed = source_of(node, indices, self.axes)
        if viewed is not None:
            return self.of(*viewed)
        special = _SPECIAL.get(key)
        if special is not None:
            return special(self, node, indices)
        function = FUNCTIONS.get(key)
        if function is None or len(shape_of(node)) != len(indices):
            return self.load(node, indices)
        return self._elementwise(function, node, indices)

    def _elementwise(
        self, function: Callable[..., Element], node: torch.fx.Node, indices: Indices
    ) -> Element:
        operands = []
        for value in node.args:
            if isinstance(value, torch.fx.Node) and isinstance(value_of(value), torch.Tensor):
                operands.append(self.of(value, broadcast(indices, shape_of(value), shape_of(node))))
            elif isinstance(value, (int, float, torch.fx.Node)):
                operands.append(self.of(value))
        alpha = scalar_of(argument(node, "alpha", 1))
        if alpha is None:
            return self.load(node, indices)
        if alpha != 1:
            scaled = 0 if operator_key(node) == "rsub" else 1
            operands = operands[:2]
            operands[scaled] = choose(_arithmetic(lambda value: value * alpha), operands[scaled])
        result = choose(function, *operands)
        return choose(truth, result) if value_of(node).dtype == torch.bool else result

    def _converted(self, node: torch.fx.Node, indices: Indices) -> Element:
        element = self.of(first_input(node), indices)
        before, after = value_of(first_input(node)).dtype, value_of(node).dtype
        if after == torch.bool:
            return choose(truth, element)
        if before.is_floating_point and not element.is_integer:
            return self.load(node, indices)
        return choose(number, element)


def _changes_kind(node: torch.fx.Node) -> bool:
    """Whether a cast goes to truth values, or from them, or cuts off fractions."""
    before, after = value_of(first_input(node)).dtype, value_of(node).dtype
    cuts = before.is_floating_point and not after.is_floating_point
    return cuts or (before == torch.bool) != (after == torch.bool)


def is_truth(value: Element) -> bool:
    """Whether an element is a truth value; symbols, which could be, are numbers here."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def choose(function: Callable[..., Element], *operands: Element) -> Element:
    """`function` of operands, any of which may be a choice: a choice of results."""
    branches = [each.args if isinstance(each, sympy.Piecewise) else None for each in operands]
    if not any(branches):
        return function(*operands)
    options = [
        [(pair[0], pair[1]) for pair in pairs] if pairs else [(operand, sympy.true)]
        for operand, pairs in zip(operands, branches, strict=True)
    ]
    if math.prod(len(each) for each in options) > LONGEST_CHOICE:
        raise TooLarge
    made = []
    for combination in itertools.product(*options):
        condition = sympy.And(*(pair[1] for pair in combination))
        if condition != sympy.false:
            made.append((function(*(pair[0] for pair in combination)), condition))
    return piecewise(made)


def piecewise(branches: list[tuple[Element, Boolean]]) -> Element:
    """The first value whose condition holds. Of truth values it is a truth value itself."""
    if all(is_truth(value) for value, _ in branches):
        result: Any = sympy.false
        for value, condition in reversed(branches):
            result = sympy.Or(sympy.And(condition, value), sympy.And(sympy.Not(condition), result))
        return result
    return sympy.Piecewise(*branches, evaluate=False) if len(branches) > 1 else branches[0][0]


def number(value: Element) -> sympy.Expr:
    """A truth value as 1 or 0, as arithmetic takes it."""
    if value in (sympy.true, sympy.false):
        return sympy.Integer(int(bool(value)))
    if is_truth(value):
        return sympy.Piecewise((1, value), (0, True), evaluate=False)
    return value


def truth(value: Element) -> Boolean:
    """A number as whether it is not zero."""
    if is_truth(value):
        return value
    return sympy.Ne(value, 0)


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Element]:
    """A function of numbers; truth values among its operands count as 1 and 0."""

    def apply(*operands: Element) -> Element:
        numbers = [number(each) for each in operands]
        if any(isinstance(each, sympy.Piecewise) for each in numbers):
            return choose(function, *numbers)
        return function(*numbers)

    return apply


def _logical(function: Callable[..., Any]) -> Callable[..., Element]:
    return lambda *operands: function(*(truth(each) for each in operands))


def _bitwise(logical: Callable[..., Any]) -> Callable[..., Element]:
    """`&`, `|` and `~`, which are understood between truth values only."""

    def apply(*operands: Element) -> Element:
        if not all(is_truth(each) for each in operands):
            raise TooLarge
        return logical(*operands)

    return apply


def _exclusive_or(left: Boolean, right: Boolean) -> Boolean:
    """One of two; where the one implies the other, as a narrow band does a wide one, their gap."""
    parts = [set(sympy.And.make_args(each)) for each in (left, right)]
    if parts[0] <= parts[1]:
        return sympy.And(left, sympy.Not(sympy.And(*(parts[1] - parts[0]))))
    if parts[1] <= parts[0]:
        return sympy.And(right, sympy.Not(sympy.And(*(parts[0] - parts[1]))))
    return sympy.Xor(left, right)


FUNCTIONS: dict[str, Callable[..., Element]] = {
    "add": _arithmetic(lambda a, b: a + b),
    "sub": _arithmetic(lambda a, b: a - b),
    "subtract": _arithmetic(lambda a, b: a - b),
    "rsub": _arithmetic(lambda a, b: b - a),
    "mul": _arithmetic(lambda a, b: a * b),
    "multiply": _arithmetic(lambda a, b: a * b),
    "neg": _arithmetic(lambda a: -a),
    "abs": _arithmetic(sympy.Abs),
    "exp": _arithmetic(sympy.exp),
    "log": _arithmetic(lambda a: -sympy.oo if a.is_zero else sympy.log(a)),
    "sqrt": _arithmetic(sympy.sqrt),
    "rsqrt": _arithmetic(lambda a: 1 / sympy.sqrt(a)),
    "reciprocal": _arithmetic(lambda a: 1 / a),
    "tanh": _arithmetic(sympy.tanh),
    "sigmoid": _arithmetic(lambda a: 1 / (1 + sympy.exp(-a))),
    "pow": _arithmetic(lambda a, b: a**b),
    "square": _arithmetic(lambda a: a**2),
    "floor_divide": _arithmetic(lambda a, b: sympy.floor(a / b)),
    "remainder": _arithmetic(sympy.Mod),
    "maximum": _arithmetic(sympy.Max),
    "minimum": _arithmetic(sympy.Min),
    "le": _arithmetic(sympy.Le),
    "lt": _arithmetic(sympy.Lt),
    "ge": _arithmetic(sympy.Ge),
    "gt": _arithmetic(sympy.Gt),
    "eq": _arithmetic(sympy.Eq),
    "ne": _arithmetic(sympy.Ne),
    "less_equal": _arithmetic(sympy.Le),
    "less": _arithmetic(sympy.Lt),
    "greater_equal": _arithmetic(sympy.Ge),
    "greater": _arithmetic(sympy.Gt),
    "not_equal": _arithmetic(sympy.Ne),
    "logical_not": _logical(sympy.Not),
    "logical_and": _logical(sympy.And),
    "logical_or": _logical(sympy.Or),
    "logical_xor": _logical(_exclusive_or),
    "bitwise_not": _bitwise(sympy.Not),
    "bitwise_and": _bitwise(sympy.And),
    "bitwise_or": _bitwise(sympy.Or),
    "bitwise_xor": _bitwise(_exclusive_or),
    "__and__": _bitwise(sympy.And),
    "__or__": _bitwise(sympy.Or),
}
"""Elementwise operators as functions of their elements."""


def _divide(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    rounding = argument(node, "rounding_mode")
    if rounding == "trunc":
        return elements.load(node, indices)
    function = (lambda a, b: sympy.floor(a / b)) if rounding else (lambda a, b: a / b)
    first, second = (_operand(elements, node, place, indices) for place in (0, 1))
    return choose(_arithmetic(function), first, second)


def _operand(elements: Elements, node: torch.fx.Node, place: int, indices: Indices) -> Element:
    value = node.args[place]
    if isinstance(value, torch.fx.Node) and isinstance(value_of(value), torch.Tensor):
        return elements.of(value, broadcast(indices, shape_of(value), shape_of(node)))
    return elements.of(value)


def _where(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    condition, yes, no = (_operand(elements, node, place, indices) for place in (0, 1, 2))
    return _branch(truth(condition), *_of_one_kind(node, yes, no))


def _masked_fill(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    before, hidden, fill = (_operand(elements, node, place, indices) for place in (0, 1, 2))
    return _branch(truth(hidden), *_of_one_kind(node, fill, before))


def _of_one_kind(node: torch.fx.Node, *values: Element) -> list[Element]:
    """Truth values for a tensor of truth values: scalars among them come as numbers."""
    if value_of(node).dtype != torch.bool:
        return list(values)
    return [choose(truth, value) for value in values]


def _branch(condition: Boolean, yes: Element, no: Element) -> Element:
    """A choice between two, either of which may be one already."""
    branches = []
    for value, holds in ((yes, condition), (no, sympy.Not(condition))):
        pairs = value.args if isinstance(value, sympy.Piecewise) else [(value, sympy.true)]
        branches += [(pair[0], sympy.And(holds, pair[1])) for pair in pairs]
    if len(branches) > LONGEST_CHOICE:
        raise TooLarge
    last = branches[-1][0]
    return piecewise([*branches[:-1], (last, sympy.true)])


def _triangle(keeps: Callable[[Index, Index, Any], Boolean]) -> Callable[..., Element]:
    def rule(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
        diagonal = scalar_of(argument(node, "diagonal", 0))
        inside = keeps(indices[-2], indices[-1], diagonal)
        value = elements.of(node.args[0], indices)
        if value_of(node).dtype == torch.bool:
            return sympy.And(inside, truth(value))
        return _branch(inside, value, ZERO)

    return rule


def _arange(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    start, step = (
        scalar_of(argument(node, name, usual)) for name, usual in (("start", 0), ("step", 1))
    )
    return start + indices[0] * step


def _constant(value: int) -> Callable[..., Element]:
    def rule(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
        return (
            sympy.sympify(bool(value))
            if value_of(node).dtype == torch.bool
            else sympy.Integer(value)
        )

    return rule


def _full(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    name = "s" if operator_key(node) == "scalar_tensor" else "fill_value"
    value = elements.of(argument(node, name))
    return truth(value) if value_of(node).dtype == torch.bool else value


def _index(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    """Indexing with tensors that are next to each other, as in `cache[rows, positions]`."""
    source, chosen = first_input(node), list(argument(node, "indices"))
    places = [place for place, each in enumerate(chosen) if each is not None]
    bools = any(value_of(each).dtype == torch.bool for each in chosen if each is not None)
    if bools or places != list(range(places[0], places[-1] + 1)):
        return elements.load(node, indices)
    tensors = [chosen[place] for place in places]
    rank = max(len(shape_of(each)) for each in tensors)
    before, ours, after = (
        indices[: places[0]], indices[places[0] : places[0] + rank], indices[places[0] + rank :]
    )  # fmt: skip
    wide = torch.broadcast_shapes(
        *(tuple(1 if isinstance(s, torch.SymInt) else s for s in shape_of(t)) for t in tensors)
    )
    if any(isinstance(size, torch.SymInt) for each in tensors for size in shape_of(each)):
        wide = max((shape_of(each) for each in tensors), key=len)
    at = [elements.of(each, broadcast(ours, shape_of(each), wide)) for each in tensors]
    if any(isinstance(each, sympy.Piecewise) or is_truth(each) for each in at):
        return elements.load(node, indices)
    sizes = [shape_of(source)[place] for place in places]
    at = [_from_front(each, size, elements.axes) for each, size in zip(at, sizes, strict=True)]
    found = elements.of(source, (*before, *at, *after))
    # What a tensor holds may be negative: that names an element only of what stays a tensor.
    unsure = [each for each in at if not each.is_nonnegative]
    whole = found.args[0] if isinstance(found, Flag) else found
    named = isinstance(whole, sympy.Indexed) and all(each in whole.indices for each in unsure)
    return found if named or not unsure else elements.load(node, indices)


def _from_front(index: Index, size: Any, axes: Axes) -> Index:
    """An index by numbers and axes that is negative, and so counts from the end, made positive."""
    ends = {axis: axes.sizes[axis] - 1 for axis in index.atoms(Axis)}
    known = index.is_number or (ends and index.free_symbols == set(ends))
    if known and index.xreplace(ends).is_negative:
        return sympy.expand(index + size_expression(size))
    return index


def _index_select(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    """`index_select`, and `embedding`, which selects rows."""
    if operator_key(node) == "embedding":
        source, dim, chosen = argument(node, "weight"), 0, argument(node, "indices")
    else:
        source, chosen = argument(node, "self"), argument(node, "index")
        dim = argument(node, "dim") % len(shape_of(source))
    rank = len(shape_of(chosen))
    at = elements.of(chosen, indices[dim : dim + rank])
    if isinstance(at, sympy.Piecewise) or is_truth(at):
        return elements.load(node, indices)
    if source.op == "call_function" and not at.is_nonnegative:
        return elements.load(node, indices)
    return elements.of(source, (*indices[:dim], at, *indices[dim + rank :]))


def _index_put(elements: Elements, node: torch.fx.Node, indices: Indices) -> Element:
    """`x[mask] = number`."""
    chosen, value = argument(node, "indices"), argument(node, "values")
    whole = len(chosen) == 1 and value_of(chosen[0]).dtype == torch.bool
    if not whole or len(shape_of(chosen[0])) != len(indices) or shape_of(value):
        return elements.load(node, indices)
    filled, before = elements.of(value), elements.of(node.args[0], indices)
    hidden = truth(elements.of(chosen[0], indices))
    return _branch(hidden, *_of_one_kind(node, filled, before))


_SPECIAL: dict[str, Callable[[Elements, torch.fx.Node, Indices], Element]] = {
    "div": _divide,
    "divide": _divide,
    "true_divide": _divide,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(lambda row, column, diagonal: sympy.Le(column, row + diagonal)),
    "triu": _triangle(lambda row, column, diagonal: sympy.Ge(column, row + diagonal)),
    "arange": _arange,
    "ones": _constant(1),
    "ones_like": _constant(1),
    "new_ones": _constant(1),
    "zeros": _constant(0),
    "zeros_like": _constant(0),
    "new_zeros": _constant(0),
    "full": _full,
    "full_like": _full,
    "new_full": _full,
    "scalar_tensor": _full,
    "index": _index,
    "index_select": _index_select,
    "embedding": _index_select,
    "index_put": _index_put,
}
