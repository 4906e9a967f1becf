"""Tell which nodes show one memory for certain, by the fake tensors that tracing left.

`aliasing` tells what may share memory by operators alone. Here `reshape`, `contiguous` and `to` are
known to be views, or to be copies, in the graph at hand.
"""

from __future__ import annotations

import operator

import torch
import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes.graph.aliasing import memory_behind, written_by
from lychee_compile.passes.graph.dataflow import operator_of, value_of
from lychee_compile.passes.graph.operator_facts import Memory, View


class UnknownMemory(Exception):  # noqa: N818  the write stays as it is
    """A node whose memory cannot be told."""


class SharedMemory:
    """The nodes of one graph that show the memory of others, as it was traced."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._shows: dict[torch.fx.Node, bool | None] = {}
        for node in graph.nodes:
            self.note(node)

    def note(self, node: torch.fx.Node) -> None:
        """Note if a node shows the memory of another. Fake values must be those of the tracing."""
        source = memory_behind(node)
        if source is not None:
            self._shows[node] = _shares(node, source)

    def source(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """Return the node whose memory `node` shows; None if it has its own.

        Raises `UnknownMemory` if that cannot be told.
        """
        source = memory_behind(node)
        if source is None or self._shows.get(node) is False:
            return None
        if self._shows.get(node) is None:
            raise UnknownMemory
        return source

    def owner(self, node: torch.fx.Node) -> torch.fx.Node:
        """Return the node that made the memory of `node`. Raises `UnknownMemory`."""
        source = self.source(node)
        while source is not None:
            node, source = source, self.source(source)
        return node

    def aliases(self, owner: torch.fx.Node) -> list[torch.fx.Node]:
        """Return all nodes that show the memory of `owner`, without those of several outputs.

        Raises `UnknownMemory` if a node may show that memory and may not.
        """
        found, waiting = {owner: None}, [owner]
        while waiting:
            for user in waiting.pop().users:
                if user in found or not self._is_alias(user, found):
                    continue
                found[user] = None
                waiting.append(user)
        return [node for node in found if isinstance(value_of(node), torch.Tensor)]

    def _is_alias(self, user: torch.fx.Node, found: dict[torch.fx.Node, None]) -> bool:
        if torch_private.is_foreign(user):
            raise UnknownMemory  # it may show the memory, and see writes
        if user.args and isinstance(user.args[0], (list, tuple)):
            if operator_of(user).memory is Memory.PERHAPS_OF_INPUT:
                raise UnknownMemory
            return False
        return memory_behind(user) in found and self.source(user) is not None


def _shares(node: torch.fx.Node, source: torch.fx.Node) -> bool | None:
    """Return if `node` shows the memory of `source`; None if their values do not tell."""
    if operator_of(node).view is View.PARTS:
        return True
    one, other = value_of(node), value_of(source)
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return None
    try:
        shares = torch_private.share_storage(one, other)
        # Fake tensors are no witness where the schema is none: idle dropout gives its input.
        return shares or (None if operator_of(node).memory is Memory.PERHAPS_OF_INPUT else False)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return None


def same_view(one: torch.fx.Node, other: torch.fx.Node, memory: SharedMemory) -> bool:
    """True if two nodes are proved to show the same elements of one memory, in the same shape."""
    while True:
        one, other = _behind_aliases(one, memory), _behind_aliases(other, memory)
        if one is other:
            return True
        sources = memory.source(one), memory.source(other)
        if None in sources or one.target != other.target or written_by(one):
            return False
        if one.target is not operator.getitem and (
            one.args[1:] != other.args[1:] or one.kwargs != other.kwargs
        ):
            return False
        if one.target is operator.getitem:
            makers = one.args[0], other.args[0]
            if one.args[1] != other.args[1] or makers[0] is not makers[1]:
                return False
        one, other = sources  # type: ignore[assignment]


def _behind_aliases(node: torch.fx.Node, memory: SharedMemory) -> torch.fx.Node:
    """Return the first node up the graph that is no other name of its input."""
    while operator_of(node).view is View.COPY and not written_by(node):
        source = memory.source(node)
        if source is None or value_of(source).dtype != value_of(node).dtype:
            return node
        node = source
    return node
