"""Replace writes to intermediate tensors by new tensors, so that each tensor keeps its value.

    scores.masked_fill_(hidden, -inf)         scores_1 = masked_fill(scores, hidden, -inf)
    weights = softmax(scores, -1)        ->   weights = softmax(scores_1, -1)

Writes to inputs, such as caches, stay as they are, and so do writes through a view. The tensor that
is written to through a view is reported, because it does not keep its value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from lychee_compile.passes.graph.aliasing import storage_of, written_by
from lychee_compile.passes.graph.dataflow import aten, first_input, operator_of, value_of
from lychee_compile.passes.graph.dead_code import erase_dead_code
from lychee_compile.torch_private import FakeTensorMode, is_foreign


def normalise(gm: torch.fx.GraphModule, mode: FakeTensorMode) -> frozenset[torch.fx.Node]:
    """Rewrite `gm` in place, and return the tensors made in the graph that are still written to."""
    erase_dead_code(gm)
    written = set()
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    views: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in list(gm.graph.nodes):
        storage = storage_of(node)
        if storage is not node:
            views.setdefault(storage, []).append(node)
        targets = [storage_of(each) for each in written_by(node)]
        made_here = [each for each in targets if each.op in ("call_function", "call_method")]
        if made_here and not (len(targets) == 1 and _made_functional(node, order, views, mode)):
            written.update(made_here)
    return frozenset(written)


def _made_functional(
    node: torch.fx.Node,
    order: dict[torch.fx.Node, int],
    views: dict[torch.fx.Node, list[torch.fx.Node]],
    mode: FakeTensorMode,
) -> bool:
    """Replace the write `node` by a value that all later users read; True if that was possible."""
    target = first_input(node)
    functional = _functional(node)
    if functional is None or storage_of(target) is not target or _may_be_shared(target, views):
        return False
    place = order[node]
    if any(
        order[user] > place
        for view in views.get(target, [])
        for user in view.users
        if view is not node
    ):
        return False
    value = _value(functional, node, mode)
    before = value_of(target)
    if value is None or value.dtype != before.dtype or value.shape != before.shape:
        return False
    if _strides(value) != _strides(before):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        replacement = graph.call_function(functional, node.args, node.kwargs)
    replacement.meta.update(node.meta)
    replacement.meta["val"] = value
    order[replacement] = place
    node.replace_all_uses_with(replacement)
    target.replace_all_uses_with(replacement, delete_user_cb=lambda user: order[user] > place)
    views.get(target, []).remove(node)
    graph.erase_node(node)
    return True


def _may_be_shared(target: torch.fx.Node, views: dict[torch.fx.Node, list[torch.fx.Node]]) -> bool:
    """True if an operator that is not PyTorch's may show the memory of `target`, and see writes."""
    readers = [user for view in (target, *views.get(target, ())) for user in view.users]
    return is_foreign(target) or any(map(is_foreign, readers))


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides of the dimensions that have more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def _value(functional: Any, node: torch.fx.Node, mode: FakeTensorMode) -> torch.Tensor | None:
    """Return what `functional` gives for the operands of `node`; None if it cannot be run."""
    args: Any = torch.fx.node.map_arg(node.args, value_of)
    kwargs: Any = torch.fx.node.map_arg(node.kwargs, value_of)
    try:
        with mode:
            return functional(*args, **kwargs)
    except (RuntimeError, TypeError):  # such as values of a function that is mapped over a batch
        return None


def _functional(node: torch.fx.Node) -> Any:
    """Return the operator that gives what `node` writes as a new tensor; None if there is none."""
    target: Any = node.target
    name, overload = target._schema.name.partition("::")[2], target._overloadname
    if not name.endswith("_") or name.endswith("__") or operator_of(node).only_in_place:
        return None
    return getattr(getattr(aten, name[:-1], None), overload, None)
