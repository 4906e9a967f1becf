"""Replace writes to intermediate tensors by new tensors, so that each tensor keeps its value.

    scores.masked_fill_(hidden, -inf)         scores_1 = masked_fill(scores, hidden, -inf)
    weights = softmax(scores, -1)        ->   weights = softmax(scores_1, -1)

A write through a view becomes a new tensor too, and every other view that is read later is made
again. Writes to inputs, such as caches, stay as they are. A write that has no such form stays as
well, and the tensor that it writes to is reported, because that tensor does not keep its value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes.graph.aliasing import storage_of, written_by
from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    is_tensor,
    operator_of,
    same_shape,
    value_of,
)
from lychee_compile.passes.graph.dead_code import erase_dead_code
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.graph.operator_facts import Family
from lychee_compile.passes.graph.shared_memory import SharedMemory, UnknownMemory, same_view
from lychee_compile.passes.graph.view_inverses import put_back, views_anew
from lychee_compile.passes.graph.written_parts import changed_part
from lychee_compile.passes.graph.written_values import written_value
from lychee_compile.torch_private import FakeTensorMode


def normalise(gm: torch.fx.GraphModule, mode: FakeTensorMode) -> frozenset[torch.fx.Node]:
    """Rewrite `gm` in place, and return the tensors made in the graph that are still written to."""
    _erase_idle_dropout(gm.graph)
    erase_dead_code(gm)
    written = _Writes(gm.graph, mode).as_values()
    erase_dead_code(gm)
    return written


def _erase_idle_dropout(graph: torch.fx.Graph) -> None:
    """Erase dropout that gives its input itself; in place, or with a mask beside it, it stays."""
    for node in list(graph.nodes):
        plain = not written_by(node) and isinstance(value_of(node), torch.Tensor)
        if plain and _is_idle_dropout(node):
            node.replace_all_uses_with(first_input(node))
            graph.erase_node(node)


def _is_idle_dropout(node: torch.fx.Node) -> bool:
    dropout = operator_of(node).family is Family.DROPOUT
    return dropout and not (argument(node, "train") and argument(node, "p"))


class _Writes:
    """The writes of one graph, taken one after the other."""

    def __init__(self, graph: torch.fx.Graph, mode: FakeTensorMode) -> None:
        self._graph, self._emit = graph, Emitter(graph, mode)
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._memory = SharedMemory(graph)
        self._kept: set[torch.fx.Node] = set()
        """Tensors that are written to by writes that stay."""

    def as_values(self) -> frozenset[torch.fx.Node]:
        """Replace all writes that can be; return the tensors that the others write to."""
        for node in list(self._graph.nodes):
            targets = written_by(node)
            made_here = [
                memory
                for memory in map(storage_of, targets)
                if memory.op in ("call_function", "call_method")
            ]
            if made_here and not (len(targets) == 1 and self._replaced(node, targets[0])):
                self._kept.update(made_here)
        return frozenset(self._kept)

    def _replaced(self, node: torch.fx.Node, target: torch.fx.Node) -> bool:
        """Replace the write `node` by a value that all later users read; True if that was done."""
        before = node.prev
        try:
            with self._emit.attempt(), self._graph.inserting_before(node):
                if self._does_nothing(node, target):
                    changed = {target: target}
                else:
                    changed = self._changed(node, target)
        except (UnknownMemory, RuntimeError, TypeError):  # as for functions mapped over a batch
            return False
        self._adopt(before, node)
        place = self._order[node]
        node.replace_all_uses_with(changed[target])
        for alias, fresh in changed.items():
            if fresh is not alias:
                alias.replace_all_uses_with(
                    fresh, delete_user_cb=lambda user: self._order[user] > place
                )
        self._graph.erase_node(node)
        return True

    def _does_nothing(self, node: torch.fx.Node, target: torch.fx.Node) -> bool:
        """True if `node` leaves its target as it is: idle dropout, or a copy of itself.

        `scores[a:] += bias` ends with such a copy.
        """
        if _is_idle_dropout(node):
            return True
        copies = calls(node, aten.copy_.default) and is_tensor(node.args[1])
        return copies and same_view(target, node.args[1], self._memory)  # type: ignore[arg-type]

    def _changed(
        self, node: torch.fx.Node, target: torch.fx.Node
    ) -> dict[torch.fx.Node, torch.fx.Node]:
        """Return what later users read for each tensor that shows the memory written.

        Raises `UnknownMemory` if some of it cannot be told.
        """
        owner = self._memory.owner(target)
        if torch_private.is_foreign(owner):
            raise UnknownMemory
        place = self._order[node]
        aliases = [
            alias
            for alias in self._memory.aliases(owner)
            if alias is not node and self._order[alias] < place and self._is_read(alias, place)
        ]
        view, value = self._value(node, target, owner)
        while view is not owner:
            source = self._memory.source(view)
            assert source is not None
            value = put_back(view, source, value, self._emit)
            view = source
        changed = {owner: self._laid_out(value, owner)}
        views_anew([*sorted(aliases, key=self._order.__getitem__), target], changed, self._emit)
        return changed

    def _value(
        self, node: torch.fx.Node, target: torch.fx.Node, owner: torch.fx.Node
    ) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Return a view of `owner` that holds all that is written, and its new value."""
        if owner not in self._kept:
            try:
                with self._emit.attempt():
                    part = changed_part(node, target, self._memory, self._emit)
                    if part is not None:
                        return part
            except (UnknownMemory, RuntimeError, TypeError):
                pass  # the general form serves
        return target, written_value(node, target, self._emit)

    def _laid_out(self, value: torch.fx.Node, owner: torch.fx.Node) -> torch.fx.Node:
        """Return a new tensor in the memory layout of the old, which views depend on.

        Raises `UnknownMemory` if it cannot have that layout, or differs in more.
        """
        after, before = value_of(value), value_of(owner)
        alike = after.dtype == before.dtype and after.device == before.device
        if not alike or not same_shape(tuple(after.shape), tuple(before.shape)):
            raise UnknownMemory
        if same_shape(_strides(after), _strides(before)):
            return value
        if not before.is_contiguous():
            raise UnknownMemory
        return self._emit(aten.clone.default, value, memory_format=torch.contiguous_format)

    def _is_read(self, alias: torch.fx.Node, place: int) -> bool:
        return any(self._order[user] > place for user in alias.users)

    def _adopt(self, before: torch.fx.Node, write: torch.fx.Node) -> None:
        """Give the nodes between `before` and `write` the place and the source line of `write`."""
        node = before.next
        while node is not write:
            node.meta = {**write.meta, "val": node.meta["val"]}
            self._order[node] = self._order[write]
            self._memory.note(node)
            node = node.next


def _strides(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return the strides of the dimensions that have more than one element."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return tuple(stride for stride, size in pairs if size != 1)
