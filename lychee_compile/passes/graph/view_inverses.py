"""Put a changed view back into the tensor that it is a view of, and make views anew.

part = whole[:, 1:]                     whole_1 = slice_scatter(whole, changed, 1, 1)
part.add_(1)                     ->
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx

from lychee_compile.passes.graph.aliasing import is_view_of_part, written_by
from lychee_compile.passes.graph.dataflow import (
    argument,
    aten,
    first_input,
    is_operator,
    operator_of,
    same_shape,
    shape_of,
    value_of,
)
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.passes.graph.operator_facts import View
from lychee_compile.passes.graph.shared_memory import UnknownMemory


def put_back(
    view: torch.fx.Node, source: torch.fx.Node, changed: torch.fx.Node, emit: Emitter
) -> torch.fx.Node:
    """Return `source` with the elements of its `view` replaced by those of `changed`.

    Raises `UnknownMemory` if the view has no inverse here.
    """
    if written_by(view) or value_of(view).dtype != value_of(source).dtype:
        raise UnknownMemory
    if is_view_of_part(view):
        return _part(view, source, changed, emit)
    kind = operator_of(view).view
    if kind is View.COPY:
        return changed
    if kind is View.RESHAPE:
        return emit(aten.reshape.default, changed, sizes_of(source, emit))
    inverse = None if kind is None else _INVERSES.get(kind)
    if inverse is None:
        raise UnknownMemory
    return inverse(view, source, changed, emit)


def sizes_of(node: torch.fx.Node, emit: Emitter) -> list[Any]:
    """Return the shape of a tensor as arguments of a node; symbolic sizes are nodes."""
    return [
        size if isinstance(size, int) else emit(aten.sym_size.int, node, dim)
        for dim, size in enumerate(shape_of(node))
    ]


def _same_again(
    view: torch.fx.Node, _: torch.fx.Node, changed: torch.fx.Node, emit: Emitter
) -> torch.fx.Node:
    return emit(view.target, changed, *view.args[1:], **view.kwargs)


def _permute(
    view: torch.fx.Node, source: torch.fx.Node, changed: torch.fx.Node, emit: Emitter
) -> torch.fx.Node:
    rank = len(shape_of(source))
    dims = [int(dim) % rank for dim in argument(view, "dims")]
    return emit(aten.permute.default, changed, [dims.index(dim) for dim in range(rank)])


def _select(
    view: torch.fx.Node, source: torch.fx.Node, changed: torch.fx.Node, emit: Emitter
) -> torch.fx.Node:
    dim, index = argument(view, "dim"), argument(view, "index")
    return emit(aten.select_scatter.default, source, changed, dim, index)


def _slice(
    view: torch.fx.Node, source: torch.fx.Node, changed: torch.fx.Node, emit: Emitter
) -> torch.fx.Node:
    if not is_operator(view, "slice"):
        raise UnknownMemory
    if same_shape(shape_of(view), shape_of(source)):
        return changed
    bounds = [argument(view, name, usual) for name, usual in _BOUNDS]
    return emit(aten.slice_scatter.default, source, changed, *bounds)


_BOUNDS = (("dim", 0), ("start", None), ("end", None), ("step", 1))


def _part(
    view: torch.fx.Node, source: torch.fx.Node, changed: torch.fx.Node, emit: Emitter
) -> torch.fx.Node:
    """Put back one output of `unbind`, `split` and the like."""
    maker, place = first_input(view), view.args[1]
    assert isinstance(place, int)
    dim = argument(maker, "dim", 0)
    if is_operator(maker, "unbind"):
        return emit(aten.select_scatter.default, source, changed, dim, place)
    sizes = [part.shape[dim] for part in value_of(maker)[: place + 1]]
    if not all(isinstance(size, int) for size in sizes):
        raise UnknownMemory
    bounds = sum(sizes[:place]), sum(sizes)
    return emit(aten.slice_scatter.default, source, changed, dim, *bounds)


_INVERSES: dict[View, Callable[..., torch.fx.Node]] = {
    View.SWAP: _same_again,
    View.SWAP_LAST: _same_again,
    View.REVERSE: _same_again,
    View.PERMUTE: _permute,
    View.SELECT: _select,
    View.SLICE: _slice,
}
"""Function of each kind of view that can be put back, besides copies and reshapes."""


def views_anew(
    views: Iterable[torch.fx.Node], changed: dict[torch.fx.Node, torch.fx.Node], emit: Emitter
) -> None:
    """Make each of `views` again, of the memory that `changed` names, and add it to `changed`.

    Raises `UnknownMemory` if one of them is made by an operator that writes.
    """
    for view in views:
        _anew(view, changed, emit)


def _anew(
    view: torch.fx.Node, changed: dict[torch.fx.Node, torch.fx.Node], emit: Emitter
) -> torch.fx.Node:
    if view in changed:
        return changed[view]
    if written_by(view) or not isinstance(view.args[0], torch.fx.Node):
        raise UnknownMemory
    source = _anew(view.args[0], changed, emit)
    changed[view] = emit(view.target, source, *view.args[1:], **view.kwargs)
    if view.target is not operator.getitem and isinstance(value_of(view), torch.Tensor):
        _check_alike(changed[view], view)
    return changed[view]


def _check_alike(fresh: torch.fx.Node, view: torch.fx.Node) -> None:
    if not same_shape(shape_of(fresh), shape_of(view)):
        raise UnknownMemory
