"""Decide what becomes of each attention, with the reason where it stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators import DEVICES, DTYPES, LONGEST_QUERY
from lychee_compile.passes.caches import CacheBinding, bind_cache
from lychee_compile.passes.dataflow import (
    module_path,
    operator_name,
    same,
    shape_of,
    source_line,
    static_size,
    value_of,
)
from lychee_compile.passes.detect import Attention
from lychee_compile.passes.masks import describe_mask
from lychee_compile.passes.site import Site


@dataclass(frozen=True)
class Plan:
    """An attention, what is known of it for the report, and its cache where it has one."""

    attention: Attention
    site: Site
    binding: CacheBinding | None


def plan_site(
    attention: Attention, graph: torch.fx.Graph, config: IndexConfig, needs_gradients: bool
) -> Plan:
    """Look at one attention and decide: `site.decision` is "sparse" or, with a reason, "kept"."""
    bound = bind_cache(attention.key, graph, attention.node)
    binding = bound if isinstance(bound, CacheBinding) else None
    site = _describe(attention, binding)
    unsupported = _unsupported_operands(attention, needs_gradients) or _unsupported_form(attention)
    exact = None if unsupported else _better_exact(attention, config)
    unbound = bound if isinstance(bound, str) else None
    reason = unsupported or exact or unbound
    if reason is None:
        site.decision = "sparse"
        site.kernel = "lychee::sparse_attention (reference)"
        site.reason = f"budget {config.budget} of up to {site.kv_len} tokens"
    else:
        site.reason, site.by_design = reason, reason == exact
        site.kernel = operator_name(attention.node)
    return Plan(attention, site, binding)


def _describe(attention: Attention, binding: CacheBinding | None) -> Site:
    query, key = shape_of(attention.query), shape_of(attention.key)

    def size(value: int | torch.SymInt) -> int | str:
        return value if isinstance(value, int) else str(value)

    return Site(
        name=module_path(attention.node),
        source=source_line(attention.node),
        form=attention.form,
        query_heads=size(query[-3]) if len(query) > 2 else 1,
        kv_heads=size(key[-3]) if len(key) > 2 else 1,
        head_dim=size(query[-1]),
        query_len=size(query[-2]),
        kv_len=size(key[-2]),
        mask=describe_mask(attention),
        cache=binding.kind if binding else "none",
    )


def _unsupported_operands(attention: Attention, needs_gradients: bool) -> str | None:
    if needs_gradients:
        return "gradients are needed: call the model under torch.no_grad() for sparse attention"
    operands = (attention.query, attention.key, attention.value)
    values = [value_of(node) for node in operands]
    for value in values:
        if value.dtype not in DTYPES:
            return f"dtype {str(value.dtype).removeprefix('torch.')} is not supported"
        if value.device.type not in DEVICES:
            return f"no kernels for device {value.device.type} yet: they would be slower than dense"
    if len({value.dtype for value in values}) > 1:
        return "query, key and value differ in dtype"
    if any(value.dim() != 4 for value in values):
        return "query, key and value are not [batch, heads, tokens, head_dim]"
    return None


def _unsupported_form(attention: Attention) -> str | None:
    if attention.dropout > 0:
        return f"dropout {attention.dropout} on the attention weights"
    query, key, value = (
        shape_of(node) for node in (attention.query, attention.key, attention.value)
    )
    if not (isinstance(query[1], int) and isinstance(key[1], int)) or query[1] % key[1]:
        return f"{query[1]} query heads do not divide into {key[1]} KV heads"
    rows_differ = not (same(query[0], key[0]) and same(query[0], value[0]))
    if rows_differ or not same(key[1], value[1]) or not same(query[3], key[3]):
        return "query, key and value differ in batch, heads or head_dim"
    if attention.mask is not None:
        mask = shape_of(attention.mask)
        if not 2 <= len(mask) <= 4 or not same(mask[-1], key[2]):
            return f"the mask, {list(mask)}, does not name the {key[2]} keys one by one"
    return None


def _better_exact(attention: Attention, config: IndexConfig) -> str | None:
    """Why this attention is meant to stay exact; None where sparse reading can win."""
    query, key = shape_of(attention.query), shape_of(attention.key)
    if config.budget is None:
        return "budget=None asks for exact attention"
    tokens = static_size(query[2])
    if same(query[2], key[2]) or (tokens is not None and tokens > LONGEST_QUERY):
        return f"{query[2]} query positions: a prefill or an encoder, which stays exact"
    if attention.is_causal:
        return "is_causal counts from the first key, which decoding over a cache does not mean"
    kv_len = static_size(key[2])
    if kv_len is not None and kv_len <= config.budget:
        return f"key length {kv_len} is within the budget {config.budget}"
    return None
