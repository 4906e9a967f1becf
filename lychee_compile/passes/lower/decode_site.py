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

import logging
import operator
from collections.abc import Callable
from dataclasses import replace

import sympy
import torch
import torch.fx
from torch import Tensor

from lychee_compile.codegen.specification import SparseSpec
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.gpu.cache_use import CacheUse
from lychee_compile.kernels.gpu.methods import layout_for
from lychee_compile.kernels.levels.groups import GroupSettings
from lychee_compile.kernels.operators import (  # noqa: F401  they register the operators
    decode,
    loaded_decode,
)
from lychee_compile.kernels.policies.registry import estimates_shares
from lychee_compile.kernels.sizes import MOST_DRAWN_FROM
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
    emit_loaded_operands,
    kernel_specification,
)
from lychee_compile.passes.lower.kernel_support import NoKernel, check_in_place, tokens_written
from lychee_compile.passes.lower.loads.computed_keys import computed_keys
from lychee_compile.passes.lower.loads.kernel_loads import is_loaded
from lychee_compile.passes.lower.rearrange import Rearranger
from lychee_compile.passes.lower.written_slots import named_slots

logger = logging.getLogger(__name__)


def emit_exact_decode(
    attention: Attention, context: LoweringContext, binding: CacheBinding | None = None
) -> tuple[torch.fx.Node, str]:
    """Emit a kernel that reads all visible keys; return the output and the kernel's name.

    If keys of the cache of `binding` are computed from what is stored, the kernel does that, unless
    it cannot: then the graph does. Raises `NoKernel` and `RewriteError`.
    """
    emit = context.emit
    if binding is not None and is_loaded(attention, binding):
        try:
            with emit.attempt():
                operands = emit_loaded_operands(attention, binding, emit)
                return emit_exact(attention, operands, context)
        except (NoKernel, RewriteError):
            logger.debug("%s: the graph computes its keys", attention.node, exc_info=True)
    return emit_exact(attention, _operands(attention, attention, emit), context)


def emit_exact(
    attention: Attention, operands: KernelOperands, context: LoweringContext
) -> tuple[torch.fx.Node, str]:
    """Emit a kernel that reads all keys; return the output and its name. Raises `NoKernel`."""
    kernel = compile_kernels(kernel_specification(attention, operands, context.autotune), operands)
    ops = torch.ops.lychee
    target = ops.exact_decode if operands.loads is None else ops.loaded_exact_decode
    attended = context.emit(target.default, *operands.arguments, kernel, *_extra_value(operands))
    return Canonicaliser(attention, context.emit).replacement(attended), kernel


def emit_sparse_decode(
    attention: Attention, binding: CacheBinding, context: LoweringContext
) -> tuple[torch.fx.Node, str]:
    """Emit a kernel that reads a cache through its index; return the output and the kernel's name.

    The first attention over a cache also adds the keys that this call writes to the index. Raises
    `NoKernel` and `RewriteError`.
    """
    emit = context.emit
    if is_loaded(attention, binding):
        operands = emit_loaded_operands(attention, binding, emit)
    else:
        cached = over_cache(attention, binding)
        operands = _operands(attention, cached, emit, binding.in_front)
    return emit_selecting(attention, binding, operands, context)


def emit_selecting(
    attention: Attention, binding: CacheBinding, operands: KernelOperands, context: LoweringContext
) -> tuple[torch.fx.Node, str]:
    """Emit a kernel that selects keys of a cache; return the output and the kernel's name.

    Raises `NoKernel` and `RewriteError`.
    """
    emit = context.emit
    exact = kernel_specification(attention, operands, context.autotune)
    spec = replace(exact, sparse=selection_of(context.config, attention.kv_len))
    written = tokens_written(binding)
    kernel = compile_kernels(spec, operands, written)
    use = _use_of(kernel, attention, binding, operands, context)
    index = context.index_inputs.node_for(binding, use)
    first = context.is_first_use(index)
    slots = _written_slots(binding, written, operands, emit) if first else None
    target = _operator(operands, grows=use.layout is None)
    last = module_path(attention.node), *_extra_value(operands)
    attended = emit(target, *operands.arguments, slots, index, kernel, *last)
    return Canonicaliser(attention, emit).replacement(attended), kernel


def _extra_value(operands: KernelOperands) -> tuple[torch.fx.Node, ...]:
    """Return the last argument of an operator, if there is a value of the extra logit."""
    value = operands.tensors.extra_value
    return () if value is None else (value,)


def _operator(operands: KernelOperands, *, grows: bool) -> Callable[..., Tensor]:
    """Return the operator of a step over a cache that grows, or does not."""
    ops = torch.ops.lychee
    if operands.loads is None:
        return (ops.growing_sparse_decode if grows else ops.sparse_decode).default
    return (ops.loaded_growing_decode if grows else ops.loaded_sparse_decode).default


def _use_of(
    kernel: str,
    attention: Attention,
    binding: CacheBinding,
    operands: KernelOperands,
    context: LoweringContext,
) -> CacheUse:
    """Return the use that a kernel makes of a cache. Raises `NoKernel`."""
    loads = operands.loads
    keys: Tensor | None
    if loads is not None and loads.keys is not None:
        keys_of, keys = computed_keys(binding, loads, context.emit), loads.shape_of_keys()
        whole = keys is not None
    else:
        keys_of, keys = shown_keys(over_cache(attention, binding), binding, context.emit)
        whole = _reads_all(value_of(operands.tensors.key), keys)
    fixed = binding.kind == "static" and whole and keys is not None
    layout = layout_for(kernel, keys) if fixed and keys is not None else None
    return CacheUse(kernel, keys_of, tokens_written(binding), layout, context.config.policy)


def selection_of(config: IndexConfig, kv_len: int | sympy.Expr) -> SparseSpec:
    """Return the part of a specification that says which of `kv_len` keys are read."""
    assert config.budget is not None
    too_long = isinstance(kv_len, int) and kv_len > MOST_DRAWN_FROM
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
        draws=config.draws(config.budget) and not too_long,
    )


def _operands(
    attention: Attention, cached: Attention, emit: Emitter, in_front: int = 0
) -> KernelOperands:
    """Emit the operands of a decode kernel, which must not be copies of a cache.

    `cached` is the attention over the keys behind those `in_front`. Raises `NoKernel`.
    """
    operands = emit_kernel_operands(attention, emit, in_front)
    check_in_place("keys", cached.key.node, operands.tensors.key)
    check_in_place("values", cached.value.node, operands.tensors.value)
    return operands


def shown_keys(
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
    binding: CacheBinding, written: int, operands: KernelOperands, emit: Emitter
) -> torch.fx.Node | None:
    """Emit the slots that this call writes, int64 [T]; None if it writes none.

    Those of a cache that grows are the last ones of the keys.
    """
    if binding.reads_only or binding.kind == "static":
        return named_slots(binding, emit)
    key, loads = operands.tensors.key, operands.loads
    kv_len = emit(torch.ops.aten.sym_size.int, key, 2) if loads is None else loads.sizes[2]
    first = emit(operator.sub, kv_len, written)
    device = value_of(key).device
    return emit(torch.ops.aten.arange.start, first, kv_len, device=device, dtype=torch.int64)
