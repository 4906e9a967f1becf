"""Kernels for a prefill whose policy chooses in PyTorch: one without kernels for such a mask.

`see_tiles`   what the queries of a tile see, and what the mask adds to their scores
`list_keys`   the slots of the keys that a tile reads
`attend`      attention of a tile over that list and over the keys that it always reads

Between `see_tiles` and `list_keys` the policy's own function, which is its plain form too, answers
a `PrefillQuestion` on the device. The question needs the score as a scaled and perhaps soft-capped
product and a bias: `split_score` tells if it is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from lychee_compile.codegen.parts.prefill import emit_attend
from lychee_compile.codegen.parts.site import fill
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec, H, S


@dataclass(frozen=True)
class SplitScore:
    """A score softcap tanh(scale s / softcap) + bias; without a soft-cap, scale s + bias."""

    scale: float
    softcap: float | None
    bias: sympy.Expr


def split_score(score: sympy.Expr) -> SplitScore | None:
    """Return the parts of a score; None if it is of another form."""
    terms = sympy.Add.make_args(sympy.expand(score))
    products = [each for each in terms if each.has(S)]
    bias = sympy.Add(*(each for each in terms if not each.has(S)))
    if len(products) != 1:
        return None
    factor, rest = products[0].as_independent(S)
    if factor.is_number and rest == S:
        return SplitScore(float(factor), None, bias)
    if not (factor.is_number and isinstance(rest, sympy.tanh)):
        return None
    inner = rest.args[0].coeff(S, 1)
    if not inner.is_number or sympy.expand(rest.args[0] - inner * S) != 0:
        return None
    return SplitScore(float(factor * inner), float(factor), bias)


def emit_terms_of_scores(spec: AttentionSpec) -> str:
    """Return the constants of a score: its scale, its soft-cap, and if it has a bias.

    Raises ValueError for a score that `split_score` does not understand.
    """
    split = split_score(spec.score)
    if split is None:
        raise ValueError(f"no policy without kernels of its own ranks keys by {spec.score}")
    return fill(
        "prefill/listed_constants.py.jinja",
        spec,
        scale=split.scale,
        softcap=split.softcap,
        biased=split.bias != 0,
        by_head=spec.visible.has(H) or split.bias.has(H),
    )


def emit_listed(spec: AttentionSpec) -> list[str]:
    """Return the functions and kernels of a prefill, but for its mask and score.

    Raises ValueError for a score that `split_score` does not understand.
    """
    terms, split = emit_terms_of_scores(spec), split_score(spec.score)
    return [
        terms,
        fill("prefill/edges.py.jinja", spec),
        fill("prefill/see_tiles.py.jinja", spec, biased=split is not None and split.bias != 0),
        *library("prefill", "load_edges", "list_keys"),
        *emit_attend(spec, listed=True),
    ]
