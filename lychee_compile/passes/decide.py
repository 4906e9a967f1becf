"""Decide what becomes of each attention of a graph, from facts alone.

Nothing is emitted, generated, written or run here: an outcome says what to do, and `rewrite` does
it. Facts are those of the attention, of its cache, of the options and of the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.fx

from lychee_compile import torch_private
from lychee_compile.kernels.config import IndexConfig
from lychee_compile.passes import reasons, rules
from lychee_compile.passes.describe import describe, describe_unread
from lychee_compile.passes.detect.attention import Attention, Unread
from lychee_compile.passes.detect.caching.caches import (
    CacheBinding,
    Unbound,
    bind_cache,
    find_writes,
)
from lychee_compile.passes.detect.caching.loaded_caches import bind_loaded, load_of_values
from lychee_compile.passes.detect.caching.memory_keys import bind_behind, over_cache
from lychee_compile.passes.detect.caching.shared_prefix import bind_behind_shared
from lychee_compile.passes.detect.caching.token_writes import Writes
from lychee_compile.passes.detect.formula import formula
from lychee_compile.passes.layer_numbers import layer_numbers
from lychee_compile.passes.lower.kernel_support import (
    no_decode_method,
    no_gpu_index,
    no_kernel,
    no_prefill_method,
    runs_kernels,
)
from lychee_compile.passes.lower.loads.kernel_loads import no_load
from lychee_compile.passes.lower.patch_grids import find_grid
from lychee_compile.passes.lower.shared.prefix_site import words_of_prefix
from lychee_compile.passes.outcomes import (
    ExactDecodeKernel,
    KeepAsIs,
    OneSdpa,
    Outcome,
    PrefillKernels,
    PrefillReference,
    ReferenceSparse,
    SparseDecodeKernel,
    how_much,
)
from lychee_compile.passes.reasons import Reason
from lychee_compile.passes.site import Site

logger = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """An attention, what the report says of it, its cache if it has one, and its outcome."""

    attention: Attention | Unread
    description: Site
    """Facts for the report, before anything was decided."""
    binding: CacheBinding | None
    outcome: Outcome

    @property
    def site(self) -> Site:
        """A new entry of the report: the facts, and what became of the attention."""
        outcome = self.outcome
        return replace(
            self.description,
            decision=outcome.decision,
            reason=outcome.reason,
            reads=outcome.reads,
            by_design=outcome.by_design,
            kernel=outcome.kernel,
        )

    def kept(self, reason: Reason) -> Plan:
        """Return the plan to leave the attention as it is, since rewriting it failed."""
        return replace(self, outcome=KeepAsIs(self.attention, reason, by_design=False))


def decide(
    graph: torch.fx.Graph,
    attentions: Sequence[Attention | Unread],
    config: IndexConfig,
    needs_gradients: bool,
    layers: frozenset[int] = frozenset(),
) -> list[Plan]:
    """Decide about the attentions of one graph, given in their order.

    `layers` are the numbers of layers that the graph was compiled for, as far as modules tell.
    """
    writes = find_writes(graph)
    plans = []
    places = layer_numbers(attentions, layers)
    for place, attention in zip(places, attentions, strict=True):
        if isinstance(attention, Unread):
            keep = KeepAsIs(attention, attention.reason, attention.by_design)
            plans.append(Plan(attention, describe_unread(attention), None, keep))
            continue
        cache = _cache_of(attention, writes, config)
        facts = _Facts(attention, place, cache, config)
        if reason := rules.unsupported(attention, needs_gradients):
            outcome: Outcome = facts.keep(reason)
        else:
            outcome = facts.outcome()
        note = facts.note() if outcome.decision == "sparse" else ""
        keys, values = _formulas(facts.binding)
        site = replace(describe(attention, cache.kind), note=note, keys=keys, values=values)
        plans.append(Plan(attention, site, facts.binding, outcome))
    return plans


def _cache_of(attention: Attention, writes: Writes, config: IndexConfig) -> CacheBinding | Unbound:
    """Return the cache of an attention, perhaps behind a few other keys, or why there is none."""
    cache = bind_cache(attention, writes)
    if config.budget is None and not runs_kernels(attention, config):
        return cache
    if not isinstance(cache, CacheBinding) and config.budget is not None:
        cache = bind_behind(attention, writes, config.budget) or cache
    if not isinstance(cache, CacheBinding):
        cache = bind_behind_shared(attention, writes) or cache
    if rules.reads_at_once(attention):
        return cache
    if not isinstance(cache, CacheBinding):
        found = _recovered(bind_loaded, attention, writes)
        # Keys that no cache is behind have that reason: no budget speaks of them.
        if isinstance(found, CacheBinding) or cache.reason != reasons.NO_CACHE():
            cache = cache if found is None else found
    if isinstance(cache, CacheBinding) and not cache.is_behind:
        return replace(cache, values=_recovered(load_of_values, attention, writes))
    return cache


def _recovered(
    find: Callable[[Attention, Writes], Found], attention: Attention, writes: Writes
) -> Found | None:
    """Return what `find` recovers; None if it fails: then keys or values stay as they are."""
    try:
        return find(attention, writes)
    except torch_private.RestartAnalysis:
        raise
    except Exception:  # whatever it is, the attention itself is understood
        logger.debug("no expression of keys or values was recovered", exc_info=True)
        return None


def _formulas(binding: CacheBinding | None) -> tuple[str, str]:
    """Return how keys and values are computed from what is stored; "" if they are not."""
    loads = (None, None) if binding is None else (binding.load, binding.values)
    keys, values = ("" if load is None else formula(load.labelled()) for load in loads)
    return keys, values


@dataclass(frozen=True)
class _Facts:
    """Facts about one attention from which its outcome is decided."""

    attention: Attention
    place: int | None
    """Number of layers before this attention; None if nothing tells it."""
    cache: CacheBinding | Unbound
    config: IndexConfig

    @property
    def binding(self) -> CacheBinding | None:
        return self.cache if isinstance(self.cache, CacheBinding) else None

    def note(self) -> str:
        """Return a remark for the report; "" if there is none."""
        dense_layers = rules.dense_layers(self.config)
        if self.place is not None or dense_layers == 0:
            return ""
        return f"dense_layers={dense_layers} is not applied: nothing tells the number of this layer"

    def outcome(self) -> Outcome:
        """Decide about an attention that is supported."""
        attention, config = self.attention, self.config
        if config.prefill == "sparse" and rules.is_prefill(attention, self.binding is not None):
            return self._sparse_prefill()
        if runs_kernels(attention, config):
            return self._kernel()
        if exact := self._exact_decoding():
            return self._exact(exact)
        if reason := rules.unsupported_device(attention, config):
            return self.keep(reason)
        if isinstance(self.cache, Unbound):
            return self.keep(self.cache.reason)
        return ReferenceSparse(attention, self.cache, self._how_much())

    def _exact_decoding(self) -> Reason | None:
        """Return why the attention is meant to read all keys; None if sparse reading can win.

        A budget says nothing of few keys that come from no cache.
        """
        binding = self.binding
        shared = binding is not None and binding.shared is not None
        cached = self.attention if shared else over_cache(self.attention, binding)
        exact = rules.exact_decoding(cached, self.place, self.config)
        none = isinstance(self.cache, Unbound) and self.cache.reason == reasons.NO_CACHE()
        if exact is None or exact.code != reasons.WITHIN_BUDGET.code or not none:
            return exact
        return reasons.NO_CACHE()

    def keep(self, reason: Reason) -> KeepAsIs:
        """Keep the attention for want of support."""
        return KeepAsIs(self.attention, reason, by_design=False)

    def _exact(self, reason: Reason) -> KeepAsIs | OneSdpa:
        """Leave the attention to PyTorch by design: as it is, or as one operator."""
        if rules.better_as_one_operator(self.attention, self.config):
            return OneSdpa(self.attention, reason)
        return KeepAsIs(self.attention, reason, by_design=True)

    def _sparse_prefill(self) -> Outcome:
        attention, config = self.attention, self.config
        kernels = runs_kernels(attention, config)
        exact = rules.exact_prefill(attention, self.place, config)
        exact = exact or (no_prefill_method(config) if kernels else None)
        if exact:
            return self._exact(exact)
        missing = no_kernel(attention) if kernels else rules.unsupported_device(attention, config)
        if missing:
            return self.keep(missing)
        kind = PrefillKernels if kernels else PrefillReference
        return kind(attention, config, find_grid(attention))

    def _kernel(self) -> Outcome:
        """Let a generated kernel decode, over all keys if there is a reason for that."""
        attention, config = self.attention, self.config
        exact = self._exact_decoding()
        if not rules.decodes_many_keys(attention, config):
            return self._exact(exact or reasons.QUERY_LEN_SYMBOLIC(query_len=attention.query_len))
        if missing := no_kernel(attention):
            return self._exact(exact.and_also(missing)) if exact else self.keep(missing)
        if exact:
            return ExactDecodeKernel(attention, exact, self._exact(exact), self.binding)
        if isinstance(self.cache, Unbound):
            return ExactDecodeKernel(attention, no_decode_method(config) or self.cache.reason)
        if reason := self._no_selection(self.cache):
            return ExactDecodeKernel(attention, reason, binding=self.cache)
        return SparseDecodeKernel(attention, self.cache, config.policy, self._how_much(True))

    def _no_selection(self, cache: CacheBinding) -> Reason | None:
        """Return why no kernel selects keys of a cache; None if one does."""
        attention, config = self.attention, self.config
        return (
            no_decode_method(config)
            or no_gpu_index(attention, cache, config)
            or no_load(attention, cache, config.policy)
        )

    def _how_much(self, kernels: bool = False) -> str:
        kv_len = over_cache(self.attention, self.binding).kv_len
        known = kv_len if isinstance(kv_len, int) else str(kv_len)
        reads = how_much(self.config, known, kernels)
        in_front = 0 if self.binding is None else self.binding.in_front
        if self.binding is not None and self.binding.shared is not None:
            return f"{reads}, and {words_of_prefix(self.attention, self.config)}"
        return f"{reads}, and {in_front} in front of the cache" if in_front else reads
