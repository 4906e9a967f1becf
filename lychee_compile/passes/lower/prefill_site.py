"""Emit sparse attention in the place of one prefill, encoder or vision transformer.

No state is kept: one operator chooses keys and attends. Three are shown: by generated kernels
alone, by a choice in PyTorch and generated kernels, and by the reference. `order` is that of
patches in blocks, if queries are patches:

    out = tiled_prefill(q, k, v, [], None, order, "causal", scale, 0.2, None, 16384, "prefill_...")
    out = listed_prefill(q, k, v, [mask], None, None, "", scale, 0.2, 16384, "prefill_s2o_...")
    out = sparse_prefill(q, k, v, mask, None, order, causal, scale, None, "lychee", 0.2, None, ...)
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
import torch.fx

from lychee_compile.codegen.module import chooses_by_kernels
from lychee_compile.codegen.specification import KV, Q, S, TileSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators import prefill  # noqa: F401  registers the operators
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.masks.reading import Reading
from lychee_compile.passes.graph.dataflow import module_path, value_of
from lychee_compile.passes.lower.canonical import Canonicaliser
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.kernel_expressions import KernelExpressions
from lychee_compile.passes.lower.kernel_modules import compile_kernels
from lychee_compile.passes.lower.kernel_operands import (
    KernelOperands,
    emit_kernel_operands,
    kernel_specification,
)
from lychee_compile.passes.lower.patch_grids import Grid

REFERENCE_OPERATOR = "lychee::sparse_prefill (reference)"


def emit_prefill_reference(
    attention: Attention, grid: Grid | None, context: LoweringContext
) -> torch.fx.Node:
    """Emit the reference's sparse attention and return its output. Raises `RewriteError`."""
    emit, config, score = context.emit, context.config, attention.score
    canonical = Canonicaliser(attention, emit)
    plainly_causal = Reading(attention).is_plainly_causal
    operands = canonical.operands(masked=not plainly_causal)
    attended = emit(
        torch.ops.lychee.sparse_prefill.default,
        operands.query, operands.key, operands.value, operands.mask, operands.extra,
        _order(grid, operands.query, context),
        plainly_causal or attention.is_causal, score.scale, score.softcap,
        config.policy, float(config.prefill_budget), _coverage(config), config.sinks,
        config.recent, config.epsilon,
        config.prefill_from, module_path(attention.node),
    )  # fmt: skip
    return canonical.replacement(attended)


def emit_prefill_kernels(
    attention: Attention, grid: Grid | None, context: LoweringContext
) -> tuple[torch.fx.Node, str, Grid | None]:
    """Emit generated kernels; return the output, the kernels' name, and the grid if it is used.

    No grid is used, and queries stay in their order, if score or mask depend on their positions.
    Raises `NoKernel` and `RewriteError`.
    """
    emit, config = context.emit, context.config
    operands = emit_kernel_operands(attention, emit)
    spec = kernel_specification(attention, operands, context.autotune)
    grid = None if _depends_on_query_position(operands.expressions) else grid
    tiles = TileSpec(config.policy, config.sinks, config.recent, ordered=grid is not None)
    spec = replace(spec, tiles=tiles)
    by_kernels = chooses_by_kernels(spec)
    operator = torch.ops.lychee.tiled_prefill if by_kernels else torch.ops.lychee.listed_prefill
    covers = (_coverage(config),) if by_kernels else ()
    kernel = compile_kernels(spec, operands)
    attended = emit(
        operator.default,
        *operands.arguments, _order(grid, operands.tensors.query, context),
        _plain_form(operands), attention.score.scale, float(config.prefill_budget), *covers,
        config.prefill_from, kernel,
    )  # fmt: skip
    return Canonicaliser(attention, emit).replacement(attended), kernel, grid


def _coverage(config: IndexConfig) -> float | None:
    """Return the coverage at which choosing ends; None if that is all, or the budget ends it."""
    return None if config.prefill_coverage == 1 else config.prefill_coverage


def _order(
    grid: Grid | None, query: torch.fx.Node, context: LoweringContext
) -> torch.fx.Node | None:
    """Emit the order in which the queries of a grid are read, int64 [T]; None: as they come."""
    return None if grid is None else context.orders(grid, value_of(query).device)


def _depends_on_query_position(expressions: KernelExpressions) -> bool:
    return Q in expressions.score.free_symbols | expressions.visible.free_symbols


def _plain_form(operands: KernelOperands) -> str:
    """Return "all" or "causal" if the attention is one of PyTorch's own, else "".

    Scores are only scaled then. Every query sees all keys, or the keys up to its own position.
    """
    expressions = operands.expressions
    scaled = not expressions.score.diff(S).free_symbols and expressions.score.subs(S, 0) == 0
    if operands.tensors.extra is not None or not scaled:
        return ""
    if expressions.visible == sympy.true:
        return "all"
    canonical = getattr(expressions.visible, "canonical", None)
    return "causal" if canonical == (KV <= Q).canonical else ""
