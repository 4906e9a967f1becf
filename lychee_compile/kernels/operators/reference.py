"""The operators that rewritten graphs call, registered with PyTorch.

`update_index` brings the index of a key cache up to date with the keys just written to it;
`sparse_attention` selects from the index and attends. Both find the index through a handle (see
`handles`), which `update_index` declares to mutate: that orders them in a functional graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels import handles
from lychee_compile.kernels.operators.observe import SparseCall, observers
from lychee_compile.kernels.reference.adaptive import certified_attention
from lychee_compile.kernels.reference.attention import attend, dense_attention
from lychee_compile.kernels.reference.selection import select
from lychee_compile.kernels.reference.visible import visible_keys

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Key, query and value dtypes that the operators take."""
DEVICES = ("cpu",)
"""Devices on which the operators are faster than dense attention over a long context."""
LONGEST_QUERY = 16
"""Query positions of one call that count as decoding: a token, or a draft of some."""

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
    """Follow what was just written to `key` [B, Hkv, L, D], a cache or the keys grown by `cat`.

    `positions`, int [T] or [B, T], are the slots written; without them the last `written` slots.
    `token_ids`, int [B, T], are the tokens there, where the graph knows them. `mask` is the SDPA
    mask of the attention that reads the cache. A write of more than `LONGEST_QUERY` tokens, as in a
    dense prefill, only notes what a later build needs.
    """
    owner = handles.find(handle)
    cache = owner.index_for(key)
    batch, _, kv_len, _ = key.shape
    visible = visible_keys(
        None if mask is None else mask[..., -1:, :], batch, 1, kv_len, key.device
    )
    if positions is None:
        stop = kv_len if written else max(int(visible.end.max()), 1)
        positions = torch.arange(max(stop - max(written, 1), 0), stop, device=key.device)
    # As in indexing, a negative position counts from the end.
    positions = (positions.to(torch.int64) % kv_len).expand(batch, -1)
    strengths = None
    if token_ids is not None and owner.strength_of is not None:
        strengths = owner.strength_of(token_ids).expand(batch, -1)
    build = written <= LONGEST_QUERY
    cache.update(key, visible.first[:, 0], positions, strengths, build)
    handle[1] += 1


@update_index.register_fake
def _(
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    handle: Tensor,
    written: int,
) -> None:
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
) -> Tensor:
    """Attention of `query` [B, Hq, Tq, D] over the best of `key` [B, Hkv, L, D]: [B, Hq, Tq, Dv].

    `value` is [B, Hkv, L, Dv], `mask` an SDPA mask or None; `softcap` and `extra` as in `attend`.
    `update_index` has run on `key`. The budget is the handle's. More than `LONGEST_QUERY` positions
    are a prefill, which is dense; so is a call where a query sees no key, so that its value stays
    what PyTorch's operator makes of it.
    """
    if query.shape[2] > LONGEST_QUERY:
        return dense_attention(query, key, value, mask, scale, softcap, extra).contiguous()
    index = handles.find(handle).index_for(key).index
    kv_len, budget, epsilon = key.shape[2], index.config.budget, index.config.epsilon
    certificate = None
    if epsilon is None or budget is None:
        selection = select(index, key, query, scale, kv_len, mask, budget, softcap, site)
        output, _ = attend(query, key, value, selection, mask, scale, softcap, extra)
    else:
        output, selection, certificate = certified_attention(
            index, query, key, value, mask, scale, budget, epsilon, softcap, extra, site
        )
    if bool((selection.visible.end == 0).any()):
        return dense_attention(query, key, value, mask, scale, softcap, extra).contiguous()
    for observer in observers:
        call = SparseCall(
            site, query, key, value, mask, scale, softcap, index, selection, certificate
        )
        observer(call)
    return output.contiguous()


@sparse_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    handle: Tensor,
    scale: float,
    softcap: float | None,
    site: str,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])
