"""The operator for keys that all rows of a batch share, in plain PyTorch, registered with PyTorch.

Each query chooses among the keys of the prefix, through one index for all rows. If the queries
together would read as many tokens as the prefix has, they all read all of it: one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels import handles
from lychee_compile.kernels.cpu.attention import part_of
from lychee_compile.kernels.operators.observe import SparseCall, observers
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.kernels.reference.adaptive import certified_attention
from lychee_compile.kernels.reference.attention import Part
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import select
from lychee_compile.kernels.reference.shared_prefix import (
    as_rows,
    attend_to_all,
    over_prefix,
    reads_whole,
)

_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("lychee::prefix_attention", mutates_args=(), tags=_TAGS)
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    handle: Tensor | None,
    scale: float,
    softcap: float | None,
    site: str,
) -> tuple[Tensor, Tensor]:
    """Attend from all rows of `query` [B, Hq, T, D] to a prefix `key` [1, Hkv, n, D].

    `value` is [1, Hkv, n, Dv], and `mask` an SDPA mask broadcastable to [B, Hq, T, n]. Returns the
    mean of the values [B, Hq, T, Dv] and the log-sum-exp of the scores [B, Hq, T], both float32;
    zeros and -inf for a query that sees nothing. `update_index` has run on `key`, and `handle` is
    that of its index; None: all visible keys are read.
    """
    operands = over_prefix(Operands(query, key, value, mask, scale, softcap))
    part = _part(operands, handle, site)
    batch = query.shape[0]
    mean, log_sum = as_rows(part.mean, batch).float(), as_rows(part.log_sum, batch).float()
    return mean.contiguous(), log_sum.contiguous()


@prefix_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    size = query.shape[:3]
    mean = query.new_empty(*size, value.shape[3], dtype=torch.float32)
    return mean, query.new_empty(*size, dtype=torch.float32)


def _part(operands: Operands, handle: Tensor | None, site: str) -> Part:
    if handle is None:
        return attend_to_all(operands)
    owner = handles.find(handle, ReferenceCacheIndex)
    config, queries = owner.config, operands.query.shape[2]
    if owner.waits or reads_whole(queries, operands.kv_len, config.budget):
        return attend_to_all(operands)
    index, certificate = owner.index_for(operands.key).index, None
    assert config.budget is not None
    if config.epsilon is None:
        selection = select(index, operands.score_inputs, config.budget, site)
    else:
        _, selection, certificate = certified_attention(
            index, operands, config.budget, config.epsilon, site
        )
    part, _ = part_of(operands, selection)
    for observer in observers:
        observer(SparseCall(site, operands, index, selection, certificate))
    return part
