"""Recognise the tail of a cache: the newest keys, which are stored apart from those before them.

    keys = cat((past.float() * scale, tail, new), 2)       keys of the attention
    tail = cat((tail, new), 2)                             returned

The past is often quantised, and the tail in full precision (KIVI, arXiv 2402.02750). Position p < n
reads the past, and p >= n the tail at p - n.
"""

from __future__ import annotations

import torch.fx

from lychee_compile.passes.graph.aliasing import is_given
from lychee_compile.passes.graph.dataflow import (
    argument,
    is_operator,
    output_place,
    shape_of,
)


def parts_of(joined: torch.fx.Node, attends: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the tensors that `joined` puts together, of which the last ones may be one tail.

    The tail is one tensor if the graph returns it, and has it before the attention.
    """
    parts = list(argument(joined, "tensors"))
    for begin in range(1, len(parts) - 1):
        for tail in parts[begin].users:
            if (
                _joins(tail, parts[begin:], joined)
                and tail < attends
                and output_place(tail) is not None
            ):
                return [*parts[:begin], tail]
    return parts


def begins_tail(node: torch.fx.Node) -> bool:
    """True if `node` is returned, and the last of tensors that are put together: a tail begins."""
    if is_given(node) or node.op != "call_function" or output_place(node) is None:
        return False
    joined = [user for user in node.users if is_operator(user, "cat")]
    return any(argument(each, "tensors")[-1] is node for each in joined)


def _joins(node: torch.fx.Node, parts: list[torch.fx.Node], other: torch.fx.Node) -> bool:
    """True if `node` puts `parts` together, along the same dimension as `other` does."""
    if not is_operator(node, "cat") or list(argument(node, "tensors")) != parts:
        return False
    rank = len(shape_of(other))
    along = [argument(each, "dim", 0) % rank for each in (node, other)]
    return len(shape_of(node)) == rank and along[0] == along[1]
