"""The operators for sparse prefill, encoders and cross-attention. They keep no state."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lychee_compile.kernels.gpu.common.autotune import autotune
from lychee_compile.kernels.gpu.common.module_cache import load
from lychee_compile.kernels.gpu.common.operands import AttentionOperands
from lychee_compile.kernels.gpu.common.tuning import PREFILL
from lychee_compile.kernels.gpu.prefill.launch import PrefillBudget
from lychee_compile.kernels.gpu.prefill.listed import ListedPrefill, listed_config
from lychee_compile.kernels.gpu.prefill.ranked import run_by_kernels
from lychee_compile.kernels.operators.fakes import fake_output
from lychee_compile.kernels.operators.observe import (
    PrefillCall,
    prefill_observers,
    warn_of_recording,
)
from lychee_compile.kernels.policies.registry import prefill_choice
from lychee_compile.kernels.reference.attention import dense_attention
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import (
    PrefillConfig,
    in_order,
    prefill_attention,
)


# CUDA graphs must leave it out: the reference looks at how much it reads.
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
    coverage: float | None,
    sinks: int,
    recent: int,
    epsilon: float | None,
    shortest: int,
    site: str,
) -> Tensor:
    """Attend from `query` [B, Hq, T, D] to part of `key` [B, Hkv, L, D]: [B, Hq, T, Dv].

    The operands are those of `Operands`, `causal` and `order` as in `prefill_attention`, and the
    settings those of `PrefillConfig`. With fewer than `shortest` keys the attention is dense.
    """
    operands = Operands(query, key, value, mask, scale, softcap, extra)
    if query.numel() == 0 or operands.kv_len == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    if operands.kv_len < shortest:
        return _dense(operands, causal).contiguous()
    choice = prefill_choice(policy)
    config = PrefillConfig(choice, budget, sinks, recent, epsilon, shortest, coverage)
    result = prefill_attention(operands, config, causal, order, keep_read=bool(prefill_observers))
    for observer in prefill_observers:
        observer(PrefillCall(site, operands, causal, order, result))
    return result.output.contiguous()


sparse_prefill.register_fake(fake_output)


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
    coverage: float | None,
    shortest: int,
    kernel: str,
) -> Tensor:
    """Run `sparse_prefill` by the generated module `kernel`, whose kernels choose too.

    `captured` are the tensors that score and mask read, in the module's order. `plain` is not empty
    if scores are only scaled and every query sees "all" keys, or those up to its own ("causal").
    Then a call with fewer than `shortest` keys goes to PyTorch's own kernel.
    """
    if (easy := _without_choice(query, key, value, plain, scale, shortest)) is not None:
        return easy
    module, operands = load(kernel), _in_order(query, key, value, captured, extra, order)
    read = PrefillBudget(budget, shortest, coverage, own=order is None)
    run = partial(run_by_kernels, module, operands, read)
    with torch.cuda.device_of(query):
        autotune(module, PREFILL, run, operands)
        output, _ = run()
    return _back(output, order)


tiled_prefill.register_fake(fake_output)


# CUDA graphs must leave it out: the policy's own function may wait for the device.
@torch.library.custom_op(
    "lychee::listed_prefill", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def listed_prefill(
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
    """Run `sparse_prefill`, choosing in PyTorch and attending by the generated module `kernel`.

    The arguments are those of `tiled_prefill`, but for the coverage: such policies draw no keys.
    """
    if (easy := _without_choice(query, key, value, plain, scale, shortest)) is not None:
        return easy
    module, operands = load(kernel), _in_order(query, key, value, captured, extra, order)
    config = listed_config(module, budget, shortest)
    with torch.cuda.device_of(query):
        prefill = ListedPrefill(module, operands, config, order)
        autotune(module, PREFILL, prefill.attend_first, operands)
        output, _ = prefill.run()
    return _back(output, order)


listed_prefill.register_fake(fake_output)


def _without_choice(
    query: Tensor, key: Tensor, value: Tensor, plain: str, scale: float, shortest: int
) -> Tensor | None:
    """Return attention over no keys, or over few by PyTorch's own kernel; None for all others."""
    if prefill_observers:
        warn_of_recording()
    if query.numel() == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    if key.shape[2] < shortest and plain:
        return _short(query, key, value, plain == "causal", scale).contiguous()
    return None


def _in_order(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captured: list[Tensor],
    extra: Tensor | None,
    order: Tensor | None,
) -> AttentionOperands:
    """Return the operands of a launch, the queries in the given order."""
    if order is not None:
        query = query.index_select(2, order)
        extra = None if extra is None else in_order(extra, order)
    return AttentionOperands(query, key, value, captured, extra)


def _back(output: Tensor, order: Tensor | None) -> Tensor:
    """Return the output [B, Hq, T, Dv] of queries that were put in an order as they came."""
    if order is not None:
        output = torch.empty_like(output).index_copy_(2, order, output)
    return output.contiguous()


def _short(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """Attend with scores that are only scaled, by PyTorch's own fused kernel.

    KV heads are repeated for kernels that do not take grouped heads.
    """
    group = query.shape[1] // key.shape[1]
    if query.dtype == torch.float32 or value.shape[-1] != key.shape[-1]:
        key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
    )


def _dense(operands: Operands, causal: bool) -> Tensor:
    """Return what `prefill_attention` gives if all keys are read."""
    if not causal:
        return dense_attention(operands)
    key, mask = operands.key, operands.mask
    shape = operands.query.shape[2], operands.kv_len
    seen = torch.ones(*shape, dtype=torch.bool, device=key.device).tril()
    if mask is None:
        mask = seen
    elif mask.dtype == torch.bool:
        mask = mask & seen
    else:
        mask = mask.masked_fill(~seen, -torch.inf)
    return dense_attention(replace(operands, mask=mask))
