"""The operators that run generated kernels, registered with PyTorch.

Each call names the module that holds its kernels (see `generated`), which fixes everything about
the attention but its tensors. `captured` are those that score and mask read, in the module's order.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lychee_compile.kernels import handles
from lychee_compile.kernels.gpu.common.autotune import autotune
from lychee_compile.kernels.gpu.common.launch_exact import run_exact
from lychee_compile.kernels.gpu.common.layout import IndexOperands
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.methods import method_of_kernel

KERNEL_DEVICES = {"cuda"}
"""Types of devices on which decoding runs generated kernels."""


@torch.library.custom_op("lychee::exact_decode", mutates_args=())
def exact_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    kernel: str,
) -> Tensor:
    """Attention of `query` [B, Hq, T, D] over all visible `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    `value` is [B, Hkv, L, Dv]; `extra`, broadcastable to [B, Hq, T], is the logit of a key without
    a value.
    """
    return _exact(kernel, AttentionOperands(query, key, value, captured, extra))


@exact_decode.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    kernel: str,
) -> Tensor:
    return _empty_output(query, value)


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
) -> Tensor:
    """Attention of `query` [B, Hq, T, D] over the best of `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    `state`, uint8, is the memory of an index laid out for `key`; while it may not be trusted, all
    visible keys are read. `positions`, int [T] or [B, T], are the slots that were just written:
    their keys are added to it. Waits for nothing and keeps to its tensors: fit for CUDA graphs.
    """
    layout = method_of_kernel(kernel).layout_of(key)
    index = IndexOperands(layout, layout.views(state), positions)
    return _sparse(kernel, AttentionOperands(query, key, value, captured, extra), index)


@sparse_decode.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    state: Tensor,
    kernel: str,
) -> Tensor:
    return _empty_output(query, value)


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
) -> Tensor:
    """`sparse_decode` over a cache whose size only a call tells: `handle` finds its index.

    CUDA graphs must leave it out, as they would replay with the index of their first call.
    """
    index = handles.find(handle).index_for(key, positions)
    handle[1] += 1
    operands = AttentionOperands(query, key, value, captured, extra)
    if index is None:
        return _exact(kernel, operands)
    return _sparse(kernel, operands, IndexOperands(index.layout, index.parts, positions))


@growing_sparse_decode.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    positions: Tensor | None,
    handle: Tensor,
    kernel: str,
) -> Tensor:
    return _empty_output(query, value)


def _exact(kernel: str, operands: AttentionOperands) -> Tensor:
    module = load(kernel)
    run = partial(run_exact, module, operands)
    with torch.cuda.device_of(operands.query):
        autotune(module, "exact", run, operands)
        return run()


def _sparse(kernel: str, operands: AttentionOperands, index: IndexOperands) -> Tensor:
    module = load(kernel)
    run = partial(method_of_kernel(kernel).run, module, operands, index)
    with torch.cuda.device_of(operands.query):
        autotune(module, "sparse", run, operands, index.state.header)
        return run()


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])
