"""Elements that an expression of keys or values reads, and when each of them counts.

    Piecewise((x[d] * cos[d] - x[d + 8] * sin[d], d < 8), (x[d] * cos[d - 8] + ..., True))

x[d] always counts; x[d + 8] does for d < 8, and x[d - 8] for other channels: these two are read at
once, as x[where(d < 8, d + 8, d - 8)].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.expressions import indices_of
from lychee_compile.codegen.specification import D, LoadSpec, Stored

Element: TypeAlias = sympy.Symbol | sympy.Indexed
"""An element of a tensor; one without dimensions is a symbol."""


@dataclass(frozen=True)
class Wanted:
    """An element to read."""

    element: Element
    stands_for: tuple[Element, ...]
    """Elements of the expression that it is."""
    when: Boolean
    """Condition under which it counts."""


def tensor_of(value: sympy.Basic, load: LoadSpec) -> Stored | None:
    """Return the tensor that `value` is an element of; None if it is no element."""
    name = value.name if isinstance(value, sympy.Symbol) else None
    name = str(value.base) if isinstance(value, sympy.Indexed) else name
    return next((each for each in load.tensors if each.name == name), None)


def in_range(tensor: Stored, indices: Sequence[sympy.Expr], channels: int) -> bool:
    """True if indices that depend on the channel are in range for all channels."""
    for index, size in zip(indices, tensor.sizes, strict=True):
        if D not in index.free_symbols:
            continue
        if index.free_symbols != {D} or size is None:
            return False
        values = [index.subs(D, channel) for channel in range(channels)]
        if not all(value.is_Integer and 0 <= value < size for value in values):
            return False
    return True


def wanted_by(load: LoadSpec, channels: int) -> list[Wanted]:
    """Return the elements that are numbers of a load, and not indices, of so many channels."""
    waiting = _conditions(load)
    found = []
    while waiting:
        element, when = next(iter(waiting.items()))
        del waiting[element]
        other = None if _is_safe(element, load, channels) else _complement(element, when, waiting)
        if other is None:
            found.append(Wanted(element, (element,), when))
            continue
        del waiting[other]
        places = [
            mine if mine == theirs else sympy.Piecewise((mine, when), (theirs, sympy.true))
            for mine, theirs in zip(element.indices, other.indices, strict=True)
        ]
        both = sympy.Indexed(element.base, *places)
        found.append(Wanted(both, (element, other), sympy.true))
    return found


def _conditions(load: LoadSpec) -> dict[Element, Boolean]:
    found: dict[Element, Boolean] = {}
    waiting: list[tuple[sympy.Basic, Boolean]] = [(sympy.sympify(load.element), sympy.true)]
    while waiting:
        value, when = waiting.pop(0)
        if tensor_of(value, load) is not None:
            found[value] = sympy.Or(found.get(value, sympy.false), when)
        elif isinstance(value, sympy.Piecewise):
            before: Boolean = sympy.false
            for each, condition in value.args:
                waiting.append((each, sympy.And(when, condition, sympy.Not(before))))
                waiting.append((condition, when))
                before = sympy.Or(before, condition)
        else:
            waiting += [(each, when) for each in value.args]
    return found


def _is_safe(element: Element, load: LoadSpec, channels: int) -> bool:
    """True if an element may be read for all channels."""
    tensor = tensor_of(element, load)
    assert tensor is not None
    return in_range(tensor, indices_of(element), channels)


def _complement(
    element: Element, when: Boolean, others: Mapping[Element, Boolean]
) -> Element | None:
    """Return an element of the same tensor that counts for all other channels; None: there is none.

    Both conditions depend on the channel alone.
    """
    for other, condition in others.items():
        alike = isinstance(other, sympy.Indexed) and isinstance(element, sympy.Indexed)
        if not alike or other.base != element.base:
            continue
        if when.free_symbols | condition.free_symbols != {D}:
            continue
        if sympy.Equivalent(when, sympy.Not(condition)) == sympy.true:
            return other
    return None
