"""Kernels of certificates: bounds of what a step has not read, and what follows from them."""

from __future__ import annotations

import math

import torch

from lychee_compile.codegen.bound_source import bound_source
from lychee_compile.codegen.forms import Unprintable
from lychee_compile.codegen.parts.site import fill, precision
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.score_slope import score_slope
from lychee_compile.codegen.specification import KV, AttentionSpec
from lychee_compile.kernels.levels.declaration import LevelStack, Pages
from lychee_compile.kernels.reference.nodes import rounding_slack
from lychee_compile.kernels.sizes import SLOT_BITS, power_of_two

LOOSER = 4
"""Relative error of kernels, in those of a float32 inner product: tensor cores round sums down, and
exponentials are approximate."""
BOUNDED_AT_ONCE = 512
"""Slots whose marks a program reads at a time, unless so few groups are no tile of a product."""


def emit_of_levels(spec: AttentionSpec, stack: LevelStack) -> list[str]:
    """Return the kernels of certificates by the bound of the groups of the last level, or none.

    Raises Unprintable for a stack or a score without a bound.
    """
    if spec.sparse is None or spec.sparse.epsilon is None:
        return []
    if not stack.has_bound:
        raise Unprintable("the last level has neither pages nor chunks with a bound")
    last = stack.levels[-1]
    assert last.bound is not None
    even, (shortest, longest) = isinstance(last.groups, Pages), spec.sparse.groups.chunk
    size = last.groups.size if even else power_of_two(longest)
    at_once = max(16, min(BOUNDED_AT_ONCE // size, 32))
    source = bound_source(last, precision(spec), _slope(spec), spec.head_dim)
    read = {each.name for each in last.bound.free_symbols}
    fields = [(name, wide) for name, wide in last.channels.items() if name in read]
    bound = fill(
        "levels/bound_unread.py.jinja",
        spec,
        size=size,
        even=even,
        at_once=at_once,
        by_slot=KV in spec.score.free_symbols,
        fields=fields,
        names=", ".join(f"summary_{name}" for name, _ in fields) + ",",
        bound=source.bound,
        terms=source.terms,
    )
    return [
        emit_constants(spec, at_once * (size if even else shortest)),
        *emit_certificate(spec, bound),
    ]


def emit_constants(spec: AttentionSpec, at_once: int) -> str:
    """Return the constants of certificates; `bound_unread` takes so many slots at a time.

    Raises Unprintable for a score that may fall as q.k grows.
    """
    assert spec.sparse is not None
    assert spec.sparse.epsilon is not None
    return fill(
        "decode/certificate.py.jinja",
        spec,
        epsilon=_rounded_down(spec.sparse.epsilon),
        slack=LOOSER * rounding_slack(spec.head_dim),
        slope=_slope(spec) * math.log2(math.e),
        at_once=at_once,
    )


def emit_certificate(spec: AttentionSpec, bound_unread: str) -> list[str]:
    """Return the kernels of certificates around `bound_unread`."""
    assert spec.sparse is not None
    assert spec.sparse.epsilon is not None
    again = fill("decode/read_uncertified.py.jinja", spec) if spec.sparse.epsilon < 1 else ""
    return [
        fill("decode/mark_read.py.jinja", spec, slot_bits=SLOT_BITS),
        bound_unread,
        *library("certificate", "certify"),
        *filter(None, [again]),
    ]


def _slope(spec: AttentionSpec) -> float:
    slope = score_slope(spec.score)
    if slope is None:
        raise Unprintable(f"the score {spec.score} is not known to grow with q.k")
    return slope


def _rounded_down(number: float) -> float:
    """Return the largest float32 number that is not above a positive number."""
    found = torch.tensor(number, dtype=torch.float32, device="cpu")
    if found.item() > number:
        found = torch.nextafter(found, torch.zeros((), device="cpu"))
    return found.item()
