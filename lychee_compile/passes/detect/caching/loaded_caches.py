"""Bind keys that are computed from what is stored to the caches that hold it.

    index_copy_(cache, 2, positions, quantised)         int8
    index_copy_(scale, 2, positions, new_scale)         float32
    keys = cache.to(float32) * scale

All tensors that a call writes get the same tokens. Every other tensor that keys depend on is
watched: an index is not trusted if one of them has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import sympy
import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.detect.caching.caches import (
    CacheBinding,
    Unbound,
    Watched,
    bind_tensor,
    is_held,
)
from lychee_compile.passes.detect.caching.call_numbers import are_told
from lychee_compile.passes.detect.caching.load_text import load_text
from lychee_compile.passes.detect.caching.loads import Load, is_plain, load_of, runs_over_tokens
from lychee_compile.passes.detect.caching.paged_caches import bind_paged
from lychee_compile.passes.detect.caching.tails import begins_tail
from lychee_compile.passes.detect.caching.token_writes import Writes
from lychee_compile.passes.graph.aliasing import is_given, is_pure_view, storage_of, written_by
from lychee_compile.passes.graph.dataflow import (
    ancestors,
    argument,
    aten,
    calls,
    is_operator,
    is_tensor,
    operator_key,
    operator_of,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import View
from lychee_compile.passes.graph.operators import PURE_CALLS
from lychee_compile.passes.graph.region import Order, overwritten_before
from lychee_compile.passes.symbolic.axes import Indices, size_expression


def bind_loaded(attention: Attention, writes: Writes) -> CacheBinding | Unbound | None:
    """Return what the keys of `attention` are computed from; None if that is not recognised.

    It is unbound if all is recognised, but the new keys are in no cache.
    """
    if attention.form == "flex":
        return None
    load = _load(attention, writes, values=False)
    if load is None or load.chooses_by_tensor:
        return None
    if _read_too_early(load, attention.key.node, attention):
        return None
    bindings: list[CacheBinding] = []
    watched: list[Watched] = []
    for name, leaf in load.leaves:
        if is_held(leaf, writes) or begins_tail(leaf):
            binding = _bound(name, leaf, load, attention, writes)
            if binding is None or not _alike(binding, bindings):
                return None
            bindings.append(binding)
            continue
        sources = _steady_sources(leaf, writes)
        if sources is None:
            return _without_tail(load)
        page = load.page_size_of_table(name) if sources == [leaf] else 0
        watched += [Watched(each, page=page) for each in sources]
    return _loaded(load, bindings, watched) if bindings else _without_tail(load)


def _without_tail(load: Load) -> Unbound | None:
    """Return the reason if new keys are joined to a past, and no tail holds them; else None."""
    behind = (leaf for name, leaf in load.leaves if load.is_behind_others(name))
    if any(leaf.op == "call_function" for leaf in behind):
        return Unbound("none", reasons.CACHE_TAIL_MOVES())
    return None


def load_of_values(attention: Attention, writes: Writes) -> Load | None:
    """Return the values of `attention` as an expression; None if they are a tensor as it is."""
    load = _load(attention, writes, values=True)
    if load is None or _read_too_early(load, attention.value.node, attention):
        return None
    stored = any(is_given(storage_of(leaf)) or is_held(leaf, writes) for _, leaf in load.leaves)
    return load if stored else None


def _load(attention: Attention, writes: Writes, values: bool) -> Load | None:
    operand = attention.value if values else attention.key
    channels = attention.roles.value_dim if values else attention.roles.head_dim

    def is_stored(node: torch.fx.Node, indices: Indices) -> bool:
        if begins_tail(node):
            return any(runs_over_tokens(index) for index in indices)
        if not is_held(node, writes):
            return False
        if not is_operator(node, "cat"):
            return True
        return runs_over_tokens(indices[argument(node, "dim", 0) % len(indices)])

    load = load_of(operand, channels, attention, is_stored)
    if load is None or is_plain(load, operand.node) or load_text(load, load.numbers) is None:
        return None
    return load if are_told(load.numbers, attention.node.graph) else None


def _loaded(
    load: Load, bindings: list[CacheBinding], watched: list[Watched]
) -> CacheBinding | None:
    if len({load.pages_of(name) for name, leaf in load.leaves if _is_of(leaf, bindings)}) > 1:
        return None
    main = max(bindings, key=_numbers_of_token)
    beside = [Watched(each.source, each.output) for each in bindings if each is not main]
    return replace(main, load=load, watched=tuple(dict.fromkeys([*beside, *watched])))


def _bound(
    name: str,
    leaf: torch.fx.Node,
    load: Load,
    attention: Attention,
    writes: Writes,
) -> CacheBinding | None:
    """Return the binding of a leaf that the call writes tokens to; None if it is not understood."""
    place, pages = load.place_of_tokens(name), load.pages_of(name)
    if pages is not None:
        return bind_paged(leaf, pages, load, attention, writes)
    if place is None:
        return None
    dim, first = place
    binding = bind_tensor(leaf, (dim, load.batch_dim(name)), attention, writes)
    if isinstance(binding, Unbound):
        return None
    if binding.kind == "dynamic" and not _holds_last(leaf, place, attention):
        return None
    return replace(binding, first_token=first)


def _holds_last(leaf: torch.fx.Node, place: tuple[int, sympy.Expr], attention: Attention) -> bool:
    """True if the last token of a cache is the last key: so the newest keys are the last ones."""
    axes, (dim, first) = attention.axes, place
    end = axes.size(first + size_expression(shape_of(leaf)[dim]))
    return bool(sympy.expand(end - axes.product(attention.roles.key)) == 0)


def _is_of(leaf: torch.fx.Node, bindings: list[CacheBinding]) -> bool:
    return any(each.key is leaf for each in bindings)


def _numbers_of_token(binding: CacheBinding) -> int:
    sizes = (size for dim, size in enumerate(shape_of(binding.key)) if dim != binding.token_dim)
    count = 1
    for size in sizes:
        count *= size if isinstance(size, int) else 1
    return count


def _alike(binding: CacheBinding, others: list[CacheBinding]) -> bool:
    """True if a call writes the same tokens to a cache as to others."""
    if not others:
        return True
    first = others[0]
    same = binding.kind == first.kind and binding.slots == first.slots
    same = same and (binding.source is None) == (first.source is None)
    same = same and binding.first_token == first.first_token
    return same and binding.reads_only == first.reads_only


def _steady_sources(leaf: torch.fx.Node, writes: Writes) -> list[torch.fx.Node] | None:
    """Return the inputs that a tensor is made of, if it is the same as long as they are.

    None if the graph writes to one, or if only a run tells what it depends on.
    """
    behind = list(ancestors(leaf))
    if any(storage_of(node) in writes or not _is_steady(node) for node in behind):
        return None
    return [node for node in behind if node.op == "placeholder" and is_tensor(node)]


def _is_size(node: torch.fx.Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


def _is_steady(node: torch.fx.Node) -> bool:
    """True if the same inputs give the same numbers at the same places for any number of keys.

    Where sizes are symbolic, places must not depend on them.
    """
    if node.op != "call_function":
        return node.op == "get_attr" or is_tensor(node) or _is_size(node)
    if _is_size(node) or calls(node, aten.arange.default):
        return True
    pure = bool(operator_key(node)) or node.target in PURE_CALLS
    if not pure or written_by(node) or node.is_impure():
        return False
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    described, numbers = operator_of(node), [n for n in node.all_input_nodes if not is_tensor(n)]
    if described.view in _KEEPING_PLACES or is_operator(node, "unsqueeze"):
        return True
    tensors = (node, *node.all_input_nodes)
    static = all(isinstance(size, int) for each in tensors for size in shape_of(each))
    return not numbers and (described.is_elementwise or static)


_KEEPING_PLACES = (
    View.COPY, View.BROADCAST, View.SWAP, View.SWAP_LAST, View.PERMUTE, View.MOVE, View.REVERSE,
)  # fmt: skip
"""Kinds of views that show an element at a place that does not depend on sizes."""


def _read_too_early(load: Load, made: torch.fx.Node, attention: Attention) -> bool:
    """True if memory is written between its reading for `made` and the attention."""
    order = Order(attention.node.graph)
    leaves = {leaf for _, leaf in load.leaves}
    reads = []
    for leaf in leaves:
        readers = [each for each in _readers(leaf, made, leaves) if each is not leaf]
        first = min(readers, key=order.place.__getitem__, default=attention.node)
        reads.append((leaf, first))
    return overwritten_before(attention.node, reads, order)


def _readers(
    leaf: torch.fx.Node, made: torch.fx.Node, leaves: Iterable[torch.fx.Node]
) -> Iterator[torch.fx.Node]:
    """Yield the operators between a leaf and `made` that read the memory of the leaf."""
    waiting, met = [made], {made, *leaves} - {leaf}
    while waiting:
        node = waiting.pop()
        if node is leaf:
            continue
        for source in node.all_input_nodes:
            if storage_of(source) is storage_of(leaf) and not is_pure_view(node):
                yield node
            if source not in met:
                met.add(source)
                waiting.append(source)
