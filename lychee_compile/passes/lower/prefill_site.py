"""The generated kernels of one whole sequence: their specification and operands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch.fx

from lychee_compile.codegen.specification import KV, Q, S, TileSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.canonical import Canonical
from lychee_compile.passes.lower.decode_site import emit_operands, made, specification
from lychee_compile.passes.lower.kernel_expressions import KernelExpressions

TILE_KERNELS = ("lychee",)
"""Policies whose choice for whole sequences has kernels."""


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


def tile_site(
    attention: Attention, config: IndexConfig, emit: Emitter, autotune: bool = False
) -> TileSite:
    """The kernels for `attention`. Emits its operands, before it.

    With `autotune` tile sizes are measured at the first call. Raises `NoKernel`.
    """
    terms, given = emit_operands(attention, emit)
    tiles = TileSpec(config.sinks, config.recent)
    spec = replace(specification(attention, terms, given), tiles=tiles, autotune=autotune)
    kernel = made(spec, terms, given)
    placed = (terms.score.free_symbols | terms.visible.free_symbols) & {Q}
    plain = "" if given.extra is not None else _plain(terms)
    return TileSite(kernel, given, terms.nodes, plain, not placed)


def _plain(terms: KernelExpressions) -> str:
    """Which of PyTorch's own attentions it is; empty: none."""
    if terms.score.diff(S).free_symbols or terms.score.subs(S, 0) != 0:
        return ""
    if terms.visible == sympy.true:
        return "all"
    canonical = getattr(terms.visible, "canonical", None)
    return "causal" if canonical == (KV <= Q).canonical else ""
