"""Let caches that grow by concatenation keep room behind them, so that no step copies the past.

    keys = cat((past, new), -2)    becomes    keys = append(past, new, 2)

Here `past` is an input that nothing else reads. `keys` is an output that only operators of this
package read besides: the strides of `append` are not those of `cat`, and their kernels take any.

The strides of `keys` depend on how many slots its buffer has, so that Dynamo gives them a symbol of
their own when `keys` comes back as `past`. A graph with such a symbol takes a contiguous cache as
well. Tracing asks if its inputs are contiguous, and the answer would become a guard. So `settled`
traces them as if they were, which makes no difference to `append`.

A graph may have been traced for contiguous caches of symbolic length. Such a cache is concatenated,
since Dynamo would have to compile once more for any other layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from lychee_compile.kernels.operators import (  # noqa: F401  registers the operator
    append,
)
from lychee_compile.passes.graph.dataflow import aten, calls, is_tensor, shape_of, value_of
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.torch_private import FakeTensorMode, operator_namespace, symbols_of

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate, "size", "dim", "numel")
"""Functions and methods of Dynamo's graphs whose results do not depend on strides."""


def settled(gm: torch.fx.GraphModule, fakes: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Return the fake inputs of Dynamo's `gm`, contiguous if they have free strides and only grow.

    Nothing but concatenations may read such an input, as a result could depend on strides.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    return [
        _contiguous(fake, mode) if _has_free_strides(fake) and _only_grows(node) else fake
        for node, fake in zip(inputs, fakes, strict=True)
    ]


def append_in_place(gm: torch.fx.GraphModule, mode: FakeTensorMode, fakes: list[Any]) -> bool:
    """Replace each concatenation that grows a cache, if the graph allows it, by `append`.

    `fakes` are the fake inputs that Dynamo traced with. Those that `append` takes are replaced by
    the `settled` ones. Returns True if the graph has an `append`.
    """
    emit = Emitter(gm.graph, mode)
    inputs = gm.graph.find_nodes(op="placeholder")
    found = False
    for node in list(gm.graph.nodes):
        grown = _growth(node)
        if grown is None or not _takes_any_layout(fakes[inputs.index(grown[0])]):
            continue
        found = True
        fakes[inputs.index(grown[0])] = value_of(grown[0])
        with gm.graph.inserting_before(node):
            appended = emit(torch.ops.lychee.append.default, *grown, _dim(node))
        appended.meta = {**node.meta, **appended.meta}
        node.replace_all_uses_with(appended)
        gm.graph.erase_node(node)
    return found


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
    read_once = all(user is node or calls(user, aten.sym_size.int) for user in past.users)
    ours = all(user.op == "output" or _takes_any_strides(user) for user in node.users)
    fits = past.op == "placeholder" and same and read_once and ours
    return (past, new) if fits else None


def _takes_any_layout(past: torch.Tensor) -> bool:
    """True if the graph was made for one size of a cache, or takes free slots behind its tokens."""
    return _has_free_strides(past) or not set().union(*map(symbols_of, past.stride()))


def _has_free_strides(fake: object) -> bool:
    """True if the strides of a tensor do not follow from its sizes."""
    if not isinstance(fake, torch.Tensor):
        return False
    by_size, by_stride = (set().union(*map(symbols_of, of)) for of in (fake.shape, fake.stride()))
    return not by_stride <= by_size


def _only_grows(node: torch.fx.Node) -> bool:
    """True if concatenations alone read an input of a graph of Dynamo's."""
    return all(user.target in _CONCATENATIONS for user in node.users)


def _contiguous(fake: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)


def _takes_any_strides(user: torch.fx.Node) -> bool:
    """True if `user` gives the same result for a tensor of other strides."""
    is_ours = operator_namespace(user.target) == "lychee"
    return is_ours or calls(user, aten.sym_size.int)


def _dim(node: torch.fx.Node) -> int:
    """Return the dimension that a concatenation runs along, counted from the front."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % len(shape_of(node))
