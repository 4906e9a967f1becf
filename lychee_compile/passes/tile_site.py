"""The generated kernels of one whole sequence: their specification and operands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch.fx

from lychee_compile.codegen.specification import KV, Q, S, TileSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.passes.attention import Attention
from lychee_compile.passes.canonical import Canonical, Canonicaliser
from lychee_compile.passes.check import RewriteError
from lychee_compile.passes.kernel_site import made, specification
from lychee_compile.passes.kernel_support import NoKernel, check_supported
from lychee_compile.passes.kernel_terms import KernelTerms, kernel_terms
from lychee_compile.passes.rearrange import Emitter

TILE_KERNELS = ("lychee",)
"""Policies whose choice for whole sequences has kernels."""
_REFERENCE = "reference=True runs it slowly, in plain PyTorch"


@dataclass(frozen=True)
class TileSite:
    """What takes the place of one attention over a whole sequence."""

    kernel: str
    """The generated module."""
    given: Canonical
    captured: tuple[torch.fx.Node, ...]
    plain: str
    """"all" or "causal" where scores are only scaled and every query sees all keys, or those up to
    it; else empty."""
    any_order: bool
    """Whether queries may be taken in another order: nothing depends on where they are."""


def no_tile_kernel(config: IndexConfig) -> str | None:
    """Why no kernel reads whole sequences as the options ask for."""
    given = ""
    if config.policy not in TILE_KERNELS:
        given, known = f"policy={config.policy!r}", " and ".join(map(repr, TILE_KERNELS))
    elif config.epsilon is not None:
        given, known = f"epsilon={config.epsilon:g}", "None"
    if not given:
        return None
    return f"option {given} has no kernel for whole sequences: {known} has one; {_REFERENCE}"


def tile_site(attention: Attention, config: IndexConfig, emit: Emitter) -> TileSite:
    """The kernels for `attention`. Emits its operands, before it. Raises `NoKernel`."""
    check_supported(attention)
    canonical = Canonicaliser(attention, emit)
    try:
        with emit.graph.inserting_before(attention.node):
            terms = kernel_terms(attention, canonical)
            given = canonical.operands(masked=False)
    except RewriteError as error:
        raise NoKernel(str(error)) from error
    spec = specification(attention, terms, given)
    kernel = made(replace(spec, tiles=TileSpec(config.sinks, config.recent)), terms, given)
    placed = (terms.score.free_symbols | terms.visible.free_symbols) & {Q}
    plain = "" if given.extra is not None else _plain(terms)
    return TileSite(kernel, given, terms.nodes, plain, not placed)


def _plain(terms: KernelTerms) -> str:
    """Which of PyTorch's own attentions it is; empty: none."""
    if terms.score.diff(S).free_symbols or terms.score.subs(S, 0) != 0:
        return ""
    if terms.visible == sympy.true:
        return "all"
    canonical = getattr(terms.visible, "canonical", None)
    return "causal" if canonical == (KV <= Q).canonical else ""
