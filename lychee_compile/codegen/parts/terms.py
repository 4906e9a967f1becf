"""Score and mask of a site as Triton functions, and how kernels hand them what they read."""

from __future__ import annotations

import math

import sympy

from lychee_compile.codegen.bounds import outer_range, visible_range
from lychee_compile.codegen.printer import print_expression
from lychee_compile.codegen.specification import AttentionSpec


def captured_names(spec: AttentionSpec) -> list[str]:
    """Names of the parameters that captured tensors take: each a pointer and its strides."""
    return [
        name
        for each in spec.captured
        for name in (each.name, *(f"{each.name}_stride_{dim}" for dim in range(each.rank)))
    ]


def captured(spec: AttentionSpec) -> str:
    """The captured tensors at the end of a list of parameters or arguments."""
    return "".join(f", {name}" for name in captured_names(spec))


def emit_range(spec: AttentionSpec) -> str:
    """`seen_range`, where what a query sees is a range of slots; nothing otherwise.

    Tiles of queries have one in any case: of what they may see.
    """
    found = outer_range(spec.visible) if spec.tiles else visible_range(spec.visible)
    if found is None:
        return ""
    known = {each.name: each for each in spec.captured}
    first, end = (print_expression(each, known) for each in found)
    first = first if found[0] != 0 else "tl.full([], 0, tl.int32)"
    said = "First slot that query q sees, and the one after its last: it sees all between."
    if not sees_range(spec):
        said = "First slot that query q may see, and the one after its last."
    return f'''
@triton.jit
def seen_range(b, q, kv_len{captured(spec)}):
    """{said}"""
    first = {first}
    end = {end}
    return first.to(tl.int32), tl.maximum(first, end).to(tl.int32)
'''


def sees_range(spec: AttentionSpec) -> bool:
    """Whether what a query sees is a range of slots, the same for all heads."""
    return visible_range(spec.visible) is not None


def indented(text: str, by: int) -> str:
    """Every line of a piece of source further in."""
    return "\n".join(" " * by + line if line else line for line in text.split("\n"))


def emit_terms(spec: AttentionSpec) -> str:
    """The functions `visible` and `score`."""
    known = {each.name: each for each in spec.captured}
    visible = print_expression(spec.visible, known, mask="inside")
    score = print_expression(spec.score * sympy.Float(math.log2(math.e)), known, mask="inside")
    return f'''
@triton.jit
def visible(b, h, q, kv, kv_len, inside{captured(spec)}):
    """Which keys of the slots kv [1, N] the query heads h [ROWS, 1] see, of those `inside`."""
    return {"inside" if visible == "True" else f"inside & ({visible})"}


@triton.jit
def score(s, b, h, q, kv, inside{captured(spec)}):
    """What a product s [ROWS, N] of query and key is to the softmax, in bits."""
    return {score}
'''
