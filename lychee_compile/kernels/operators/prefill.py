"""The operators for whole sequences: a prefill, an encoder, cross-attention. They keep no state."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.gpu.common.autotune import autotune
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import PREFILL
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget, run_prefill
from lychee_compile.kernels.operators.observe import TileCall, tile_observers, warn_of_recording
from lychee_compile.kernels.reference.attention import dense_attention
from lychee_compile.kernels.reference.prefill_attention import (
    TileConfig,
    in_order,
    prefill_attention,
)


# The reference looks at how much it reads.
@torch.library.custom_op(
    "lychee::sparse_prefill", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def sparse_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    order: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    policy: str,
    budget: float,
    sinks: int,
    recent: int,
    epsilon: float | None,
    shortest: int,
    site: str,
) -> Tensor:
    """Attention of `query` [B, Hq, T, D] over part of `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    Operands, mask and `order` as in `prefill_attention`, the settings those of `TileConfig`. With
    less than `shortest` keys in all it is dense.
    """
    if query.numel() == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    if key.shape[2] < shortest:
        return _dense(query, key, value, mask, causal, scale, softcap, extra).contiguous()
    config = TileConfig(policy, budget, sinks, recent, epsilon, shortest)
    result = prefill_attention(
        query, key, value, mask, causal, scale, config, softcap, extra, order,
        keep_read=bool(tile_observers),
    )  # fmt: skip
    for observer in tile_observers:
        call = TileCall(site, query, key, value, mask, causal, scale, softcap, extra, order, result)
        observer(call)
    return result.output.contiguous()


@sparse_prefill.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    extra: Tensor | None,
    order: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    policy: str,
    budget: float,
    sinks: int,
    recent: int,
    epsilon: float | None,
    shortest: int,
    site: str,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("lychee::tiled_prefill", mutates_args=())
def tiled_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    order: Tensor | None,
    plain: str,
    scale: float,
    budget: float,
    shortest: int,
    kernel: str,
) -> Tensor:
    """`sparse_prefill` by the generated module `kernel`; `captured` are what score and mask read.

    With less than `shortest` keys in all it is PyTorch's own kernel where `plain` says that scores
    are only scaled, and that every query sees "all" or those up to it ("causal").
    """
    if tile_observers:
        warn_of_recording()
    if query.numel() == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    if key.shape[2] < shortest and plain:
        return _short(query, key, value, plain == "causal", scale).contiguous()
    if order is not None:
        query = query.index_select(2, order)
        extra = None if extra is None else in_order(extra, order)
    module = load(kernel)
    operands = AttentionOperands(query, key, value, captured, extra)
    read = PrefillBudget(budget, shortest, own=order is None)
    run = partial(run_prefill, module, operands, read)
    with torch.cuda.device_of(query):
        autotune(module, PREFILL, run, operands)
        output, _ = run()
    if order is not None:
        output = torch.empty_like(output).index_copy_(2, order, output)
    return output.contiguous()


@tiled_prefill.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    order: Tensor | None,
    plain: str,
    scale: float,
    budget: float,
    shortest: int,
    kernel: str,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def _short(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """Attention that is only scaled, by a fused kernel of PyTorch's: not all take grouped heads."""
    group = query.shape[1] // key.shape[1]
    if query.dtype == torch.float32 or value.shape[-1] != key.shape[-1]:
        key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
    extra: Tensor | None,
) -> Tensor:
    """What `prefill_attention` gives where all keys are read."""
    if causal:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
        if mask is None:
            mask = seen
        elif mask.dtype == torch.bool:
            mask = mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
    return dense_attention(query, key, value, mask, scale, softcap, extra)
