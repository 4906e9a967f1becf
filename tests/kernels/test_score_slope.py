"""Slopes of scores: known for those that grow with q.k alone."""

from __future__ import annotations

import pytest
import sympy

from lychee_compile.codegen.score_slope import score_slope
from lychee_compile.codegen.specification import KV, H, S

SLOPE = sympy.Indexed(sympy.IndexedBase("slopes"), H)


@pytest.mark.parametrize(
    ("score", "slope"),
    [
        (S, 1.0),
        (S / 8, 0.125),
        (0.5 * S + SLOPE * KV, 0.5),
        (30 * sympy.tanh(S / 240), 0.125),
        (sympy.tanh(S) + 3, 1.0),
        (-S, None),
        (0 * S + SLOPE, None),
        (S * SLOPE, None),
        (S**2 / 9, None),
        (S + sympy.exp(S), None),
        (-30 * sympy.tanh(-S / 60), 0.5),
        (-30 * sympy.tanh(S / 60), None),
        (sympy.tanh(S + 1), None),
        (S * sympy.oo, None),
    ],
)
def test_the_slope_of_a_score(score: sympy.Expr, slope: float | None) -> None:
    assert score_slope(score) == slope
