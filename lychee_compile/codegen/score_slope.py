"""Slope of a score: how fast it grows with q.k, if it never falls.

A bound of q.k is then a bound of the score, which is what certificates need.
"""

from __future__ import annotations

import sympy

from lychee_compile.codegen.specification import S


def score_slope(score: sympy.Expr) -> float | None:
    """Return the largest slope of `score` in S; None if it is not known to grow with S.

    Known are a * S and c * tanh(a * S) with positive numbers a and c, and what is added to either.
    """
    parts = [each for each in sympy.Add.make_args(score) if each.has(S)]
    if len(parts) != 1:
        return None
    factor, rest = parts[0].as_coeff_Mul()
    if isinstance(rest, sympy.tanh):
        inner, rest = rest.args[0].as_coeff_Mul()
        factor *= inner if inner.is_positive else -1
    positive = rest == S and factor.is_number and factor.is_positive and factor.is_finite
    return float(factor) if positive else None
