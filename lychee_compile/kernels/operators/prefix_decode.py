"""Operators for decoding by generated kernels over keys that all rows of a batch share.

Rows of the batch are query positions, or heads of one group, of a single row. A result is float32
[1, H, T, Dv + 1]: the mean of the values, and behind its channels the log-sum-exp of the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.operators.decode import (
    run_exact_kernel,
    run_growing_kernel,
    run_static_kernel,
)


@torch.library.custom_op("lychee::exact_prefix", mutates_args=())
def exact_prefix(
    query: Tensor, key: Tensor, value: Tensor, captured: list[Tensor], kernel: str
) -> Tensor:
    """Attend from `query` [1, H, T, D] to all visible `key` [1, Hkv, n, D]."""
    return run_exact_kernel(kernel, AttentionOperands(query, key, value, captured))


@torch.library.custom_op("lychee::sparse_prefix", mutates_args=("state",))
def sparse_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    state: Tensor,
    kernel: str,
    site: str = "",
) -> Tensor:
    """Attend from `query` [1, H, T, D] to the best of `key` [1, Hkv, n, D], at each position.

    `state`, uint8, is the memory of an index laid out for `key`, which nothing is added to. While
    the index is distrusted, all visible keys are read.
    """
    operands = AttentionOperands(query, key, value, captured)
    return run_static_kernel(kernel, operands, state, None, site)


@torch.library.custom_op(
    "lychee::growing_sparse_prefix",
    mutates_args=("handle",),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def growing_sparse_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    handle: Tensor,
    kernel: str,
    site: str = "",
) -> Tensor:
    """Run `sparse_prefix` over a prefix of any length, whose index is found by `handle`."""
    operands = AttentionOperands(query, key, value, captured)
    return run_growing_kernel(kernel, operands, handle, None, site)


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3] + 1, dtype=torch.float32)


exact_prefix.register_fake(_fake)
sparse_prefix.register_fake(_fake)
growing_sparse_prefix.register_fake(_fake)
