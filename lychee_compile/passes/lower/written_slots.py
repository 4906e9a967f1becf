"""Slots of a key cache that a graph names when it writes them."""

from __future__ import annotations

import operator

import torch
import torch.fx

from lychee_compile.passes.detect.caching.caches import CacheBinding
from lychee_compile.passes.detect.caching.call_numbers import emit_number
from lychee_compile.passes.detect.caching.token_writes import RowSlots, Span
from lychee_compile.passes.graph.dataflow import ancestors, aten, operator_key, shape_of, value_of
from lychee_compile.passes.graph.emitter import Emitter

REMAINDERS = ("remainder", "fmod")
"""ATen operators that bring positions back to the first slots."""


def named_slots(binding: CacheBinding, emit: Emitter) -> torch.fx.Node | None:
    """Return or emit the slots written, int [T] or [B, T]; None: the graph does not name them.

    Slots are tokens of the attention: those of a tail begin behind its past.
    """
    slots = _named(binding, emit)
    if slots is None or binding.first_token == 0:
        return slots
    size = shape_of(binding.key)[binding.token_dim]
    count = (
        size if isinstance(size, int) else emit(aten.sym_size.int, binding.key, binding.token_dim)
    )
    # A negative slot counts from the end of the tail.
    inside = emit(aten.remainder.Scalar, slots, count)
    return emit(aten.add.Tensor, inside, emit_number(binding.first_token, emit))


def _named(binding: CacheBinding, emit: Emitter) -> torch.fx.Node | None:
    slots = binding.slots
    if isinstance(slots, RowSlots):
        return _of_rows(slots, emit)
    if isinstance(slots, Span):
        stop = emit(operator.add, slots.start, slots.count) if slots.stop is None else slots.stop
        device = value_of(binding.key).device
        return emit(aten.arange.start, slots.start, stop, device=device, dtype=torch.int64)
    if slots is None or len(shape_of(slots)) == 1:
        return slots
    return emit(aten.reshape.default, slots, [-1])


def _of_rows(slots: RowSlots, emit: Emitter) -> torch.fx.Node:
    """Emit slots of each row, int [B, T]."""
    kept = [slots.row_dim, *([] if slots.token_dim is None else [slots.token_dim])]
    node = slots.node
    for dim in reversed(range(len(shape_of(node)))):
        if dim not in kept:
            node = emit(aten.squeeze.dim, node, dim)
    if len(kept) == 1:
        return emit(aten.unsqueeze.default, node, -1)
    return emit(aten.transpose.int, node, 0, 1) if kept[0] > kept[1] else node


def wrapping_operator(binding: CacheBinding) -> str | None:
    """Return the operator that may bring the slots written back to the first ones.

    It is a remainder, or a choice between two positions that are both computed, as `pos - L` for
    `pos`. None: the graph shows no such operator, or does not compute the slots.
    """
    slots = binding.slots
    named: tuple[object, ...] = (slots,)
    if isinstance(slots, Span):
        named = slots.start, slots.stop
    elif isinstance(slots, RowSlots):
        named = (slots.node,)
    waiting = [each for each in named if isinstance(each, torch.fx.Node)]
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        if operator_key(node) in REMAINDERS or node.target is operator.mod:
            return "a remainder"
        if operator_key(node) == "where" and all(map(_varies, node.args[1:])):
            return "a choice between positions"
        more = set(_inputs_of_value(node)) - met
        met |= more
        waiting += more
    return None


def _inputs_of_value(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the inputs that the value of a node is computed from; conditions are left out."""
    if operator_key(node) == "where":
        return [each for each in node.args[1:] if isinstance(each, torch.fx.Node)]
    return list(node.all_input_nodes)


def _varies(value: object) -> bool:
    """True if a value depends on an input of the graph."""
    if not isinstance(value, torch.fx.Node):
        return False
    return any(each.op == "placeholder" for each in ancestors(value))
