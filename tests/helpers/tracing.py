"""Graphs of short functions as the backend sees them, and values of what is read of them."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
import torch.fx
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from lychee_compile.passes.graph.dataflow import shape_of
from lychee_compile.passes.graph.names import Names
from lychee_compile.passes.symbolic.axes import Axes, Indices, SplitAxis
from lychee_compile.passes.symbolic.elementwise import Flag

FINEST = 12


class Traced:
    """`function` of `inputs` as a pre-dispatch ATen graph; sizes of `dynamic` dims are symbols."""

    def __init__(
        self, function: Callable[..., Any], *inputs: Tensor, dynamic: tuple[int, ...] = ()
    ) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        fakes = [self._fake(each, dynamic) for each in inputs]
        with self.mode, torch.fx.traceback.preserve_node_meta():
            self.gm = make_fx(function, pre_dispatch=True, tracing_mode="real")(*fakes)
        self.inputs = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        outputs: Any = next(node for node in self.gm.graph.nodes if node.op == "output").args[0]
        self.outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        self.values: dict[sympy.Symbol, int] = {}
        for real, fake in zip(inputs, fakes, strict=True):
            for size, symbolic in zip(real.shape, fake.shape, strict=True):
                if isinstance(symbolic, torch.SymInt) and symbolic.node.expr.is_Symbol:
                    self.values[symbolic.node.expr] = size

    def _fake(self, tensor: Tensor, dynamic: tuple[int, ...]) -> Tensor:
        sizes = [
            DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC
            for dim in range(tensor.dim())
        ]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self.mode.from_tensor(tensor, symbolic_context=context)

    def size(self, expression: Any) -> int:
        """Return a size with the sizes of the inputs put in."""
        return int(sympy.sympify(expression).subs(self.values))

    def at(self, axes: Axes, indices: Indices, shape: Any, place: tuple[int, ...]) -> dict:
        """Return the values of all symbols at one place of a tensor with these `indices`."""
        values: dict[sympy.Symbol, int] = dict(self.values)
        for index, size, number in zip(indices, shape, place, strict=True):
            digits = axes.digits(index, size)
            assert digits is not None, f"{index} is a whole dimension"
            rest = number
            for axis in reversed(digits):
                rest, values[axis] = divmod(rest, self.size(axes.sizes[axis]))
            assert rest == 0
        return values


def with_finer_axes(match: Callable[[Axes], Any]) -> Any:
    """Return the result of `match` over axes fine enough; raise AssertionError if none are."""
    axes = Axes()
    asked = []
    for _ in range(FINEST):
        try:
            return match(axes)
        except SplitAxis as request:
            asked.append(str(request))
            axes.split(request)
    raise AssertionError(f"axes are split for ever: {asked}")


def whole(axes: Axes, node: torch.fx.Node, name: str = "o") -> Indices:
    """Return an index over each dimension of a tensor."""
    return tuple(axes.index(f"{name}{place}", size) for place, size in enumerate(shape_of(node)))


def places(shape: tuple[int, ...], most: int, seed: int = 0) -> Iterator[tuple[int, ...]]:
    """Yield all places of a tensor of this shape, or as many random ones."""
    every = list(itertools.product(*map(range, shape)))
    yield from random.Random(seed).sample(every, min(most, len(every)))


def loads(traced: Traced, names: Names, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the value of every node of the graph, by the name of the node's elements."""
    found: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                found[names.of(n)] = value.clone()
            return value

    Recorder(traced.gm).run(*(each.clone() for each in inputs))
    return found


def evaluate(element: Any, at: dict[sympy.Symbol, int], values: dict[str, Tensor]) -> Any:
    """Return the number that an expression of axes and of elements of tensors stands for."""
    element = sympy.sympify(element)
    if isinstance(element, sympy.Piecewise):  # not evaluated: the other branches may be nonsense
        for value, condition in element.args:
            if evaluate(condition, at, values):
                return evaluate(value, at, values)
    if isinstance(element, Flag):
        return bool(evaluate(element.args[0], at, values))
    if isinstance(element, sympy.Indexed):
        index = [int(evaluate(each, at, values)) for each in element.indices]
        tensor = values[str(element.base)]
        assert all(0 <= i < n for i, n in zip(index, tensor.shape, strict=True)), element
        return tensor[tuple(index)].item()
    if element.is_Symbol:
        return at[element] if element in at else values[element.name].item()
    if not element.args:
        return bool(element) if isinstance(element, Boolean) else float(element)
    return _applied(element.func, *(evaluate(each, at, values) for each in element.args))


@functools.lru_cache(2**16, typed=True)
def _applied(function: Callable[..., Any], *parts: bool | float) -> bool | float:
    """Return the number that a function of sympy gives, which few of all places differ in."""
    made = function(*(sympy.sympify(each) for each in parts))
    return bool(made) if isinstance(made, Boolean) else float(made)
