"""Which memory a node shows, and which memory an operator writes to."""

from __future__ import annotations

import operator
from typing import Any

import torch.fx

from lychee_compile.passes.graph.dataflow import argument, first_input, operator_key

SEVERAL = {
    "chunk", "split", "split_with_sizes", "unbind", "unsafe_chunk", "unsafe_split",
    "tensor_split", "unsafe_split_with_sizes",
}  # fmt: skip
"""Operators with several outputs, each a view of a part of their input."""


def storage_of(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose memory `node` shows, or may show: itself where it has its own."""
    while node.op == "call_function" and node.args:
        several = node.target is operator.getitem
        maker = first_input(node) if several else node
        if not _may_share(maker) or not isinstance(maker.args[0], (torch.fx.Node, list, tuple)):
            return node
        source: Any = maker.args[0]
        if not isinstance(source, torch.fx.Node):  # broadcast_tensors and meshgrid take a list
            source = source[node.args[1] if several else 0]
        node = source
    return node


def _may_share(node: torch.fx.Node) -> bool:
    """Whether an operator may give its input's memory, changed in place or not."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or operator_key(node) in _FRESH:
        return False
    annotated = any(each.alias_info is not None for each in schema.returns)
    return annotated or operator_key(node) in _UNANNOTATED


_FRESH = {"clone", "_to_copy", "lift_fresh_copy", "repeat", "tile", "repeat_interleave", "flip"}
_UNANNOTATED = {
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "atleast_1d",
    "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "type_as",
    "hsplit", "vsplit", "dsplit", "rrelu", "lift_fresh",
}  # fmt: skip
"""Operators that may return a view of an input without saying so."""


def written_by(node: torch.fx.Node) -> list[torch.fx.Node]:
    """The tensors that an operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if (
        schema is None
        or not schema.is_mutable
        or operator_key(node) in ("detach_", "requires_grad_")
    ):
        return []
    written = []
    for formal in schema.arguments:
        if formal.alias_info is not None and formal.alias_info.is_write:
            given = argument(node, formal.name)
            given = given if isinstance(given, (list, tuple)) else [given]
            written += [each for each in given if isinstance(each, torch.fx.Node)]
    return written


def is_view_of_part(node: torch.fx.Node) -> bool:
    """Whether `node` is one output of `chunk`, `split` or `unbind`."""
    return node.target is operator.getitem and operator_key(node.args[0]) in SEVERAL


_PURE_VIEWS = {
    "alias", "detach", "view", "expand", "expand_as", "unsqueeze", "squeeze", "transpose",
    "permute", "t", "mT", "mH", "select", "slice", "narrow", "swapaxes", "swapdims",
    "movedim", "unflatten",
}  # fmt: skip


def is_pure_view(node: torch.fx.Node) -> bool:
    """Whether `node` shows the memory of its input and copies nothing, in any case."""
    return operator_key(node) in _PURE_VIEWS or is_view_of_part(node)
