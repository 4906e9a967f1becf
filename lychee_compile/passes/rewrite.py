"""Put index update and sparse attention in the place of the attentions that were planned sparse.

Before, one decoding step over a static cache:

    k = index_copy_(k_cache, 2, positions, k_new)
    k_wide = reshape(expand(unsqueeze(k, 2), ...), ...)
    out = scaled_dot_product_attention(q, k_wide, v_wide, mask)

After; `index` is a new input of the graph, which stands for the index of `k_cache`:

    k = index_copy_(k_cache, 2, positions, k_new)
    update_index(k, mask, positions, token_ids, index, 1)
    out = sparse_attention(q, k, v, mask, index, scale, "layers.0.self_attn")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from lychee_compile.kernels import operators  # noqa: F401  registers the operators
from lychee_compile.passes.caches import CacheBinding
from lychee_compile.passes.check import check_replacement
from lychee_compile.passes.dataflow import (
    argument,
    aten,
    calls,
    shape_of,
    static_size,
    value_of,
)
from lychee_compile.passes.decide import Plan
from lychee_compile.passes.tokens import covers, find_token_ids

StateInput = Callable[[CacheBinding], torch.fx.Node]
"""Gives the graph input that stands for the index of a cache."""


def rewrite_sparse(
    gm: torch.fx.GraphModule, plans: list[Plan], state_input: StateInput, mode: Any
) -> None:
    """Rewrite, in place, every plan decided "sparse"."""
    token_ids = find_token_ids(gm.graph)
    updated: set[CacheBinding] = set()
    for plan in plans:
        if plan.site.decision != "sparse":
            continue
        assert plan.binding is not None
        state = state_input(plan.binding)
        if plan.binding not in updated:
            updated.add(plan.binding)
            _insert_update(gm.graph, plan, state, token_ids)
        _replace_attention(gm.graph, plan, state, mode)


def note_prefill(gm: torch.fx.GraphModule, plans: list[Plan], state_input: StateInput) -> None:
    """Let prefills that fill a cache note their tokens, so that chunks end where sentences do."""
    token_ids = find_token_ids(gm.graph)
    noted: set[CacheBinding] = set()
    for plan in plans:
        if plan.binding is None or plan.binding in noted or plan.binding.reads_only:
            continue
        if covers(token_ids, plan.attention.query):
            noted.add(plan.binding)
            _insert_update(gm.graph, plan, state_input(plan.binding), token_ids)


def _insert_update(
    graph: torch.fx.Graph,
    plan: Plan,
    state: torch.fx.Node,
    token_ids: torch.fx.Node | None,
) -> None:
    attention, binding = plan.attention, plan.binding
    assert binding is not None
    with graph.inserting_before(attention.node):
        positions = binding.positions
        if binding.span is not None:
            device = value_of(binding.key).device
            positions = graph.call_function(
                aten.arange.start, binding.span, {"device": device, "dtype": torch.int64}
            )
        fresh = attention.query
        if binding.kind == "dynamic":
            fresh = (
                argument(binding.key, "tensors")[-1]
                if calls(binding.key, aten.cat.default)
                else binding.key
            )
        written: Any = 0
        if not binding.reads_only:
            written = static_size(shape_of(fresh)[2])
            if written is None:
                written = graph.call_function(aten.sym_size.int, (fresh, 2))
        ids = token_ids if covers(token_ids, fresh) else None
        graph.call_function(
            torch.ops.lychee.update_index.default,
            (binding.key, attention.mask, positions, ids, state, written),
        )


def _replace_attention(graph: torch.fx.Graph, plan: Plan, state: torch.fx.Node, mode: Any) -> None:
    attention = plan.attention
    old = attention.node
    operands = (attention.query, attention.key, attention.value, attention.mask)
    with graph.inserting_before(old):
        new = graph.call_function(
            torch.ops.lychee.sparse_attention.default,
            (*operands, state, attention.scale, plan.site.name),
        )
        new.meta.update(old.meta)
        with mode:
            values = torch.fx.node.map_arg(new.args, value_of)
            new.meta["val"] = torch.ops.lychee.sparse_attention.default(*values)
        check_replacement(value_of(old), new)
        new = _with_layout(graph, new, value_of(old), mode)
    old.replace_all_uses_with(new)
    _erase_unused(graph, old)


def _with_layout(
    graph: torch.fx.Graph, node: torch.fx.Node, wanted: torch.Tensor, mode: Any
) -> torch.fx.Node:
    """`node`, contiguous, laid out in memory as `wanted`, which later views may rely on."""
    strides = [
        (stride, -place)
        for place, (stride, size) in enumerate(zip(wanted.stride(), wanted.shape, strict=True))
        if size != 1
    ]
    order = [-place for _, place in sorted(strides, reverse=True)]
    if order == sorted(order):
        return node
    order += [place for place in range(wanted.dim()) if place not in order]
    back = [order.index(place) for place in range(wanted.dim())]
    for target, args in (
        (aten.permute.default, (order,)),
        (aten.contiguous.default, ()),
        (aten.permute.default, (back,)),
    ):
        made = graph.call_function(target, (node, *args))
        with mode:
            made.meta["val"] = target(value_of(node), *args)
        node = made
    return node


def _erase_unused(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """Erase `node`, and what only it used; writes and inputs stay."""
    if node.users or node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        _erase_unused(graph, source)
