"""Decide what becomes of each attention, with the reason where it stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
import torch.fx

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators import DEVICES, DTYPES, LONGEST_QUERY
from lychee_compile.kernels.policies import index_class
from lychee_compile.passes.attention import Attention, Rejected, Unread
from lychee_compile.passes.axes import Axis
from lychee_compile.passes.caches import CacheBinding, Writes, bind_cache
from lychee_compile.passes.dataflow import module_path, operator_name, source_line, value_of
from lychee_compile.passes.masks import Reading
from lychee_compile.passes.site import RejectedSite, Site


@dataclass(frozen=True)
class Plan:
    """An attention, what is known of it for the report, and its cache where it has one."""

    attention: Attention | Unread
    site: Site
    binding: CacheBinding | None

    @property
    def node(self) -> torch.fx.Node:
        """What computes the output."""
        return self.attention.node


def plan_site(
    attention: Attention | Unread,
    place: int,
    graph: torch.fx.Graph,
    writes: Writes,
    config: IndexConfig,
    needs_gradients: bool,
) -> Plan:
    """Decide about the attention at `place` among its graph's.

    `site.decision` is "sparse" or, with a reason, "exact" or "kept".
    """
    if isinstance(attention, Unread):
        return Plan(attention, _describe_unread(attention), None)
    bound = bind_cache(attention, graph, writes)
    binding = bound if isinstance(bound, CacheBinding) else None
    site = _describe(attention, bound.kind)
    unsupported = (
        _unsupported_operands(attention, needs_gradients)
        or attention.refused
        or _unsupported_form(attention)
    )
    exact = None if unsupported else _better_exact(attention, place, config)
    unbound = None if isinstance(bound, CacheBinding) else bound.reason
    reason = unsupported or exact or _unsupported_device(attention, config) or unbound
    if reason is None:
        site.decision = "sparse"
        site.kernel = "lychee::sparse_attention (reference)"
        site.reason = _how_much(config, site.kv_len)
        return Plan(attention, site, binding)
    site.reason, site.by_design = reason, reason == exact
    site.kernel = _kept_kernel(attention)
    if site.by_design and _one_operator_does_it(attention, config):
        site.decision = "exact"
        site.kernel = "aten.scaled_dot_product_attention"
    return Plan(attention, site, binding)


def describe_rejected(rejected: Rejected) -> RejectedSite:
    """A softmax that is no attention, for the report."""
    node = rejected.node
    return RejectedSite(module_path(node), source_line(node), rejected.reason)


def _kept_kernel(attention: Attention) -> str:
    if attention.form == "flex":
        return "flex_attention"
    return operator_name(attention.node) if attention.form == "sdpa" else "aten (as written)"


def _describe(attention: Attention, cache: str) -> Site:
    roles, reading = attention.roles, Reading(attention)
    first, end = reading.key_range

    def size(axes: tuple[Axis, ...]) -> int | str:
        value = attention.size(axes)
        return value if isinstance(value, int) else str(value)

    return Site(
        name=module_path(attention.node),
        source=source_line(attention.node),
        form=attention.form,
        query_heads=size(roles.kv_heads + roles.group),
        kv_heads=size(roles.kv_heads),
        head_dim=size(roles.head_dim),
        value_head_dim=size(roles.value_dim),
        query_len=size(roles.query),
        kv_len=size(roles.key),
        mask=reading.words(),
        predicate=reading.predicate,
        key_range=f"[{first}, {end})",
        score=_rounded(reading.score) + (" with an extra logit" if attention.score.extra else ""),
        monotone=attention.score.monotone,
        cache=cache,
    )


def _rounded(expression: sympy.Basic) -> str:
    """Numbers to four digits: a report is for reading."""
    short = {
        each: sympy.Integer(int(each)) if float(each).is_integer() else sympy.Float(each, 4)
        for each in expression.atoms(sympy.Float)
        if each.is_finite
    }
    return str(expression.xreplace(short))


def _describe_unread(unread: Unread) -> Site:
    def size(value: int | sympy.Expr) -> int | str:
        return value if isinstance(value, int) else str(value)

    return Site(
        name=module_path(unread.node),
        source=source_line(unread.node),
        form=unread.form,
        query_heads=size(unread.query_heads),
        kv_heads=size(unread.kv_heads),
        head_dim=size(unread.head_dim),
        value_head_dim=size(unread.head_dim),
        query_len=size(unread.query_len),
        kv_len=size(unread.kv_len),
        mask=unread.mask,
        cache="none",
        score="",
        reason=unread.reason,
        by_design=unread.by_design,
        kernel=operator_name(unread.node),
    )


def _unsupported_operands(attention: Attention, needs_gradients: bool) -> str | None:
    if needs_gradients:
        return "gradients are needed: call the model under torch.no_grad() for sparse attention"
    operands = (attention.query.node, attention.key.node, attention.value.node)
    for value in (value_of(node) for node in operands):
        if value.dtype not in DTYPES:
            return f"dtype {str(value.dtype).removeprefix('torch.')} is not supported"
    return None


def _how_much(config: IndexConfig, kv_len: int | str) -> str:
    """What a sparse attention reads."""
    words = f"budget {config.budget} of up to {kv_len} tokens"
    if config.policy != IndexConfig.policy:
        words += f", policy {config.policy}"
    if config.epsilon is not None:
        words += f", more where over {config.epsilon:.3g} of the softmax might be missed"
    return words


def _unsupported_device(attention: Attention, config: IndexConfig) -> str | None:
    device = value_of(attention.query.node).device.type
    if device not in DEVICES and not config.reference:
        return f"no kernels for device {device} yet: they would be slower than dense"
    return None


def _one_operator_does_it(attention: Attention, config: IndexConfig) -> bool:
    """Whether products and softmax written out are better one operator, without a score matrix.

    Not so for few queries, whose score matrix is small, unless exact attention was asked for.
    """
    query_len = attention.query_len
    few = isinstance(query_len, int) and query_len <= LONGEST_QUERY
    plain = attention.score.softcap is None and attention.score.extra is None
    return attention.form == "eager" and plain and (not few or config.budget is None)


def _unsupported_form(attention: Attention) -> str | None:
    if attention.dropout > 0:
        return f"dropout {attention.dropout} on the attention weights"
    if attention.score.unsupported:
        return attention.score.unsupported
    heads = attention.size(attention.roles.kv_heads + attention.roles.group)
    if not isinstance(heads, int):
        return f"the number of heads, {heads}, is not known when compiling"
    return None


def _better_exact(attention: Attention, place: int, config: IndexConfig) -> str | None:
    """Why this attention is meant to stay exact; None where sparse reading can win."""
    query_len, kv_len = attention.query_len, attention.kv_len
    if config.budget is None:
        return "budget=None asks for exact attention"
    if query_len == kv_len or (isinstance(query_len, int) and query_len > LONGEST_QUERY):
        return f"{query_len} query positions: a prefill or an encoder, which stays exact"
    if attention.is_causal:
        return "is_causal counts from the first key, which decoding over a cache does not mean"
    if isinstance(kv_len, int) and kv_len <= config.budget:
        return f"key length {kv_len} is within the budget {config.budget}"
    dense_layers = config.dense_layers
    if dense_layers is None:
        dense_layers = index_class(config.policy).dense_layers
    if place < dense_layers:
        return f"among the first attentions, {dense_layers} of which stay exact"
    return None
