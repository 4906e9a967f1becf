"""The operators for decoding in plain PyTorch, registered with PyTorch.

`update_index` brings the index of a key cache up to date with the keys just written to the cache.
`sparse_attention` selects from the index and attends. Both find the index by a handle. They are
ordered in a functional graph because `update_index` declares that it mutates the handle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lychee_compile.kernels import handles
from lychee_compile.kernels.cpu.attention import part_of
from lychee_compile.kernels.operators.cache_index import CacheIndex, CacheWrite
from lychee_compile.kernels.operators.fakes import fake_output
from lychee_compile.kernels.operators.observe import SparseCall, observers
from lychee_compile.kernels.operators.reference_owner import ReferenceCacheIndex
from lychee_compile.kernels.reference.adaptive import certified_attention
from lychee_compile.kernels.reference.attention import attend, dense_attention
from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.selection import select
from lychee_compile.kernels.reference.visible import seen_span

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of query, key and value that the operators take."""
DEVICES = ("cpu",)
"""Types of devices on which the operators are faster than dense attention over a long context."""
LONGEST_QUERY = 16
"""Largest number of query positions that count as decoding: a token, or a draft of some tokens."""

_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("lychee::update_index", mutates_args=("handle",), tags=_TAGS)
def update_index(
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    handle: Tensor,
    written: int,
) -> None:
    """Follow a write to `key` [B, Hkv, L, D], a cache or the keys grown by `cat`.

    `positions`, int [T] or [B, T], are the slots written; None: the last `written` slots.
    `token_ids`, int [B, T], are the tokens there; None: the graph does not know them. `mask` is the
    SDPA mask of the attention that reads the cache. A write of more than `LONGEST_QUERY` tokens, as
    in a dense prefill, only notes what a later build needs. Fewer are not even noted if the index
    waits for a second call.
    """
    follow(key, mask, positions, token_ids, handle, written)


@update_index.register_fake
def _(*_: object, **__: object) -> None:
    return None


@torch.library.custom_op("lychee::sparse_attention", mutates_args=(), tags=_TAGS)
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    handle: Tensor,
    scale: float,
    softcap: float | None,
    site: str,
    extra_value: Tensor | None = None,
) -> Tensor:
    """Attend from `query` [B, Hq, Tq, D] to the best of `key` [B, Hkv, L, D]: [B, Hq, Tq, Dv].

    The operands are those of `Operands`. `update_index` has run on `key`, and the budget is that of
    the handle's index. More than `LONGEST_QUERY` positions are a prefill, which is dense. A call is
    dense too if the index waits for a second call on the cache. A query that sees no key, as in an
    idle row of a server's batch, reads nothing and gets zeros.
    """
    operands = Operands(query, key, value, mask, scale, softcap, extra, extra_value)
    return attended(operands, handle, site)


sparse_attention.register_fake(fake_output)


def follow(
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    handle: Tensor,
    written: int,
    check: Callable[[CacheIndex, Tensor], None] | None = None,
) -> None:
    """Do what the operator `update_index` does; `key` may be evaluated when it is read.

    `check` is called with the index and the slots written, int64 [B, T], before the update.
    """
    owner = handles.find(handle, ReferenceCacheIndex)
    handle[1] += 1
    owner.begin_call()
    if owner.waits and written <= LONGEST_QUERY:
        return
    cache = owner.index_for(key)
    batch, _, kv_len, _ = key.shape
    rows = mask if mask is None or written <= LONGEST_QUERY else mask[..., -1:, :]
    first, end = seen_span(rows, batch, kv_len, key.device)
    if positions is None:
        stop = kv_len if written else max(int(end.max()), 1)
        positions = torch.arange(max(stop - max(written, 1), 0), stop, device=key.device)
    # As in indexing, a negative position counts from the end.
    positions = (positions.to(torch.int64) % kv_len).expand(batch, -1)
    if check is not None:
        check(cache, positions)
    strengths = None
    if token_ids is not None and owner.strength_of is not None:
        strengths = owner.strength_of(token_ids).expand(batch, -1)
    write = CacheWrite(first, positions, strengths, end)
    cache.update(key, write, build=written <= LONGEST_QUERY)


def attended(operands: Operands, handle: Tensor, site: str) -> Tensor:
    """Do what `sparse_attention` does; keys and values may be evaluated when they are read."""
    if operands.query.shape[2] > LONGEST_QUERY:
        return dense_attention(_evaluated(operands)).contiguous()
    owner = handles.find(handle, ReferenceCacheIndex)
    if owner.waits:
        return dense_attention(_evaluated(operands)).contiguous()
    index = owner.index_for(operands.key).index
    budget, epsilon, certificate = index.config.budget, index.config.epsilon, None
    if epsilon is None or budget is None:
        selection = select(index, operands.score_inputs, budget, site)
        output, _ = attend(operands, selection, part_of)
    else:
        output, selection, certificate = certified_attention(index, operands, budget, epsilon, site)
    for observer in observers:
        observer(SparseCall(site, operands, index, selection, certificate))
    return output.contiguous()


def _evaluated(operands: Operands) -> Operands:
    """Return operands whose keys and values are plain tensors, to read all of them."""
    key, value = (
        each.whole() if isinstance(each, LoadedTensor) else each
        for each in (operands.key, operands.value)
    )
    return replace(operands, key=key, value=value)
