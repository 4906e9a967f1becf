"""Trace the token ids of a graph: the integer input of its word embedding."""

from __future__ import annotations

import sympy
import torch
import torch.fx

from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    operator_of,
    shape_of,
    through_copies,
    value_of,
)
from lychee_compile.passes.symbolic.axes import size_expression


def find_token_ids(graph: torch.fx.Graph) -> torch.fx.Node | None:
    """Return the graph input that holds token ids, int [B, T]; None if there is none.

    If several embeddings look up an input, as of words and of positions, the one with the largest
    vocabulary counts.
    """
    largest, token_ids = 0, None
    for node in graph.nodes:
        if not calls(node, aten.embedding.default):
            continue
        ids = _input_behind(argument(node, "indices"))
        rows = shape_of(argument(node, "weight"))[0]
        if ids is not None and isinstance(rows, int) and rows > largest:
            largest, token_ids = rows, ids
    return token_ids


def _input_behind(node: torch.fx.Node) -> torch.fx.Node | None:
    while _is_reshape(node):
        node = first_input(node)
    node = through_copies(node)
    value = value_of(node)
    if node.op != "placeholder" or not isinstance(value, torch.Tensor):
        return None
    integral = value.dtype in (torch.int64, torch.int32)
    return node if integral and value.dim() == 2 else None


def _is_reshape(node: torch.fx.Node) -> bool:
    """True if a node lays the same ids out in another shape."""
    view = operator_of(node).view
    return view is not None and view.keeps_order and node.target is not aten.view.dtype


def covers(ids: torch.fx.Node | None, batch: sympy.Expr, tokens: torch.SymInt | int) -> bool:
    """True if `ids` [B, T] are `tokens` tokens of `batch` rows."""
    if ids is None:
        return False
    rows, count = (size_expression(size) for size in shape_of(ids))
    return bool(rows == batch and count == size_expression(tokens))
