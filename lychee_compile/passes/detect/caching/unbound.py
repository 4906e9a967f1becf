"""Say what is seen of keys whose cache cannot have an index.

A cache is a tensor that the graph writes to, or that it grows and returns. Here the way back from
keys to a cache is followed over tensors that have an entry for every key, so that no way leads
through the attention of a layer before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import sympy
import torch
import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.caching.token_writes import Writes, prefix_of
from lychee_compile.passes.detect.caching.unfolded import behind_views
from lychee_compile.passes.graph.aliasing import is_pure_view, is_view_of_part, storage_of
from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    is_operator,
    is_tensor,
    operator_key,
    operator_of,
    outputs_of,
    scalar_of,
    shape_of,
    through_copies,
    value_of,
)
from lychee_compile.passes.graph.operator_facts import Family, View
from lychee_compile.passes.reasons import Reason

FARTHEST = 200
"""Largest number of operators that keys are followed back through."""
MOST_NAMED = 4
"""Largest number of operators that a reason names."""
_TELLING = (reasons.CACHE_PAGED, reasons.CACHE_CONVERTED, reasons.CACHE_COMPUTED)
"""Reasons that say most, the first most of all, if keys come from several caches."""
Way = tuple[torch.fx.Node, ...]
"""Operators from a cache to the keys, the cache first."""


class KeysWithoutCache:
    """Explains, for one graph, what keys are read from instead of a cache as it is."""

    def __init__(self, graph: torch.fx.Graph, writes: Writes) -> None:
        self._writes = writes
        self._outputs = {
            shown
            for node in outputs_of(graph)
            if isinstance(node, torch.fx.Node)
            for shown in (through_copies(node), behind_views(node))
        }

    def reason(self, key: torch.fx.Node, kv_len: int | sympy.Expr) -> Reason:
        """Return what is seen of the keys `key`, of which there are `kv_len`."""
        seen = [self._seen(way) for way in self._ways(key, kv_len)]
        telling = [kind.code for kind in _TELLING]
        seen.sort(
            key=lambda each: telling.index(each.code) if each.code in telling else len(telling)
        )
        return seen[0] if seen else reasons.NO_CACHE()

    def reads_cache(self, key: torch.fx.Node, kv_len: int | sympy.Expr) -> bool:
        """True if the keys `key`, of which there are `kv_len`, are computed from a cache."""
        return any(True for _ in self._ways(key, kv_len))

    def part_of(self, cache: torch.fx.Node, steps: Iterable[torch.fx.Node] = ()) -> Reason | None:
        """Return the reason if `cache` is a part of a larger tensor, as one layer's; else None."""
        views = [*_views_to_storage(cache), *steps]
        parts = any(operator_of(each).view in (View.SELECT, View.PARTS) for each in views)
        return reasons.CACHE_STACKED() if parts else None

    def _seen(self, way: Way) -> Reason:
        """Return what is done to a cache on the way to keys."""
        cache, *steps = way
        for step in steps:
            if operator_of(step).family is Family.GATHER:
                return reasons.CACHE_PAGED(operator=operator_key(step))
        stored = value_of(cache).dtype
        if stored.itemsize == 1 and any(map(_converts, steps)):
            return reasons.CACHE_CONVERTED(dtype=str(stored).removeprefix("torch."))
        names = list(dict.fromkeys(map(_name, filter(_computes, steps))))
        if names == ["cat"]:
            return reasons.CACHE_JOINED()
        if names:
            shown = [*names[:MOST_NAMED], *(["and more"] if len(names) > MOST_NAMED else [])]
            return reasons.CACHE_COMPUTED(operators=", ".join(shown))
        return self.part_of(cache, steps) or reasons.CACHE_VIEWED()

    def _ways(self, key: torch.fx.Node, kv_len: int | sympy.Expr) -> Iterator[Way]:
        """Yield ways from caches to `key`, the shortest first."""
        waiting: list[Way] = [(key,)]
        met = {key}
        while waiting and len(met) < FARTHEST:
            way = waiting.pop(0)
            if self._is_cache(way[0]) or _is_stored_in_bytes(way):
                yield way
                continue
            for source in _sources(way[0], sympy.sympify(kv_len)):
                if source not in met:
                    met.add(source)
                    waiting.append((source, *way))

    def _is_cache(self, node: torch.fx.Node) -> bool:
        """True if `node` shows a tensor that the graph writes tokens to, or grows and returns."""
        storage = storage_of(node)
        if storage.op in ("placeholder", "get_attr"):
            if any(_converts(view) for view in _views_to_storage(node)):
                return False
            return storage in self._writes or any(map(self._grown, storage.users))
        if operator_of(node).write is not None:
            return through_copies(first_input(node)).op == "placeholder"
        return self._grown(node)

    def _grown(self, node: torch.fx.Node) -> bool:
        """True if `node` is a cache that the graph grows and returns."""
        return is_operator(node, "cat") and node in self._outputs and _grows(node)

    def rolls(self, node: torch.fx.Node) -> bool:
        """True if `node` is a cache whose tokens were moved on, or tokens written to one."""
        node = through_copies(node)
        while operator_of(node).write is not None:
            node = through_copies(first_input(node))
        if is_operator(node, "cat"):
            return any(self.cuts_cache(through_copies(each)) for each in argument(node, "tensors"))
        source = node.args[0] if node.args else None
        return is_operator(node, "roll") or is_operator(source, "roll")

    def cuts_cache(self, node: torch.fx.Node) -> bool:
        """True if `node` is a slice of a cache that leaves out the first of its tokens."""
        if not calls(node, aten.slice.Tensor, aten.narrow.default) or prefix_of(node) is not None:
            return False
        source = storage_of(node)
        grown = is_operator(source, "cat") and _grows(source)
        return grown or source.op == "placeholder" or operator_of(source).write is not None

    def keeps_part(self, key: torch.fx.Node) -> bool:
        """True if a slice of `key` is returned or written to a cache."""
        slices = [user for user in key.users if calls(user, aten.slice.Tensor)]
        for node in (key, *slices):
            copied = any(calls(user, aten.copy_.default) for user in node.users)
            if node in self._outputs or copied:
                return True
        return any(self.keeps_part(node) for node in slices)


def _is_stored_in_bytes(way: Way) -> bool:
    """True if the first node of `way` is an input of 8-bit numbers that become keys one by one."""
    first, *steps = way
    storage = storage_of(first)
    if storage.op not in ("placeholder", "get_attr"):
        return False
    dtype, learnt = value_of(first).dtype, torch_private.is_parameter(storage)
    kept = dtype.itemsize == value_of(storage).dtype.itemsize == 1
    kept &= dtype != torch.bool and not learnt
    return kept and all(operator_of(step).product is None for step in steps)


def _sources(node: torch.fx.Node, kv_len: sympy.Expr) -> Iterator[torch.fx.Node]:
    """Yield the operands of `node` that have an entry for every key, as far as can be told.

    An operand of the same shape has one too, in whatever shape tokens are stored.
    """
    if node.op != "call_function" or is_operator(node, "softmax"):
        return
    if is_view_of_part(node):
        yield first_input(first_input(node))
        return
    described = operator_of(node)
    first = described.family is Family.GATHER or described.view is not None
    joins = described.family is Family.JOINING
    for place, each in enumerate(node.all_input_nodes):
        per_key = any(scalar_of(size) == kv_len for size in shape_of(each))
        alike = described.is_elementwise and shape_of(each) == shape_of(node)
        if is_tensor(each) and (per_key or alike or joins or (first and place == 0)):
            yield each


def _views_to_storage(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    storage = storage_of(node)
    while node is not storage:
        yield node
        node = first_input(node)


def _grows(node: torch.fx.Node) -> bool:
    """True if a concatenation puts tokens behind or before an input."""
    parts = [behind_views(each) for each in argument(node, "tensors")]
    return any(each.op == "placeholder" for each in parts)


def _computes(node: torch.fx.Node) -> bool:
    """True if the values of `node` are others than those of its operand."""
    return _converts(node) or (operator_of(node).view is None and not is_pure_view(node))


def _converts(node: torch.fx.Node) -> bool:
    """True if `node` gives its operand in another dtype."""
    dtypes = [getattr(value_of(each), "dtype", None) for each in (node.all_input_nodes[0], node)]
    return None not in dtypes and dtypes[0] != dtypes[1]


def _name(node: torch.fx.Node) -> str:
    return operator_key(node) or getattr(node.target, "__name__", str(node.target))
