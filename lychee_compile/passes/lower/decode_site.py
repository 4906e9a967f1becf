"""Emit a generated decode kernel in the place of one attention.

Before, one decoding step over a static cache:

    k = index_copy_(k_cache, 2, positions, k_new)
    out = scaled_dot_product_attention(q, k, v, mask)

After, with a sparse kernel or with an exact one; `index` is the memory of the index of `k_cache`:

    out = sparse_decode(q, k, v, [length], None, positions, index, "decode_lychee_bf16_g4_d128_...")
    out = exact_decode(q, k, v, [length], None, "decode_exact_bf16_g4_d128_...")

Everything that a launch needs is checked here, while the graph is compiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.fx
from torch import Tensor

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.lifecycle import CacheUse
from lychee_compile.kernels.gpu.methods import layout_for, measures_for_certificates
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.operators import decode  # noqa: F401  registers the operators
from lychee_compile.kernels.policies.registry import estimates_shares
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.caching.memory_keys import over_cache
from lychee_compile.passes.detect.operands import Operand
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import module_path, outputs_of, static_size, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.canonical import Canonicaliser
from lychee_compile.passes.lower.context import LoweringContext
from lychee_compile.passes.lower.kernel_modules import compile_kernels
from lychee_compile.passes.lower.kernel_operands import (
    KernelOperands,
    emit_kernel_operands,
    kernel_specification,
)
from lychee_compile.passes.lower.kernel_support import NoKernel, tokens_written
from lychee_compile.passes.lower.rearrange import Rearranger
from lychee_compile.passes.lower.written_slots import named_slots
from lychee_compile.torch_private import share_storage


def emit_exact_decode(attention: Attention, context: LoweringContext) -> tuple[torch.fx.Node, str]:
    """Emit a kernel that reads all visible keys; return the output and the kernel's name.

    Raises `NoKernel` and `RewriteError`.
    """
    emit = context.emit
    operands = _operands(attention, attention, emit)
    spec = kernel_specification(attention, operands, context.autotune)
    kernel = compile_kernels(spec, operands)
    attended = emit(torch.ops.lychee.exact_decode.default, *operands.arguments, kernel)
    return Canonicaliser(attention, emit).replacement(attended), kernel


def emit_sparse_decode(
    attention: Attention, binding: CacheBinding, context: LoweringContext
) -> tuple[torch.fx.Node, str]:
    """Emit a kernel that reads a cache through its index; return the output and the kernel's name.

    The first attention over a cache also adds the keys that this call writes to the index. Raises
    `NoKernel` and `RewriteError`.
    """
    emit = context.emit
    cached = over_cache(attention, binding)
    operands = _operands(attention, cached, emit, binding.in_front)
    exact = kernel_specification(attention, operands, context.autotune)
    spec = replace(exact, sparse=_selection(context.config))
    keys_of, keys = _shown_keys(cached, binding, emit)
    written = tokens_written(binding)
    kernel = compile_kernels(spec, operands, written)
    fixed = binding.kind == "static" and _reads_all(value_of(operands.tensors.key), keys)
    layout = layout_for(kernel, keys) if fixed else None
    policy, epsilon = context.config.policy, context.config.epsilon
    measured = epsilon is not None and measures_for_certificates(policy)
    use = CacheUse(kernel, keys_of, written, layout, policy, measured)
    index = context.index_inputs.node_for(binding, use)
    first = context.is_first_use(index)
    slots = _written_slots(binding, written, operands.tensors.key, emit) if first else None
    ops = torch.ops.lychee
    target = ops.growing_sparse_decode if layout is None else ops.sparse_decode
    site = module_path(attention.node)
    more = operands.tensors.extra_value
    last = (site,) if more is None else (site, more)
    attended = emit(target.default, *operands.arguments, slots, index, kernel, *last)
    return Canonicaliser(attention, emit).replacement(attended), kernel


def _selection(config: IndexConfig) -> SparseSpec:
    """Return the part of a specification that says which keys are read."""
    assert config.budget is not None
    return SparseSpec(
        policy=config.policy,
        budget=config.budget,
        sinks=config.sinks,
        recent=config.recent,
        overfetch=config.overfetch,
        flat_tokens=config.flat_tokens,
        coverage=None
        if not estimates_shares(config.policy) or config.coverage == 1
        else config.coverage,
        groups=GroupSettings.of(config),
        epsilon=config.epsilon,
        draws=config.draw,
    )


def _operands(
    attention: Attention, cached: Attention, emit: Emitter, in_front: int = 0
) -> KernelOperands:
    """Emit the operands of a decode kernel, which must not be copies of a cache.

    To bring a cache into another layout at every step would cost more than a kernel wins. `cached`
    is the attention over the keys behind those `in_front`. Raises `NoKernel`.
    """
    operands = emit_kernel_operands(attention, emit, in_front)
    for name, operand, node in (
        ("keys", cached.key, operands.tensors.key),
        ("values", cached.value, operands.tensors.value),
    ):
        if not share_storage(value_of(operand.node), value_of(node)):
            raise NoKernel(reasons.COPIED_OPERAND(name=name))
    return operands


def _shown_keys(
    attention: Attention, binding: CacheBinding, emit: Emitter
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a function that views a cache as [B, Hkv, L, D], and its result for the fake cache.

    Raises `NoKernel` if no view does that.
    """
    (form,) = [each for each in attention.key_forms if each.node is binding.key][:1]
    graph = torch.fx.Graph()
    cache = graph.placeholder("cache")
    cache.meta["val"] = value_of(_cache_left(binding, emit.graph))
    show = Rearranger(Emitter(graph, emit.mode), attention.axes, lambda _: None)
    try:
        shown = show(Operand(cache, form.layout), attention.roles.key_layout(), whole=True)
    except RewriteError as error:
        raise NoKernel(reasons.CACHE_LAYOUT(error=error.reason.words)) from error
    graph.output(shown)
    return torch.fx.GraphModule({}, graph), value_of(shown)


def _cache_left(binding: CacheBinding, graph: torch.fx.Graph) -> torch.fx.Node:
    """Return the node that is the whole cache after the call."""
    if binding.kind == "dynamic":
        return binding.key
    left = binding.source if binding.output is None else outputs_of(graph)[binding.output]
    assert isinstance(left, torch.fx.Node)
    return left


def _reads_all(key: Tensor, cache: Tensor) -> bool:
    """True if the graph reads all of a cache, whose size is known when compiling."""
    return all(
        static_size(size) is not None and size == other
        for size, other in zip(cache.shape, key.shape, strict=True)
    )


def _written_slots(
    binding: CacheBinding, written: int, key: torch.fx.Node, emit: Emitter
) -> torch.fx.Node | None:
    """Emit the slots that this call writes, int64 [T]; None if it writes none.

    Those of a cache that grows are the last ones of `key` [B, Hkv, L, D].
    """
    if binding.reads_only or binding.kind == "static":
        return named_slots(binding, emit)
    kv_len = emit(torch.ops.aten.sym_size.int, key, 2)
    first = emit(operator.sub, kv_len, written)
    device = value_of(key).device
    return emit(torch.ops.aten.arange.start, first, kv_len, device=device, dtype=torch.int64)
