"""Operands of a generated kernel for one attention, and the specification of the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from lychee_compile.codegen.specification import AttentionSpec
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser, emit_behind_front
from lychee_compile.passes.lower.kernel_expressions import KernelExpressions, kernel_expressions
from lychee_compile.passes.lower.kernel_support import NoKernel, static
from lychee_compile.passes.lower.loads.kernel_loads import KernelLoads, kernel_loads


@dataclass(frozen=True)
class KernelOperands:
    """Everything that a generated kernel reads, and the expressions it computes."""

    expressions: KernelExpressions
    tensors: Canonical
    """Query, keys, values and extra logit. The first tensor of those that keys or values are
    computed from stands for them, if kernels do that."""
    loads: KernelLoads | None = None
    """Keys and values that kernels compute; None: both are tensors as they are."""

    @property
    def arguments(self) -> tuple[object, ...]:
        """The leading arguments of an operator that runs a generated kernel."""
        tensors, captured, loads = self.tensors, list(self.expressions.nodes), self.loads
        if loads is not None:
            parts = loads.key_nodes, loads.value_nodes, [*loads.sizes, *loads.numbers]
            return tensors.query, *parts, captured, tensors.extra
        return tensors.query, tensors.key, tensors.value, captured, tensors.extra


def emit_kernel_operands(attention: Attention, emit: Emitter, in_front: int = 0) -> KernelOperands:
    """Emit what a kernel for `attention` reads. Raises `NoKernel`.

    The first `in_front` keys are no keys of the kernel, but an extra logit with a value.
    """
    canonical = Canonicaliser(attention, emit)
    try:
        expressions = kernel_expressions(attention, canonical)
        if in_front:
            behind = expressions.behind(in_front)
            return KernelOperands(behind, emit_behind_front(attention, emit))
        return KernelOperands(expressions, canonical.operands(masked=False))
    except RewriteError as error:
        raise NoKernel(error.reason) from error


def emit_loaded_operands(
    attention: Attention, binding: CacheBinding, emit: Emitter
) -> KernelOperands:
    """Emit what a kernel reads that computes keys or values of `attention`. Raises `NoKernel`."""
    canonical = Canonicaliser(attention, emit)
    try:
        expressions = kernel_expressions(attention, canonical)
        query, _, extra = canonical.question(masked=False)
        loads = kernel_loads(attention, binding, canonical)
    except RewriteError as error:
        raise NoKernel(error.reason) from error
    first = loads.key_nodes[0], loads.value_nodes[0]
    return KernelOperands(expressions, Canonical(query, *first, mask=None, extra=extra), loads)


def kernel_specification(
    attention: Attention, operands: KernelOperands, autotune: bool
) -> AttentionSpec:
    """Return what an exact kernel for `attention` is generated from. Raises `NoKernel`."""
    expressions, tensors = operands.expressions, operands.tensors
    return AttentionSpec(
        dtype=str(value_of(tensors.query).dtype).removeprefix("torch."),
        group=static(attention.size(attention.roles.group), "the number of query heads"),
        head_dim=static(attention.size(attention.roles.head_dim), "the size of a key"),
        value_dim=static(attention.size(attention.roles.value_dim), "the size of a value"),
        score=expressions.score,
        visible=expressions.visible,
        captured=expressions.captured,
        extra=tensors.extra is not None,
        extra_value=tensors.extra_value is not None,
        autotune=autotune,
        keys=None if operands.loads is None else operands.loads.keys,
        values=None if operands.loads is None else operands.loads.values,
    )
