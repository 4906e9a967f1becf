"""The beginning of every module: its heading, and the site's mask and score as functions."""

from __future__ import annotations

import math

import sympy

from lychee_compile.codegen.bounds import outer_range, visible_range
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.printer import print_expression
from lychee_compile.codegen.specification import AttentionSpec


def emit_heading(spec: AttentionSpec) -> str:
    """Return the docstring and the imports of a module."""
    return fill(
        "common/heading.py.jinja",
        spec,
        kind="Decode attention" if spec.tiles is None else "Prefill attention",
        name=spec.name.replace("_", " "),
        visible="all keys" if spec.visible == sympy.true else spec.visible,
        score=spec.score,
        policy=repr(spec.policy).replace("'", '"'),
        names=", ".join(f'"{each.name}"' for each in spec.captured),
    )


def emit_terms(spec: AttentionSpec) -> list[str]:
    """Return `visible` and `score`, and `seen_range` if there is one."""
    known = {each.name: each for each in spec.captured}
    bits = print_expression(spec.score * sympy.Float(math.log2(math.e)), known, mask="inside")
    seen = print_expression(spec.visible, known, mask="inside")
    terms = fill("common/terms.py.jinja", spec, seen="" if seen == "True" else seen, bits=bits)
    slots = outer_range(spec.visible) if spec.tiles else visible_range(spec.visible)
    if slots is None:
        return [terms]
    first, end = (print_expression(each, known) for each in slots)
    first = "tl.full([], 0, tl.int32)" if slots[0] == 0 else first
    return [terms, fill("common/seen_range.py.jinja", spec, first=first, end=end)]
