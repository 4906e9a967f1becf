"""Find and emit sizes that only a call tells, and read them from what a call is given.

    keys = cat((past, tail), 2)            tail[b, h, kv - s0, d] behind a past of s0 tokens

Here `s0` is a size of the input `past`, or a number that the graph takes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch.fx
from torch import Tensor

from lychee_compile.passes import reasons
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dataflow import aten, scalar_of, shape_of
from lychee_compile.passes.graph.emitter import Emitter

Number = int | torch.fx.Node
_OPERATORS: dict[type, Callable[..., Any]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}


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


@dataclass(frozen=True)
class NumberPlace:
    """Place of a number among the inputs of a graph."""

    source: int
    """Number of the input: an integer, or a tensor."""
    dim: int | None
    """Dimension of the tensor whose size is meant; None if the input is an integer."""
    more: int
    """Number that is added."""
    of_keys: bool = True
    """True if keys depend on it; False if values alone do."""

    def of(self, inputs: Sequence[object]) -> int:
        """Return the number in a call with some inputs."""
        given = inputs[self.source]
        if self.dim is not None:
            assert isinstance(given, Tensor)
            return given.shape[self.dim] + self.more
        assert isinstance(given, int)
        return given + self.more


def number_place(size: sympy.Symbol, inputs: Sequence[torch.fx.Node], of_keys: bool) -> NumberPlace:
    """Return where a call tells a size, of keys or of values alone.

    Raises `RewriteError` if none of the inputs does.
    """
    place = _told(size, inputs[0].graph)
    return NumberPlace(inputs.index(place.source), place.dim, place.more, of_keys)


def emit_number(value: sympy.Expr, emit: Emitter) -> Number:
    """Emit an integer that is an expression of sizes. Raises `RewriteError`."""
    if value.is_Integer:
        return int(value)
    if isinstance(value, sympy.Symbol):
        return _emit_size(value, emit)
    if type(value) not in _OPERATORS:
        raise RewriteError(reasons.SIZE_NOT_IN_GRAPH())
    terms = [emit_number(each, emit) for each in value.args]
    return reduce(lambda left, right: emit(_OPERATORS[type(value)], left, right), terms)


def _emit_size(size: sympy.Symbol, emit: Emitter) -> torch.fx.Node:
    place = _told(size, emit.graph)
    node = place.source
    if place.dim is not None:
        node = emit(aten.sym_size.int, node, place.dim)
    return emit(operator.add, node, place.more) if place.more else node


def _told(size: sympy.Symbol, graph: torch.fx.Graph) -> SizePlace:
    """Return the first input that tells a size. Raises `RewriteError` if there is none."""
    place = place_of_size(size, graph)
    if place is None:
        raise RewriteError(reasons.SIZE_NOT_IN_GRAPH())
    return place
