"""Let caches that grow by concatenation keep room behind them, so that no step copies the past.

    keys = cat((past, new), -2)    becomes    keys = append(past, new, 2)

Here `past` is an input that nothing else reads. `keys` is an output that only operators of this
package read besides: `append` changes its strides, and their kernels take any strides.

A cache of symbolic length can have strides that depend on the length. Such a cache keeps its
layout, since Dynamo would have to compile once more for the new one.
"""

from __future__ import annotations

import torch
import torch.fx

from lychee_compile.kernels.operators import (  # noqa: F401  registers the operator
    append,
)
from lychee_compile.passes.graph.dataflow import aten, calls, is_tensor, shape_of, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.torch_private import FakeTensorMode, operator_namespace


def append_in_place(gm: torch.fx.GraphModule, mode: FakeTensorMode) -> None:
    """Replace each concatenation that grows a cache, if the graph allows it, by `append`."""
    emit = Emitter(gm.graph, mode)
    for node in list(gm.graph.nodes):
        grown = _growth(node)
        if grown is None:
            continue
        with gm.graph.inserting_before(node):
            appended = emit(torch.ops.lychee.append.default, *grown, _dim(node))
        appended.meta = {**node.meta, **appended.meta}
        node.replace_all_uses_with(appended)
        gm.graph.erase_node(node)


def _growth(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """Return the cache and the tensor put behind it if `node` only grows a cache, else None."""
    if not calls(node, aten.cat.default) or not any(user.op == "output" for user in node.users):
        return None
    parts = list(node.args[0]) if isinstance(node.args[0], (list, tuple)) else []
    tensors = [each for each in parts if isinstance(each, torch.fx.Node) and is_tensor(each)]
    if len(parts) != 2 or len(tensors) != 2 or tensors[0] is tensors[1]:
        return None
    past, new = tensors
    same = value_of(past).dtype == value_of(new).dtype and value_of(past).dim() > 1
    any_length = all(isinstance(stride, int) for stride in value_of(past).stride())
    read_once = all(user is node or calls(user, aten.sym_size.int) for user in past.users)
    ours = all(user.op == "output" or _takes_any_strides(user) for user in node.users)
    fits = past.op == "placeholder" and same and any_length and read_once and ours
    return (past, new) if fits else None


def _takes_any_strides(user: torch.fx.Node) -> bool:
    """True if `user` gives the same result for a tensor of other strides."""
    is_ours = operator_namespace(user.target) == "lychee"
    return is_ours or calls(user, aten.sym_size.int)


def _dim(node: torch.fx.Node) -> int:
    """Return the dimension that a concatenation runs along, counted from the front."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape_of(node))
