"""Put other operators in the place of attentions, as planned: index and sparse attention, or SDPA.

Before, one decoding step over a static cache:

    k = index_copy_(k_cache, 2, positions, k_new)
    k_wide = reshape(expand(unsqueeze(k, 2), ...), ...)
    out = scaled_dot_product_attention(q, k_wide, v_wide, mask)

After; `index` is a new input of the graph, which stands for the index of `k_cache`:

    k = index_copy_(k_cache, 2, positions, k_new)
    update_index(k, mask, positions, token_ids, index, 1)
    out = sparse_attention(q, k, v, mask, None, index, scale, None, "layers.0.self_attn")

Where generated kernels run, one operator does both; `index` is then the memory of the index:

    out = sparse_decode(q, k, v, [length], None, positions, index, "decode_lychee_bf16_g4_d128_...")
    out = exact_decode(q, k, v, [length], None, "decode_exact_bf16_g4_d128_...")

A whole sequence that is read sparsely, `order` being that of patches in blocks, becomes

    out = sparse_prefill(q, k, v, mask, None, order, causal, scale, None, "lychee", 0.2, ...)
    out = tiled_prefill(q, k, v, [], None, order, "causal", scale, 0.2, 16384, "prefill_lychee_...")

An attention written out by hand that stays exact becomes

    out = scaled_dot_product_attention(q, k, v, mask, scale=scale)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from lychee_compile.kernels.gpu.lifecycle import CacheUse
from lychee_compile.kernels.operators import decode, prefill, reference  # noqa: F401  registers them
from lychee_compile.passes.decide import Plan
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caches import CacheBinding
from lychee_compile.passes.detect.mask_reading import Reading
from lychee_compile.passes.detect.token_ids import covers, find_token_ids
from lychee_compile.passes.graph.check import RewriteError, check_replacement
from lychee_compile.passes.graph.dataflow import aten, shape_of, static_size, value_of
from lychee_compile.passes.graph.dead_code import erase_dead_code
from lychee_compile.passes.lower.canonical import Canonical, Canonicaliser, with_layout
from lychee_compile.passes.lower.decode_site import KernelSite
from lychee_compile.passes.lower.patch_grids import Orders
from lychee_compile.passes.lower.prefill import WholeSequence
from lychee_compile.passes.lower.rearrange import Emitter
from lychee_compile.passes.reasons import Reason

StateInput = Callable[[CacheBinding, CacheUse | None], torch.fx.Node]
"""Gives the graph input that stands for the index of a cache: one by slot, or the reference's."""


@dataclass(frozen=True)
class Failure:
    """A site that could not be rewritten after all."""

    plan: Plan
    reason: Reason


def rewrite(
    gm: torch.fx.GraphModule, plans: list[Plan], state_input: StateInput, mode: Any
) -> list[Failure]:
    """Rewrite, in place, what was decided "sparse" or "exact". What resists is left as it was."""
    token_ids = find_token_ids(gm.graph)
    emit = Emitter(gm.graph, mode)
    orders = Orders(emit)
    updated: set[object] = set()
    failures = []
    for plan in plans:
        if plan.site.decision == "kept":
            continue
        try:
            with gm.graph.inserting_before(plan.node):
                if plan.kernel is not None:
                    _rewrite_kernel(plan, plan.kernel, emit, state_input, updated)
                elif plan.whole is not None:
                    _rewrite_whole(plan, plan.whole, emit, orders)
                elif plan.site.decision == "sparse":
                    _Site(plan, emit, token_ids).rewrite(state_input, updated)
                else:
                    _rewrite_exact(plan, emit)
        except RewriteError as error:
            failures.append(Failure(plan, error.reason))
        else:
            gm.graph.erase_node(plan.node)  # FX takes one that might drop out for impure
    erase_dead_code(gm)
    return failures


def note_prefill(
    gm: torch.fx.GraphModule, plans: list[Plan], state_input: StateInput, mode: Any
) -> None:
    """Let prefills that fill a cache note their tokens, so that chunks end where sentences do."""
    token_ids = find_token_ids(gm.graph)
    emit = Emitter(gm.graph, mode)
    noted: set[CacheBinding] = set()
    for plan in plans:
        if plan.binding is None or plan.binding in noted or plan.binding.reads_only:
            continue
        with gm.graph.inserting_before(plan.node):
            site = _Site(plan, emit, token_ids)
            if site.knows_tokens:
                noted.add(plan.binding)
                try:
                    given = Canonicaliser(site.attention, emit).operands()
                    site.update(replace(given, mask=_last_row(given.mask, emit)), state_input)
                except RewriteError:
                    continue


def _last_row(mask: torch.fx.Node | None, emit: Emitter) -> torch.fx.Node | None:
    """What the last query sees, which is all that an index asks for: a prefill's mask is large."""
    return None if mask is None else emit(aten.slice.Tensor, mask, 2, -1)


class _Site:
    """One attention being rewritten."""

    def __init__(self, plan: Plan, emit: Emitter, token_ids: torch.fx.Node | None) -> None:
        assert isinstance(plan.attention, Attention)
        assert plan.binding is not None
        self.attention, self.binding = plan.attention, plan.binding
        self._name = plan.site.name
        self._emit, self._token_ids = emit, token_ids

    @property
    def knows_tokens(self) -> bool:
        """Whether the graph's token ids are those written to the cache."""
        if self.binding.written is None:
            return False
        node, dim = self.binding.written
        batch = self.attention.axes.product(self.attention.roles.batch)
        return covers(self._token_ids, batch, shape_of(node)[dim])

    def rewrite(self, state_input: StateInput, updated: set[object]) -> None:
        """Emit update and attention, and let the graph go on with the new output."""
        old = self.attention.node
        canonical = Canonicaliser(self.attention, self._emit)
        given = canonical.operands()
        score = self.attention.score
        state = state_input(self.binding, None)
        made = self._emit(
            torch.ops.lychee.sparse_attention.default,
            given.query, given.key, given.value, given.mask, given.extra, state,
            score.scale, score.softcap, self._name,
        )  # fmt: skip
        output = _new_output(self._emit, canonical, made, old)
        if self.binding not in updated:
            updated.add(self.binding)
            with old.graph.inserting_before(made):
                self.update(given, state_input)
        old.replace_all_uses_with(output)

    def update(self, given: Canonical, state_input: StateInput) -> None:
        """Let the index follow what this call writes to the cache."""
        binding = self.binding
        state = state_input(binding, None)
        positions = _named_positions(binding, self._emit)
        written: Any = 0
        if binding.written is not None:
            node, dim = binding.written
            written = static_size(shape_of(node)[dim])
            written = self._emit(aten.sym_size.int, node, dim) if written is None else written
        ids = self._token_ids if self.knows_tokens else None
        update = torch.ops.lychee.update_index.default
        self._emit(update, given.key, given.mask, positions, ids, state, written)


def _named_positions(binding: CacheBinding, emit: Emitter) -> torch.fx.Node | None:
    """The slots written, int [T]; None where the graph does not name them."""
    if binding.span is None:
        return binding.positions
    device = value_of(binding.key).device
    return emit(aten.arange.start, *binding.span, device=device, dtype=torch.int64)


def _rewrite_kernel(
    plan: Plan,
    site: KernelSite,
    emit: Emitter,
    state_input: StateInput,
    updated: set[object],
) -> None:
    """Let a generated kernel attend, and sketch the keys that this call writes, once for each."""
    attention, given, cache = plan.attention, site.given, site.cache
    assert isinstance(attention, Attention)
    operands = (given.query, given.key, given.value, list(site.captured), given.extra)
    if cache is None:
        made = emit(torch.ops.lychee.exact_decode.default, *operands, site.kernel)
    else:
        assert plan.binding is not None
        state = state_input(plan.binding, cache)
        first = state not in updated
        positions = _positions(plan.binding, cache, given, emit) if first else None
        updated.add(state)
        fixed, growing = torch.ops.lychee.sparse_decode, torch.ops.lychee.growing_sparse_decode
        target = growing if cache.layout is None else fixed
        made = emit(target.default, *operands, positions, state, site.kernel)
    output = _new_output(emit, Canonicaliser(attention, emit), made, attention.node)
    attention.node.replace_all_uses_with(output)


def _positions(
    binding: CacheBinding, cache: CacheUse, given: Canonical, emit: Emitter
) -> torch.fx.Node | None:
    """The slots written, int [T]: the last ones of a cache that grows; None where none are."""
    if binding.reads_only or binding.kind == "static":
        return _named_positions(binding, emit)
    kv_len = emit(aten.sym_size.int, given.key, 2)
    first = emit(operator.sub, kv_len, cache.written)
    device = value_of(given.key).device
    return emit(aten.arange.start, first, kv_len, device=device, dtype=torch.int64)


def _rewrite_whole(plan: Plan, whole: WholeSequence, emit: Emitter, orders: Orders) -> None:
    """Let every tile of a whole sequence read what matters to it."""
    attention, config = plan.attention, whole.config
    assert isinstance(attention, Attention)
    old, score = attention.node, attention.score
    canonical = Canonicaliser(attention, emit)
    plainly_causal, tiles = Reading(attention).is_plainly_causal, whole.tiles
    given = canonical.operands(masked=not plainly_causal) if tiles is None else tiles.given
    operands = given.query, given.key, given.value
    order = None
    if whole.grid is not None:
        order = orders(whole.grid, value_of(given.query).device)
    budget = float(config.prefill_budget)
    if tiles is not None:
        made = emit(
            torch.ops.lychee.tiled_prefill.default,
            *operands, list(tiles.captured), given.extra, order,
            tiles.plain, score.scale, budget, config.prefill_from, tiles.kernel,
        )  # fmt: skip
    else:
        made = emit(
            torch.ops.lychee.sparse_prefill.default,
            *operands, given.mask, given.extra, order,
            plainly_causal or attention.is_causal, score.scale, score.softcap,
            config.policy, budget, config.sinks, config.recent, config.epsilon,
            config.prefill_from, plan.site.name,
        )  # fmt: skip
    old.replace_all_uses_with(_new_output(emit, canonical, made, old))


def _rewrite_exact(plan: Plan, emit: Emitter) -> None:
    """Let scaled dot-product attention do what products and a softmax did."""
    attention = plan.attention
    assert isinstance(attention, Attention)
    old = attention.node
    canonical = Canonicaliser(attention, emit)
    causal = Reading(attention).is_plainly_causal
    given = canonical.operands(repeated=True, masked=not causal)
    made = emit(
        aten.scaled_dot_product_attention.default,
        given.query, given.key, given.value, given.mask, 0.0, causal, scale=attention.score.scale,
    )  # fmt: skip
    output = _new_output(emit, canonical, made, old)
    old.replace_all_uses_with(output)


def _new_output(
    emit: Emitter, canonical: Canonicaliser, made: torch.fx.Node, old: torch.fx.Node
) -> torch.fx.Node:
    """The output of the operator `made`, as the graph goes on with that of `old`."""
    made.meta = {**old.meta, **made.meta}
    output = with_layout(emit, canonical.output(made), value_of(old))
    check_replacement(value_of(old), output)
    return output
