"""Operators that give as a new tensor what a write in place gives.

add_(x, 1)  ->  add(x, 1)         softmax(x, -1, out=y)  ->  softmax(x, -1)
copy_(x, y)  ->  clone(y)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from lychee_compile.passes.graph.dataflow import (
    aten,
    calls,
    is_tensor,
    operator_of,
    same_shape,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.graph.shared_memory import UnknownMemory


def written_value(node: torch.fx.Node, target: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
    """Return what the operator `node` writes to `target` as a new tensor.

    Raises `UnknownMemory` if there is no operator for it.
    """
    value = _copied(node, target, emit) if calls(node, aten.copy_.default) else None
    if value is None:
        functional = _functional(node.target) if node.op == "call_function" else None
        if functional is None or operator_of(node).only_in_place:
            raise UnknownMemory
        outputs = [each.name for each in node.target._schema.arguments if each.is_out]  # type: ignore[union-attr]
        kwargs = {name: each for name, each in node.kwargs.items() if name not in outputs}
        value = emit(functional, *node.args, **kwargs)
    made = value_of(value)
    if not isinstance(made, torch.Tensor) or made.dtype != value_of(target).dtype:
        raise UnknownMemory
    if not same_shape(tuple(made.shape), shape_of(target)):
        raise UnknownMemory
    return value


def _copied(node: torch.fx.Node, target: torch.fx.Node, emit: Emitter) -> torch.fx.Node | None:
    """Return a copy of the tensor that is copied to `target`; None if it is laid out otherwise."""
    source = node.args[1]
    if not is_tensor(source):
        return None
    assert isinstance(source, torch.fx.Node)
    before, after = value_of(source), value_of(target)
    if before.device != after.device or not same_shape(shape_of(source), shape_of(target)):
        return None
    if not same_shape(before.stride(), after.stride()) and not after.is_contiguous():
        return None
    form = torch.contiguous_format if after.is_contiguous() else torch.preserve_format
    if before.dtype == after.dtype:
        return emit(aten.clone.default, source, memory_format=form)
    return emit(aten._to_copy.default, source, dtype=after.dtype, memory_format=form)


def _functional(target: Any) -> Any:
    """Return the operator that gives what `target` writes as a new tensor; None if none does."""
    schema = target._schema
    name = schema.name.partition("::")[2]
    outputs = [each for each in schema.arguments if each.is_out]
    if not outputs:
        if not name.endswith("_") or name.endswith("__"):
            return None
        return getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    wanted = [(each.name, str(each.type)) for each in schema.arguments if not each.is_out]
    packet = getattr(aten, name, None)
    for overload in packet.overloads() if len(outputs) == 1 and packet else ():
        other = getattr(packet, overload)._schema
        if wanted == [(each.name, str(each.type)) for each in other.arguments]:
            return getattr(packet, overload)
    return None
