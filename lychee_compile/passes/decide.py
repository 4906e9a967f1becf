"""Decide what becomes of each attention, with the reason where it stays as it is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.reference import DEVICES, DTYPES, LONGEST_QUERY
from lychee_compile.kernels.policies.registry import has_index, index_class, policy_names
from lychee_compile.passes import reasons
from lychee_compile.passes.describe import describe, describe_unread
from lychee_compile.passes.detect.attention import Attention, Unread
from lychee_compile.passes.detect.caches import CacheBinding, Unbound, bind_cache, find_writes
from lychee_compile.passes.graph.dataflow import operator_name, value_of
from lychee_compile.passes.lower import prefill
from lychee_compile.passes.lower.decode_site import KernelSite, kernel_site
from lychee_compile.passes.lower.kernel_support import (
    NoKernel,
    decodes,
    no_sparse_kernel,
    runs_kernels,
)
from lychee_compile.passes.lower.patch_grids import find_grid
from lychee_compile.passes.lower.prefill import WholeSequence
from lychee_compile.passes.lower.prefill_site import TILE_KERNELS, tile_site
from lychee_compile.passes.lower.rearrange import Emitter
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.site import Site


@dataclass(frozen=True)
class Plan:
    """An attention, what is known of it for the report, and its cache where it has one."""

    attention: Attention | Unread
    site: Site
    binding: CacheBinding | None
    kernel: KernelSite | None = None
    """The generated kernel that takes its place; None where PyTorch's or the reference's does."""
    whole: WholeSequence | None = None
    """How a whole sequence is read that is "sparse", without an index that is kept."""

    @property
    def node(self) -> torch.fx.Node:
        """What computes the output."""
        return self.attention.node


class Planner:
    """Decides about the attentions of one graph, in their order."""

    def __init__(
        self,
        graph: torch.fx.Graph,
        mode: Any,
        config: IndexConfig,
        needs_gradients: bool,
        autotune: bool = False,
    ) -> None:
        self._graph, self._config, self._needs_gradients = graph, config, needs_gradients
        self._autotune = autotune
        self._writes = find_writes(graph)
        self._emit = Emitter(graph, mode)
        self._places = itertools.count()

    def plan(self, attention: Attention | Unread) -> Plan:
        """Decide about one attention.

        `site.decision` is "sparse" or, with a reason, "exact" or "kept".
        """
        place = next(self._places)
        if isinstance(attention, Unread):
            return Plan(attention, describe_unread(attention), None)
        bound = bind_cache(attention, self._graph, self._writes)
        binding = bound if isinstance(bound, CacheBinding) else None
        unbound = bound.reason if isinstance(bound, Unbound) else None
        plan = Plan(attention, describe(attention, bound.kind), binding)
        unsupported = (
            _unsupported_operands(attention, self._needs_gradients)
            or attention.refused
            or _unsupported_form(attention)
        )
        if unsupported:
            return self._kept(plan, attention, unsupported, by_design=False)
        if self._is_whole(attention, cached=binding is not None):
            return self._whole(plan, attention, place)
        exact = _better_exact(attention, place, self._config)
        if runs_kernels(attention, self._config):
            return self._with_kernel(plan, attention, exact, unbound)
        reason = exact or _unsupported_device(attention, self._config) or unbound
        if reason:
            return self._kept(plan, attention, reason, by_design=reason == exact)
        plan.site.decision = "sparse"
        plan.site.kernel = "lychee::sparse_attention (reference)"
        plan.site.reads = _how_much(self._config, plan.site.kv_len)
        return plan

    def _is_whole(self, attention: Attention, cached: bool) -> bool:
        sparse = self._config.prefill == "sparse"
        return sparse and prefill.is_whole_sequence(attention, cached)

    def _whole(self, plan: Plan, attention: Attention, place: int) -> Plan:
        """Let every tile of a whole sequence read what matters to it."""
        config = self._config
        exact = (
            _exact_asked_for(config)
            or _in_dense_layers(place, config)
            or prefill.better_exact(attention, config)
        )
        kernels = runs_kernels(attention, config)
        exact = exact or (_no_tile_kernel(config) if kernels else None)
        if exact:
            return self._kept(plan, attention, exact, by_design=True)
        grid, tiles = find_grid(attention), None
        if kernels:
            try:
                tiles = tile_site(attention, config, self._emit, self._autotune)
            except NoKernel as error:
                return self._kept(plan, attention, error.reason, by_design=False)
            grid = grid if tiles.any_order else None
        elif reason := _unsupported_device(attention, config):
            return self._kept(plan, attention, reason, by_design=False)
        whole = WholeSequence(config, grid, tiles)
        plan.site.decision, plan.site.reads = "sparse", whole.reads
        plan.site.kernel = whole.operator
        return replace(plan, whole=whole)

    def _kept(self, plan: Plan, attention: Attention, reason: Reason, by_design: bool) -> Plan:
        """Leave an attention to PyTorch: as it was, or as one operator of its."""
        site = plan.site
        site.reason, site.by_design, site.kernel = reason, by_design, _kept_kernel(attention)
        if by_design and _one_operator_does_it(attention, self._config):
            site.decision = "exact"
            site.kernel = "aten.scaled_dot_product_attention"
        return plan

    def _with_kernel(
        self, plan: Plan, attention: Attention, exact: Reason | None, unbound: Reason | None
    ) -> Plan:
        """Let a generated kernel do it, which reads all keys where a reason for that is known."""
        site, config = plan.site, self._config
        if not _decodes_over_keys(attention, config):
            reason = exact or reasons.QUERY_LEN_SYMBOLIC(query_len=attention.query_len)
            return self._kept(plan, attention, reason, by_design=True)
        why = exact or no_sparse_kernel(config) or unbound
        try:
            binding = None if why else plan.binding
            made = kernel_site(attention, binding, config, self._emit, self._autotune)
        except NoKernel as error:
            reason = exact.and_also(error.reason) if exact else error.reason
            return self._kept(plan, attention, reason, by_design=bool(exact))
        site.kernel = made.kernel
        if made.cache is not None:
            site.decision, site.reads = "sparse", _how_much(config, site.kv_len)
        else:
            site.decision, site.reason = "exact", why or made.refused
        return replace(plan, kernel=made)


def _kept_kernel(attention: Attention) -> str:
    if attention.form == "flex":
        return "flex_attention"
    return operator_name(attention.node) if attention.form == "sdpa" else "aten (as written)"


def _unsupported_operands(attention: Attention, needs_gradients: bool) -> Reason | None:
    if needs_gradients:
        return reasons.GRADIENTS()
    operands = (attention.query.node, attention.key.node, attention.value.node)
    for value in (value_of(node) for node in operands):
        if value.dtype not in DTYPES:
            return reasons.DTYPE_UNSUPPORTED(dtype=str(value.dtype).removeprefix("torch."))
    return None


def _how_much(config: IndexConfig, kv_len: int | str) -> str:
    """What a sparse attention reads."""
    words = f"budget {config.budget} of up to {kv_len} tokens"
    if config.policy != IndexConfig.policy:
        words += f", policy {config.policy}"
    if config.epsilon is not None:
        words += f", more where over {config.epsilon:.3g} of the softmax might be missed"
    return words


def _unsupported_device(attention: Attention, config: IndexConfig) -> Reason | None:
    device = value_of(attention.query.node).device.type
    if device not in DEVICES and not config.reference:
        return reasons.DEVICE_UNSUPPORTED(device=device)
    return None


def _one_operator_does_it(attention: Attention, config: IndexConfig) -> bool:
    """Whether products and softmax written out are better one operator, without a score matrix.

    Not so for few queries, whose score matrix is small, unless exact attention was asked for.
    """
    query_len = attention.query_len
    few = isinstance(query_len, int) and query_len <= LONGEST_QUERY
    plain = attention.score.softcap is None and attention.score.extra is None
    return attention.form == "eager" and plain and (not few or config.budget is None)


def _unsupported_form(attention: Attention) -> Reason | None:
    if attention.dropout > 0:
        return reasons.DROPOUT(probability=attention.dropout)
    if attention.score.unsupported:
        return attention.score.unsupported
    heads = attention.size(attention.roles.kv_heads + attention.roles.group)
    if not isinstance(heads, int):
        return reasons.SIZE_SYMBOLIC(name="the number of query heads", size=heads)
    return None


def _decodes_over_keys(attention: Attention, config: IndexConfig) -> bool:
    """Whether a few queries ask more keys than it takes for a kernel to pay."""
    kv_len, budget = attention.kv_len, config.budget
    short = isinstance(kv_len, int) and budget is not None and kv_len <= budget
    whole = attention.query_len == kv_len or attention.is_causal
    return decodes(attention) and not (short or whole)


def _better_exact(attention: Attention, place: int, config: IndexConfig) -> Reason | None:
    """Why this attention is meant to stay exact; None where sparse reading can win."""
    query_len, kv_len = attention.query_len, attention.kv_len
    if config.budget is None:
        return _exact_asked_for(config)
    if query_len == kv_len or (isinstance(query_len, int) and query_len > LONGEST_QUERY):
        return reasons.PREFILL(query_len=query_len)
    if attention.is_causal:
        return reasons.CAUSAL_FROM_FIRST_KEY()
    if isinstance(kv_len, int) and kv_len <= config.budget:
        return reasons.WITHIN_BUDGET(kv_len=kv_len, budget=config.budget)
    if not has_index(config.policy):
        known = ", ".join(map(repr, policy_names()))
        return reasons.POLICY_CANNOT_DECODE(policy=config.policy, known=known)
    return _in_dense_layers(place, config)


def _no_tile_kernel(config: IndexConfig) -> Reason | None:
    return no_sparse_kernel(config, TILE_KERNELS, reasons.POLICY_NO_PREFILL_KERNEL)


def _exact_asked_for(config: IndexConfig) -> Reason | None:
    return reasons.BUDGET_NONE() if config.budget is None else None


def _in_dense_layers(place: int, config: IndexConfig) -> Reason | None:
    """Why the first attentions of a graph stay exact."""
    dense_layers = config.dense_layers
    if dense_layers is None:
        known = has_index(config.policy)
        dense_layers = index_class(config.policy).dense_layers if known else 0
    if place < dense_layers:
        return reasons.DENSE_LAYERS(dense_layers=dense_layers)
    return None
