"""Writes to a part of a tensor, as operators on the whole that say what the part gets.

    scores[:, :, 1:, 1:] += bias            scores + pad(bias, (1, 0, 1, 0))
    scores[..., 9:] = -inf                  masked_fill(scores, arange(n) >= 9, -inf)

So detection sees a bias and a mask. Other writes become a scatter (`view_inverses`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    is_operator,
    is_tensor,
    operator_key,
    operator_of,
    same,
    same_shape,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.graph.shared_memory import SharedMemory, same_view
from lychee_compile.passes.graph.view_inverses import sizes_of

LONGEST = 12
"""Largest number of operators between a part and the sum that is written to it."""


@dataclass(frozen=True)
class _Box:
    """A part of a tensor: in some of its dimensions, the indices from a first one on."""

    whole: torch.fx.Node
    starts: dict[int, int]
    """First index of each dimension that is cut."""
    sizes: tuple[Any, ...]
    """Size of the part in each dimension of the whole."""

    def rest(self, dim: int) -> int | None:
        """Return how many indices of the whole follow the part; None if that is not known."""
        start, size, all_of_it = self.starts[dim], self.sizes[dim], shape_of(self.whole)[dim]
        if same(start + size, all_of_it):
            return 0
        known = isinstance(size, int) and isinstance(all_of_it, int)
        return all_of_it - start - size if known else None


def changed_part(
    node: torch.fx.Node, target: torch.fx.Node, memory: SharedMemory, emit: Emitter
) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """Return a tensor of which `target` is a part, and its value after the write `node`.

    None if the write is neither a sum nor a number, or `target` no part that can be told.
    """
    box = _box_of(target, memory)
    if box is None or not box.starts:
        return None
    number = _number(node)
    if number is not None:
        return box.whole, _filled(box, number, emit)
    steps = _sum_of(node, target, memory)
    if steps is None or len(shape_of(target)) != len(box.sizes):
        return None
    value = _added(steps, target, box, emit)
    if value_of(value).dtype != value_of(target).dtype:
        return None
    return box.whole, value


def _box_of(target: torch.fx.Node, memory: SharedMemory) -> _Box | None:
    """Return the part of the last tensor behind `target` that is no slice of another."""
    views: list[torch.fx.Node] = []
    node = target
    while is_operator(node, "slice") or is_operator(node, "select"):
        views.append(node)
        node = first_input(node)
    whole, starts = node, dict[int, int]()
    sizes, dims = list(shape_of(whole)), list(range(len(shape_of(whole))))
    for view in reversed(views):
        dim = dims[argument(view, "dim", 0) % len(dims)]
        size = shape_of(first_input(view))[dims.index(dim)]
        start = _start(view, size)
        if start is None or memory.source(view) is None:
            return None
        if is_operator(view, "select"):
            sizes[dim] = 1
            dims.remove(dim)
        else:
            sizes[dim] = shape_of(view)[dims.index(dim)]
            if same(sizes[dim], size):
                continue
        starts[dim] = starts.get(dim, 0) + start
    return _Box(whole, starts, tuple(sizes))


def _start(view: torch.fx.Node, size: Any) -> int | None:
    """Return the first index that a slice or select of `size` indices takes; None if unknown."""
    name = "index" if is_operator(view, "select") else "start"
    start = argument(view, name, 0) or 0
    if argument(view, "step", 1) != 1 or not isinstance(start, int):
        return None
    if isinstance(size, int):
        return max(start + size, 0) if start < 0 else min(start, size)
    return start if start >= 0 else None


def _number(node: torch.fx.Node) -> Any:
    """Return the number that a write fills its target with; None if it writes something else."""
    if is_operator(node, "zero_"):
        return 0
    if not (is_operator(node, "fill_") or calls(node, aten.copy_.default)):
        return None
    value = node.args[1]
    plain = isinstance(value, (int, float)) or (is_tensor(value) and not shape_of(value))  # type: ignore[arg-type]
    return value if plain else None


def _filled(box: _Box, number: Any, emit: Emitter) -> torch.fx.Node:
    overload = aten.masked_fill.Tensor if is_tensor(number) else aten.masked_fill.Scalar
    return emit(overload, box.whole, _inside(box, emit), number)


def _inside(box: _Box, emit: Emitter) -> torch.fx.Node:
    """Return the mask of the part, bool, broadcast to the whole."""
    mask, sizes = None, sizes_of(box.whole, emit)
    for dim, start in box.starts.items():
        rest = box.rest(dim)
        device = value_of(box.whole).device
        index = emit(aten.arange.default, sizes[dim], device=device, pin_memory=False)
        tests = [] if start == 0 else [emit(aten.ge.Scalar, index, start)]
        if rest != 0:
            tests.append(emit(aten.lt.Scalar, index, _end(box, dim)))
        for test in tests:
            wide = emit(aten.view.default, test, [-1, *[1] * (len(sizes) - dim - 1)])
            mask = wide if mask is None else emit(aten.logical_and.default, mask, wide)
    assert mask is not None
    return mask


def _end(box: _Box, dim: int) -> int:
    size = box.sizes[dim]
    if not isinstance(size, int):
        raise TypeError(f"the size {size} of a part is symbolic")
    return box.starts[dim] + size


@dataclass(frozen=True)
class _Step:
    """One operator between a part and the value that is written to it."""

    node: torch.fx.Node
    added: Any = None
    """The tensor or number that a sum adds; None for a view."""


def _sum_of(node: torch.fx.Node, target: torch.fx.Node, memory: SharedMemory) -> list[_Step] | None:
    """Return the steps from `target` to the value that `node` writes to it, the first one first.

    None if that value is no sum that starts with `target`.
    """
    if operator_key(node) in ("add_", "sub_"):
        return [_Step(node, node.args[1])]
    if calls(node, aten.copy_.default) and isinstance(node.args[1], torch.fx.Node):
        return _steps_to(node.args[1], target, memory, LONGEST)
    return None


def _steps_to(
    node: torch.fx.Node, target: torch.fx.Node, memory: SharedMemory, left: int
) -> list[_Step] | None:
    if node.op != "call_function" or value_of(node).dtype != value_of(target).dtype or not left:
        return None
    if same_view(node, target, memory):
        return []
    view = operator_of(node).view
    if view is not None and view.keeps_all:
        steps = _steps_to(first_input(node), target, memory, left - 1)
        return None if steps is None else [*steps, _Step(node)]
    if not (calls(node, aten.add.Tensor) or calls(node, aten.sub.Tensor)):
        return None
    operands = list(node.args[:2])
    for behind, added in (operands, reversed(operands))[: 1 + is_operator(node, "add")]:
        if isinstance(behind, torch.fx.Node) and same_shape(shape_of(behind), shape_of(node)):
            steps = _steps_to(behind, target, memory, left - 1)
            if steps is not None:
                return [*steps, _Step(node, added)]
    return None


def _added(steps: list[_Step], target: torch.fx.Node, box: _Box, emit: Emitter) -> torch.fx.Node:
    """Return the whole with the terms of a sum added to its part, one after the other."""
    whole = box.whole
    for place, step in enumerate(steps):
        if step.added is None:
            continue
        views = [each.node for each in steps[place + 1 :] if each.added is None]
        if is_tensor(step.added):
            term = _padded(_laid_out(step, views, target, box, emit), box, emit)
        else:
            term = _inside_only(step.added, box, emit)
        adds = operator_key(step.node).startswith("add")
        alpha = argument(step.node, "alpha", 1)
        whole = emit(aten.add.Tensor if adds else aten.sub.Tensor, whole, term, alpha=alpha)
    return whole


def _laid_out(
    step: _Step, views: list[torch.fx.Node], target: torch.fx.Node, box: _Box, emit: Emitter
) -> torch.fx.Node:
    """Return the tensor that a sum adds in the shape of `target`, where that is cut at least."""
    tensor = step.added
    if views:
        wide = emit(aten.expand.default, tensor, sizes_of(step.node, emit))
        tensor = emit(aten.clone.default, wide, memory_format=torch.contiguous_format)
        for view in views:
            tensor = emit(view.target, tensor, *view.args[1:], **view.kwargs)
        return tensor
    missing = len(box.sizes) - len(shape_of(tensor))
    sizes = [
        size if dim in box.starts else (1 if dim < missing else -1)
        for dim, size in enumerate(sizes_of(target, emit))
    ]
    return emit(aten.expand.default, tensor, sizes)


def _padded(tensor: torch.fx.Node, box: _Box, emit: Emitter) -> torch.fx.Node:
    """Return a tensor with zeros around it where the whole goes on around the part."""
    padding: list[int] = []
    for dim in reversed(range(min(box.starts), len(box.sizes))):
        rest = box.rest(dim) if dim in box.starts else 0
        if rest is None:
            raise TypeError(f"dimension {dim} of a part has a symbolic rest")
        padding += [box.starts.get(dim, 0), rest]
    return emit(aten.constant_pad_nd.default, tensor, padding, 0)


def _inside_only(number: Any, box: _Box, emit: Emitter) -> torch.fx.Node:
    """Return a number in the part of the whole, and zero around it."""
    if value_of(box.whole).dtype != torch.float32 or not isinstance(number, (int, float)):
        raise TypeError(f"{number} may be rounded")
    return emit(aten.where.Scalar, _inside(box, emit), float(number), 0.0)
