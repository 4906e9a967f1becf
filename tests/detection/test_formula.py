"""Expressions as the report writes them."""

from __future__ import annotations

import pytest
import sympy

from lychee_compile.codegen.specification import KV, Q
from lychee_compile.passes.detect.formula import formula
from lychee_compile.passes.symbolic.elementwise import Flag

PAD = Flag(sympy.Indexed("pad", KV))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (KV <= Q, "kv <= q"),
        (sympy.Eq(KV % 2, Q % 2), "kv % 2 == q % 2"),
        (sympy.Ne(sympy.Mod(KV + Q, 3), 0), "(kv + q) % 3 != 0"),
        (sympy.Eq(3 * sympy.Mod(KV, 5, evaluate=False), Q), "3*(kv % 5) == q"),
        (sympy.Or(sympy.Eq(KV, 0), KV > Q), "(kv == 0) | (kv > q)"),
        (sympy.And(sympy.Not(PAD), KV < 4), "(kv < 4) & ~pad[kv]"),
    ],
)
def test_it_reads_as_python(expression: sympy.Basic, text: str) -> None:
    assert formula(expression) == text
