"""Keys that the host computes from what is stored, to build an index between calls.

    use.keys(cache, scale)          cache and scales as a call leaves them: keys [B, Hkv, L, D]
    use.keys(tail, past, 4096)      the last arguments are sizes that only a call tells

A tensor that the graph computes besides, as a table of cosines, is computed anew by a small graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor

from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.loads import Load as Evaluated
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.caching.caches import CacheBinding, Watched
from lychee_compile.passes.detect.caching.loads import Load
from lychee_compile.passes.graph.aliasing import written_by
from lychee_compile.passes.graph.dataflow import first_input, outputs_of, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.lower.kernel_support import NoKernel
from lychee_compile.passes.lower.loads.kernel_loads import KernelLoads


def computed_keys(
    binding: CacheBinding, loads: KernelLoads, emit: Emitter
) -> Callable[..., Tensor]:
    """Return a function from a cache, and the tensors beside it, to keys [B, Hkv, L, D].

    Keys are evaluated as they are read. Raises `NoKernel` if the tensors do not tell their sizes,
    or what the graph computes besides.
    """
    assert binding.load is not None
    graph = torch.fx.Graph()
    given = _given(binding, emit.graph)
    own = {node: graph.placeholder(f"given_{number}") for number, node in enumerate(given)}
    graph.output(tuple(_copied(leaf, graph, own) for _, leaf in binding.load.leaves))
    return _Keys(
        torch.fx.GraphModule({}, graph), loads, len(given), binding.numbers, _places(binding, loads)
    )


def _given(binding: CacheBinding, graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """Return the nodes that the cache and the tensors beside it are, after a call."""
    outputs = outputs_of(graph)
    given = []
    places: list[CacheBinding | Watched] = [binding, *binding.watched]
    for each in places:
        node = each.source if each.output is None else outputs[each.output]
        assert isinstance(node, torch.fx.Node)
        given.append(node)
    return given


def _copied(
    node: torch.fx.Node, graph: torch.fx.Graph, own: dict[torch.fx.Node, torch.fx.Node]
) -> torch.fx.Node:
    """Copy a node, and what it is computed from, to another graph.

    A tensor that the call writes in place is as it is after the write.
    """
    if node in own:
        return own[node]
    if node.op != "call_function":
        raise NoKernel(reasons.KEYS_COMPUTED_NO_KERNEL(why=f"{node} is known to the graph alone"))
    if written_by(node):
        return _copied(first_input(node), graph, own)
    for each in node.all_input_nodes:
        own[each] = _copied(each, graph, own)
    own[node] = graph.node_copy(node, own.__getitem__)
    return own[node]


@dataclass(frozen=True)
class _Place:
    """Place of a size of keys: a dimension of one of the tensors that they are computed from."""

    leaf: int
    dim: int
    more: sympy.Expr
    """Number that is added: the tokens before those of a tail."""


def _places(binding: CacheBinding, loads: KernelLoads) -> dict[int, _Place]:
    """Return the places of the sizes of keys that a call tells, by the dimension of keys."""
    load, places = binding.load, {}
    assert load is not None
    for dim, size in enumerate(loads.sizes[:4]):
        if isinstance(size, int):
            continue
        known = [
            (leaf, _place(load, name, dim))
            for leaf, (name, node) in enumerate(load.leaves)
            if node is binding.key
        ]
        leaf, place = known[0] if known else (0, None)
        if place is None:
            name = "the size of the keys"
            raise NoKernel(reasons.SIZE_SYMBOLIC(name=name, size=value_of(size)))
        places[dim] = _Place(leaf, *place)
    return places


def _place(load: Load, name: str, dim: int) -> tuple[int, sympy.Expr] | None:
    """Return the dimension of a leaf that tells a size of keys, and what is added to it."""
    if dim == 2:
        return load.place_of_tokens(name)
    batch = load.batch_dim(name) if dim == 0 else None
    return None if batch is None else (batch, sympy.S.Zero)


@dataclass(frozen=True)
class _Keys:
    """Function from what a call is given, or leaves, to keys."""

    leaves_of: Callable[..., tuple[Tensor, ...]]
    loads: KernelLoads
    count: int
    """Number of tensors; sizes come behind them."""
    symbols: tuple[sympy.Symbol, ...]
    """The sizes, in the order of a call."""
    places: dict[int, _Place]

    def __call__(self, *given: Any) -> Tensor:
        numbers = given[self.count :]
        with torch.no_grad():
            leaves = self.leaves_of(*given[: self.count])
        known = dict(zip(self.symbols, numbers, strict=True))
        shape = [size if isinstance(size, int) else 0 for size in self.loads.sizes[:4]]
        for dim, place in self.places.items():
            shape[dim] = leaves[place.leaf].shape[place.dim] + int(place.more.xreplace(known))
        batch, heads, tokens, channels = shape
        sizes, dtype = (batch, heads, tokens, channels), self.loads.dtype
        return LoadedTensor.of(Evaluated(self.loads.key_text, dtype, leaves, sizes, numbers))
