"""Give each part of an input that holds several caches a node of its own, which counts as memory.

    keys_0 = select(cache, 0, 0)              cache [layers, B, H, L, D]
    index_copy_(keys_0, 2, positions, new)
    again = select(cache, 0, 0)         ->    the node that index_copy_ gives
    keys_1 = select(cache, 0, 1)

An input is taken apart if the graph reads and writes it by such parts alone, of which no two share
an element. Then a write to one part leaves the others as they are.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch.fx
from torch import Tensor

from lychee_compile.passes.graph.aliasing import as_part, is_view_of_part, storage_of, written_by
from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    calls,
    first_input,
    is_tensor,
    operator_of,
    shape_of,
)
from lychee_compile.passes.graph.operator_facts import View

_Bounds: TypeAlias = tuple[tuple[int, int], ...]
"""First entry and number of entries of a part along each dimension of the input; a number of 0
stands for a dimension that the part does not have."""


def separate_parts(graph: torch.fx.Graph) -> None:
    """Take apart the inputs of `graph` that hold several caches, in place."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    written = {storage_of(target) for node in graph.nodes for target in written_by(node)}
    for node in graph.find_nodes(op="placeholder"):
        if node in written and is_tensor(node):
            _take_apart(node, order)


def view_of_part(part: torch.fx.Node) -> Callable[[Tensor], Tensor]:
    """Return a function from the input that `part` belongs to, to the part."""
    steps = []
    while part.op != "placeholder":
        steps.append((part.target, part.args[1:]))
        part = first_input(part)

    def view(tensor: Any) -> Tensor:
        for target, rest in reversed(steps):
            tensor = target(tensor, *rest)  # type: ignore[operator]
        return tensor

    return view


def _take_apart(node: torch.fx.Node, order: dict[torch.fx.Node, int]) -> None:
    found = _parts_of(node)
    if not found:
        return
    by_bounds: dict[_Bounds, list[torch.fx.Node]] = {}
    for part in found:
        bounds = _bounds(part)
        if bounds is None:
            return
        by_bounds.setdefault(bounds, []).append(part)
    if not all(_disjoint(*pair) for pair in itertools.combinations(by_bounds, 2)):
        return
    for alike in by_bounds.values():
        first, *others = sorted(alike, key=order.__getitem__)
        for other in others:
            other.replace_all_uses_with(first)
        as_part(first)
        _read_what_is_written(first, order)


def _parts_of(node: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the parts by which a graph uses an input; none if it uses it as a whole."""
    parts: list[torch.fx.Node] = []
    waiting = [each for each in node.users if not _asks_size(each)]
    while waiting:
        user = waiting.pop()
        if user.op == "output":
            continue
        inner = _pieces(user)
        if inner is None:
            return []
        for piece in inner:
            deeper = [_pieces(each) for each in piece.users]
            if deeper and all(each is not None for each in deeper):
                waiting += piece.users
            else:
                parts.append(piece)
    return parts


def _pieces(node: torch.fx.Node) -> list[torch.fx.Node] | None:
    """Return the parts that an operator shows; None if it is no cut at places that are known."""
    fixed = all(not isinstance(each, torch.fx.Node) for each in node.args[1:]) and not node.kwargs
    view = operator_of(node).view
    if not fixed or node.op != "call_function":
        return None
    if view is View.SELECT:
        return [node]
    if view is View.PARTS:
        users = list(node.users)
        return users if all(map(is_view_of_part, users)) else None
    return None


def _asks_size(node: torch.fx.Node) -> bool:
    return calls(node, aten.sym_size.int)


def _bounds(part: torch.fx.Node) -> _Bounds | None:
    """Return the part of the input that a node shows; None if that depends on symbolic sizes."""
    chain = list(_chain(part))
    source = chain[0]
    dims = list(range(len(shape_of(source))))
    bounds = [(0, size if isinstance(size, int) else -1) for size in shape_of(source)]
    for step in chain[1:]:
        several = step.target is operator.getitem
        maker = first_input(step) if several else step
        dim = argument(maker, "dim", 0) % len(dims)
        at = step.args[1] if several else argument(maker, "index")
        start, size = bounds[dims[dim]]
        if size < 0 or not isinstance(at, int):
            return None
        if not several or operator_of(maker).name == "unbind":
            bounds[dims[dim]] = (start + at % size, 0)
            del dims[dim]
            continue
        lengths = [each.shape[dim] for each in maker.meta["val"]]
        if not all(isinstance(each, int) for each in lengths):
            return None
        bounds[dims[dim]] = (start + sum(lengths[:at]), lengths[at])
    return tuple(bounds)


def input_of(part: torch.fx.Node) -> torch.fx.Node:
    """Return the input that `part` belongs to, or is."""
    return part if part.op == "placeholder" else next(_chain(part))


def _chain(part: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """Yield the input that a part belongs to, and each view on the way from it to the part."""
    source = first_input(part)
    if part.target is operator.getitem:
        source = first_input(source)
    if source.op == "placeholder":
        yield source
    else:
        yield from _chain(source)
    yield part


def _disjoint(left: _Bounds, right: _Bounds) -> bool:
    """True if two parts share no element."""
    return any(
        min(a[1], b[1]) >= 0 and (a[0] + max(a[1], 1) <= b[0] or b[0] + max(b[1], 1) <= a[0])
        for a, b in zip(left, right, strict=True)
    )


def _read_what_is_written(part: torch.fx.Node, order: dict[torch.fx.Node, int]) -> None:
    """Let what reads a part after a write to it read the result of the write.

    So it is for whole inputs, since tracing follows them.
    """
    for user in sorted(part.users, key=order.__getitem__):
        if written_by(user) == [part] and user.args[:1] == (part,):
            later = partial(_is_behind, order, order[user])
            part.replace_all_uses_with(user, delete_user_cb=later)
            _read_what_is_written(user, order)
            return


def _is_behind(order: dict[torch.fx.Node, int], place: int, node: torch.fx.Node) -> bool:
    return order[node] > place
