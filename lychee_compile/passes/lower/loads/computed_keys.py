"""Keys that the host computes from what is stored, to build an index between calls.

    use.keys(cache, scale)          cache and scales as a call leaves them: keys [B, Hkv, L, D]

A tensor that the graph computes besides, as a table of cosines, is computed anew by a small graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.fx
from torch import Tensor

from lychee_compile.kernels.reference.loaded_tensor import LoadedTensor
from lychee_compile.kernels.reference.loads import Load as Evaluated
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.caching.caches import CacheBinding, Watched
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
    own = {
        node: graph.placeholder(f"given_{number}")
        for number, node in enumerate(_given(binding, emit.graph))
    }
    graph.output(tuple(_copied(leaf, graph, own) for _, leaf in binding.load.leaves))
    return partial(_evaluated, torch.fx.GraphModule({}, graph), loads, _places(binding, loads))


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


def _places(binding: CacheBinding, loads: KernelLoads) -> tuple[tuple[int, tuple[int, int]], ...]:
    """Return the sizes of keys that a call tells: each a dimension of keys, and where it is."""
    load, places = binding.load, []
    assert load is not None
    for dim, size in enumerate(loads.sizes[:4]):
        if isinstance(size, int):
            continue
        of = {0: load.batch_dim, 2: load.token_dim}.get(dim)
        found = [(n, of(name)) for n, (name, leaf) in enumerate(load.leaves) if of is not None]
        known = [(n, at) for n, at in found if at is not None and load.leaves[n][1] is binding.key]
        if not known:
            name = "the size of the keys"
            raise NoKernel(reasons.SIZE_SYMBOLIC(name=name, size=value_of(size)))
        places.append((dim, known[0]))
    return tuple(places)


def _evaluated(
    leaves_of: Callable[..., tuple[Tensor, ...]],
    loads: KernelLoads,
    places: tuple[tuple[int, tuple[int, int]], ...],
    *given: Tensor,
) -> Tensor:
    with torch.no_grad():
        leaves = leaves_of(*given)
    shape = [size if isinstance(size, int) else 0 for size in loads.sizes[:4]]
    for dim, (number, at) in places:
        shape[dim] = leaves[number].shape[at]
    batch, heads, tokens, channels = shape
    load = Evaluated(loads.key_text, loads.dtype, leaves, (batch, heads, tokens, channels))
    return LoadedTensor.of(load)
