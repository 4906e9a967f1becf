"""The operators for decoding by generated kernels, registered with PyTorch.

Each call names the generated module of its kernels (see `module_cache`). The module fixes
everything about the attention but its tensors. `captured` are the tensors that score and mask read,
in the module's order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from lychee_compile.kernels import handles
from lychee_compile.kernels.gpu.common.autotune import autotune
from lychee_compile.kernels.gpu.common.certificate import certifies, missed_of
from lychee_compile.kernels.gpu.common.launch_common import log_weight
from lychee_compile.kernels.gpu.common.launch_exact import log_weight_of_all, run_exact
from lychee_compile.kernels.gpu.common.launch_sparse import has_chosen, slots_read, watch
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.methods import gpu_method, layout_for
from lychee_compile.kernels.gpu.owners import GrowingCacheIndex
from lychee_compile.kernels.operators.fakes import fake_output
from lychee_compile.kernels.operators.observe import (
    KernelCall,
    kernel_observers,
    kernels_told,
    warn_of_recording,
)

KERNEL_DEVICES = {"cuda"}
"""Types of devices on which generated kernels decode."""


@torch.library.custom_op("lychee::exact_decode", mutates_args=())
def exact_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    kernel: str,
) -> Tensor:
    """Attend from `query` [B, Hq, T, D] to all visible `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    `value` is [B, Hkv, L, Dv]; `extra`, broadcastable to [B, Hq, T], is the logit of a key without
    a value.
    """
    return _exact(kernel, AttentionOperands(query, key, value, captured, extra))


exact_decode.register_fake(fake_output)


@torch.library.custom_op("lychee::sparse_decode", mutates_args=("state",))
def sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    state: Tensor,
    kernel: str,
    site: str = "",
    extra_value: Tensor | None = None,
) -> Tensor:
    """Attend from `query` [B, Hq, T, D] to the best of `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    `state`, uint8, is the memory of an index laid out for `key`. While the index is distrusted, all
    visible keys are read. `positions`, int [T] or [B, T], are the slots that were just written:
    their keys are added to the index. `site`, the module path of the attention, is for those who
    record what is read. `extra_value`, [B, Hq, T, Dv], is the value of the key whose logit is
    `extra`. Fit for CUDA graphs: it waits for nothing, and reads and writes its own tensors alone.
    """
    layout = layout_for(kernel, key)
    index = IndexOperands(layout, layout.views(state), positions)
    operands = AttentionOperands(query, key, value, captured, extra, extra_value)
    return _sparse(kernel, operands, index, site)


sparse_decode.register_fake(fake_output)


@torch.library.custom_op(
    "lychee::growing_sparse_decode",
    mutates_args=("handle",),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def growing_sparse_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    handle: Tensor,
    kernel: str,
    site: str = "",
    extra_value: Tensor | None = None,
) -> Tensor:
    """Run `sparse_decode` over a cache that grows, whose index is found by `handle`.

    CUDA graphs must leave it out: they would replay it with the index of their first call.
    """
    index = handles.find(handle, GrowingCacheIndex).index_for(key, positions)
    handle[1] += 1
    operands = AttentionOperands(query, key, value, captured, extra, extra_value)
    if index is None:
        kernels_told.set()
        return _exact(kernel, operands)
    return _sparse(kernel, operands, IndexOperands(index.layout, index.parts, positions), site)


growing_sparse_decode.register_fake(fake_output)


@torch.library.custom_op("lychee::loaded_sparse_decode", mutates_args=("state",))
def loaded_sparse_decode(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    sizes: list[int],
    captured: list[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    state: Tensor,
    kernel: str,
    site: str = "",
) -> Tensor:
    """Run `sparse_decode` over keys and values that kernels compute from what is stored.

    `key` and `value` are the tensors that they are computed from, in the module's order, or one
    tensor that holds them as they are. `sizes` are [B, Hkv, L, D, Dv].
    """
    operands = _loaded(kernel, query, key, value, sizes, captured, extra)
    layout = layout_for(kernel, operands.key)
    return _sparse(kernel, operands, IndexOperands(layout, layout.views(state), positions), site)


@torch.library.custom_op(
    "lychee::loaded_growing_decode",
    mutates_args=("handle",),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def loaded_growing_decode(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    sizes: list[int],
    captured: list[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    handle: Tensor,
    kernel: str,
    site: str = "",
) -> Tensor:
    """Run `loaded_sparse_decode` over a cache that grows, whose index is found by `handle`."""
    operands = _loaded(kernel, query, key, value, sizes, captured, extra)
    index = handles.find(handle, GrowingCacheIndex).index_for(operands.key, positions)
    handle[1] += 1
    if index is None:
        kernels_told.set()
        return _exact(kernel, operands)
    return _sparse(kernel, operands, IndexOperands(index.layout, index.parts, positions), site)


@torch.library.custom_op("lychee::loaded_exact_decode", mutates_args=())
def loaded_exact_decode(
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    sizes: list[int],
    captured: list[Tensor],
    extra: Tensor | None,
    kernel: str,
) -> Tensor:
    """Run `exact_decode` over keys and values that kernels compute from what is stored."""
    return _exact(kernel, _loaded(kernel, query, key, value, sizes, captured, extra))


def _fake_loaded(
    query: Tensor, key: list[Tensor], value: list[Tensor], sizes: list[int], *_: object, **__: object
) -> Tensor:  # fmt: skip
    return query.new_empty(*query.shape[:3], sizes[4])


loaded_sparse_decode.register_fake(_fake_loaded)
loaded_growing_decode.register_fake(_fake_loaded)
loaded_exact_decode.register_fake(_fake_loaded)


def _loaded(
    kernel: str,
    query: Tensor,
    key: list[Tensor],
    value: list[Tensor],
    sizes: list[int],
    captured: list[Tensor],
    extra: Tensor | None,
) -> AttentionOperands:
    """Return the operands of a launch; what kernels compute is told by its shape alone."""
    batch, heads, tokens, head_dim, value_dim = sizes
    shapes = {"key": (batch, heads, tokens, head_dim), "value": (batch, heads, tokens, value_dim)}
    given, loads = {"key": key, "value": value}, load(kernel).LOADS
    shown = {
        name: query.as_strided(shapes[name], (0, 0, 0, 0)) if name in loads else given[name][0]
        for name in given
    }
    parts = {name: given[name] if name in loads else () for name in given}
    return AttentionOperands(
        query, shown["key"], shown["value"], captured, extra,
        key_parts=parts["key"], value_parts=parts["value"],
    )  # fmt: skip


def _exact(kernel: str, operands: AttentionOperands) -> Tensor:
    module = load(kernel)
    run = partial(run_exact, module, operands)
    with torch.cuda.device_of(operands.query):
        autotune(module, "exact", run, operands)
        return run()


def _sparse(kernel: str, operands: AttentionOperands, index: IndexOperands, site: str) -> Tensor:
    module = load(kernel)
    run = partial(gpu_method(module.POLICY).run, module, operands, index)
    with torch.cuda.device_of(operands.query):
        autotune(module, "sparse", run, operands, index.state.header)
        return _observed(module, operands, run, site) if kernel_observers else run()


def _observed(
    module: ModuleType, operands: AttentionOperands, run: Callable[[], Tensor], site: str
) -> Tensor:
    """Run the kernels and tell the observers what they read, unless a CUDA graph captures them.

    A call that reads all keys, since there is no index yet, is not told: nothing is chosen.
    """
    if operands.query.is_cuda and torch.cuda.is_current_stream_capturing():
        return run()
    kernels_told.set()
    with watch() as steps:
        output = run()
    if not steps:
        warn_of_recording()  # a method that launches all by itself
    elif has_chosen(steps[-1]):
        log_all = partial(log_weight_of_all, module, operands)
        log_read = log_weight(operands, steps[-1].scratch)
        missed = missed_of(operands, steps[-1].scratch) if certifies(module) else None
        call = KernelCall(site, slots_read(steps[-1]), log_read, log_all, missed)
        for observer in kernel_observers:
            observer(call)
    return output
