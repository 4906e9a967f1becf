"""Conditions on a key's slot that are bounds, and the range of slots that they leave a query."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.codegen.specification import KV, KV_LEN, H


@dataclass(frozen=True)
class KeyBound:
    """The bound kv <= key if `upper`, else kv >= key."""

    key: sympy.Expr
    upper: bool

    def __str__(self) -> str:
        return f"kv {'<=' if self.upper else '>='} {self.key}"


def key_bound(condition: Boolean) -> KeyBound | None:
    """Return a condition as a bound on kv; None if it is no bound."""
    if not isinstance(condition, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    greater, less = condition.gts, condition.lts
    room = sympy.expand(greater - less)  # at least 0, or more than 0
    times = room.coeff(KV, 1)
    rest = sympy.expand(room - times * KV)
    if KV in rest.free_symbols or times not in (1, -1):
        return None
    strict = int(isinstance(condition, (sympy.Lt, sympy.Gt)))
    if times == -1:
        return KeyBound((sympy.ceiling(rest) - 1) if strict else sympy.floor(rest), upper=True)
    return KeyBound((sympy.floor(-rest) + 1) if strict else sympy.ceiling(-rest), upper=False)


def visible_range(visible: Boolean) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Return the first slot that a query sees and the one after the last.

    The query sees all slots between them. None if holes are possible or heads see different slots.
    """
    if visible.has(H) or any(key_bound(condition) is None for condition in _conditions(visible)):
        return None
    return outer_range(visible)


def outer_range(visible: Boolean) -> tuple[sympy.Expr, sympy.Expr]:
    """Return bounds of the slots that a query sees: the first one and the one after the last.

    The query need not see all slots between them.
    """
    bounds = [key_bound(each) for each in _conditions(visible) if not each.has(H)]
    first = [bound.key for bound in bounds if bound and not bound.upper]
    ends = [bound.key + 1 for bound in bounds if bound and bound.upper]
    return sympy.Max(0, *first), sympy.Min(KV_LEN, *ends)


def _conditions(visible: Boolean) -> list[Boolean]:
    return [] if visible == sympy.true else list(sympy.And.make_args(visible))
