"""Find the inputs of a graph that tell a size which only a call knows.

    keys = cat((past, tail), 2)            tail[b, h, kv - s0, d] behind a past of s0 tokens

Here `s0` is a size of the input `past`, or a number that the graph takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch.fx

from lychee_compile.passes.graph.dataflow import scalar_of, shape_of


@dataclass(frozen=True)
class SizePlace:
    """Place where a call tells a size."""

    source: torch.fx.Node
    """Input of the graph: an integer, or a tensor."""
    dim: int | None
    """Dimension of the tensor; None if the input is an integer."""
    more: int
    """Number by which the size is larger than what the input tells."""


def place_of_size(size: sympy.Symbol, graph: torch.fx.Graph) -> SizePlace | None:
    """Return the first input that tells a size; None if there is none."""
    for node in graph.find_nodes(op="placeholder"):
        told = [(None, node), *enumerate(shape_of(node))]
        for dim, each in told:
            value = scalar_of(each)
            more = None if value is None else sympy.expand(size - value)
            if more is not None and more.is_Integer:
                return SizePlace(node, dim, int(more))
    return None


def are_told(sizes: Iterable[sympy.Symbol], graph: torch.fx.Graph) -> bool:
    """True if the inputs of a graph tell all of some sizes."""
    return all(place_of_size(each, graph) is not None for each in sizes)
