"""The operators for decoding by generated kernels that compute keys and values as they read them.

`key` and `value` are the tensors that they are computed from, in the module's order, or one tensor
that holds them as they are. `sizes` are [B, Hkv, L, D, Dv], and the sizes that the expressions of
both take besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.operators.decode import (
    run_exact_kernel,
    run_growing_kernel,
    run_static_kernel,
)


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
    """Run `sparse_decode` over keys and values that kernels compute from what is stored."""
    operands = _loaded(kernel, query, key, value, sizes, captured, extra)
    return run_static_kernel(kernel, operands, state, positions, site)


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
    return run_growing_kernel(kernel, operands, handle, positions, site)


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
    return run_exact_kernel(kernel, _loaded(kernel, query, key, value, sizes, captured, extra))


def _fake_loaded(
    query: Tensor, key: object, value: object, sizes: list[int], *_: object, **__: object
) -> Tensor:
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
    batch, heads, tokens, head_dim, value_dim, *numbers = sizes
    shapes = {"key": (batch, heads, tokens, head_dim), "value": (batch, heads, tokens, value_dim)}
    given, loads = {"key": key, "value": value}, load(kernel).LOADS
    shown = {
        name: query.as_strided(shapes[name], (0, 0, 0, 0)) if name in loads else given[name][0]
        for name in given
    }
    parts = {name: given[name] if name in loads else () for name in given}
    return AttentionOperands(
        query, shown["key"], shown["value"], captured, extra,
        key_parts=parts["key"], value_parts=parts["value"], numbers=numbers,
    )  # fmt: skip
