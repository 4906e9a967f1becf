"""Tell which memory a node shows, and which memory an operator writes to."""

from __future__ import annotations

import operator
from typing import Any

import torch.fx

from lychee_compile.passes.graph.dataflow import argument, first_input, operator_of
from lychee_compile.passes.graph.operator_facts import Memory, View

_PART = "lychee_part"
"""Name of the mark on a node that is a part of an input and counts as memory of its own."""


def as_part(node: torch.fx.Node) -> None:
    """Let a view of a part of an input count as memory of its own.

    Nothing else in the graph may show an element of it.
    """
    node.meta[_PART] = node.name  # the name, as other nodes may take over the meta of this one


def is_part(node: torch.fx.Node) -> bool:
    """True if a node is a part of an input that counts as memory of its own."""
    return node.meta.get(_PART) == node.name


def is_given(node: torch.fx.Node) -> bool:
    """True if a node is an input, or a part of one that counts as memory of its own."""
    return node.op == "placeholder" or is_part(node)


def storage_of(node: torch.fx.Node) -> torch.fx.Node:
    """Return the node whose memory `node` may show, or `node` if it has memory of its own."""
    source = memory_behind(node)
    while source is not None:
        node, source = source, memory_behind(source)
    return node


def memory_behind(node: torch.fx.Node) -> torch.fx.Node | None:
    """Return the tensor whose memory an operator may show; None if the operator makes its own."""
    if node.op != "call_function" or not node.args or is_part(node):
        return None
    several = node.target is operator.getitem
    maker = first_input(node) if several else node
    if not _may_share(maker):
        return None
    written = written_by(maker)
    source: Any = written[0] if written else maker.args[0]
    if isinstance(source, (list, tuple)):  # broadcast_tensors and meshgrid take a list
        place = node.args[1] if several else 0
        assert isinstance(place, int)
        source = source[place]
    return source if isinstance(source, torch.fx.Node) else None


def _may_share(node: torch.fx.Node) -> bool:
    """True if an operator may give its input's memory, changed in place or not."""
    schema = getattr(node.target, "_schema", None)
    memory = operator_of(node).memory
    if schema is None or memory is Memory.FRESH:
        return False
    annotated = any(each.alias_info is not None for each in schema.returns)
    return annotated or memory in (Memory.OF_INPUT, Memory.PERHAPS_OF_INPUT)


def written_by(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the tensors that an operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or operator_of(node).writes_nothing:
        return []
    written = []
    for formal in schema.arguments:
        if formal.alias_info is not None and formal.alias_info.is_write:
            value = argument(node, formal.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            written += [each for each in values if isinstance(each, torch.fx.Node)]
    return written


def is_view_of_part(node: torch.fx.Node) -> bool:
    """True if `node` is one output of `chunk`, `split`, `unbind` or the like."""
    return node.target is operator.getitem and operator_of(node.args[0]).view is View.PARTS


def is_pure_view(node: torch.fx.Node) -> bool:
    """True if `node` always shows the memory of its input, and copies nothing."""
    return operator_of(node).memory is Memory.OF_INPUT or is_view_of_part(node)
