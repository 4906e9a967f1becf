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
    extra_value: Tensor | None = None,
) -> Tensor:
    """Attend from `query` [B, Hq, T, D] to all visible `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    `value` is [B, Hkv, L, Dv]; `extra`, broadcastable to [B, Hq, T], is the logit of one more key,
    and `extra_value`, [B, Hq, T, Dv], its value; None: it has none.
    """
    operands = AttentionOperands(query, key, value, captured, extra, extra_value)
    return run_exact_kernel(kernel, operands)


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
    operands = AttentionOperands(query, key, value, captured, extra, extra_value)
    return run_static_kernel(kernel, operands, state, positions, site)


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
    operands = AttentionOperands(query, key, value, captured, extra, extra_value)
    return run_growing_kernel(kernel, operands, handle, positions, site)


growing_sparse_decode.register_fake(fake_output)


def run_static_kernel(
    kernel: str, operands: AttentionOperands, state: Tensor, positions: Tensor | None, site: str
) -> Tensor:
    """Return attention over a cache whose index lies in the memory `state`."""
    layout = layout_for(kernel, operands.key)
    index = IndexOperands(layout, layout.views(state), positions)
    return run_sparse_kernel(kernel, operands, index, site)


def run_growing_kernel(
    kernel: str, operands: AttentionOperands, handle: Tensor, positions: Tensor | None, site: str
) -> Tensor:
    """Return attention over a cache whose index is found by `handle`, over all keys without one."""
    index = handles.find(handle, GrowingCacheIndex).index_for(operands.key, positions)
    handle[1] += 1
    if index is None:
        kernels_told.set()
        return run_exact_kernel(kernel, operands)
    used = IndexOperands(index.layout, index.parts, positions)
    return run_sparse_kernel(kernel, operands, used, site)


def run_exact_kernel(kernel: str, operands: AttentionOperands) -> Tensor:
    """Return attention over all visible keys by a generated module."""
    module = load(kernel)
    run = partial(run_exact, module, operands)
    with torch.cuda.device_of(operands.query):
        autotune(module, "exact", run, operands)
        return run()


def run_sparse_kernel(
    kernel: str, operands: AttentionOperands, index: IndexOperands, site: str
) -> Tensor:
    """Return attention over the best keys by a generated module, and index new keys."""
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
        missed = missed_of(operands, steps[-1].scratch) if certifies(module) else None
        call = KernelCall(site, slots_read(steps[-1]), steps[-1].log_read(), log_all, missed)
        for observer in kernel_observers:
            observer(call)
    return output
