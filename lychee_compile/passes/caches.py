"""Bind the keys of an attention to the cache they are kept in, and to the write of this call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from lychee_compile.passes.dataflow import (
    VIEWS,
    argument,
    aten,
    calls,
    same,
    shape_of,
    static_size,
    through_copies,
    value_of,
)

ROLLING = "the cache rolls: every key changes its slot at every step"


@dataclass(frozen=True)
class CacheBinding:
    """A key cache as one graph sees it. Two sites that read the same keys have equal bindings."""

    key: torch.fx.Node
    """The keys after this call's write, [B, Hkv, L, D]."""
    kind: str
    """"static": an input written in place; "dynamic": grown by concatenation, an output."""
    source: torch.fx.Node | None
    """The input that held the cache before; None where a dynamic cache begins."""
    output: int | None
    """Which output of the graph is the grown cache; None for a static one."""
    positions: torch.fx.Node | None = None
    """Slots written, int [T]; None: see `span`, or the last slots of a dynamic cache."""
    span: tuple[int | torch.fx.Node, int | torch.fx.Node] | None = None
    """Slots [start, end) written where the graph names them as a slice."""
    reads_only: bool = False
    """Whether the graph only reads the cache."""


def bind_cache(
    key: torch.fx.Node, graph: torch.fx.Graph, reader: torch.fx.Node
) -> CacheBinding | str:
    """The cache that `key` [B, Hkv, L, D] is read from, or in words why none was recognised.

    `reader` is the attention that reads it.
    """
    if calls(key, aten.cat.default):
        return _grown(key, graph)
    buffer, axis = key, 2
    if calls(key, aten.transpose.int) and {d % 4 for d in key.args[1:3]} == {1, 2}:  # type: ignore[operator]
        buffer, axis = through_copies(key.args[0]), 1  # type: ignore[arg-type]
    if calls(buffer, aten.index_copy_.default, aten.index_put_.default):
        return _written(key, buffer, axis)
    if buffer.op == "placeholder":
        return _read(key, buffer, axis, reader)
    if calls(buffer, aten.slice.Tensor):
        return "the keys are a slice of what the cache holds, as in a sliding window"
    if calls(buffer, aten.roll.default) or (
        buffer.args and calls(buffer.args[0], aten.roll.default)
    ):
        return ROLLING
    output = _output_index(key, graph)
    if output is None:
        return "the keys are not read from a cache"
    return CacheBinding(key, "dynamic", None, output)


def _written(key: torch.fx.Node, write: torch.fx.Node, axis: int) -> CacheBinding | str:
    """A cache that this call writes whole tokens of, at positions along `axis`."""
    positions = _positions(write, axis)
    if positions is None:
        return "the cache is written at other indices than token positions"
    cache = through_copies(write.args[0])  # type: ignore[arg-type]
    if calls(cache, aten.roll.default):
        return ROLLING
    if cache.op != "placeholder" or _writes(write) or len(_writes(cache)) > 1:
        return "the tensor written to is no input of the graph, or is written more than once"
    return CacheBinding(key, "static", cache, None, positions)


def _positions(write: torch.fx.Node, axis: int) -> torch.fx.Node | None:
    """The slots, int [T], that `index_copy_` or `index_put_` writes along `axis`."""
    if calls(write, aten.index_copy_.default):
        return argument(write, "index") if argument(write, "dim") % 4 == axis else None
    indices = argument(write, "indices")
    along = [place for place, index in enumerate(indices) if index is not None]
    if along != [axis] or argument(write, "accumulate", False):
        return None
    index = indices[axis]
    return index if len(shape_of(index)) == 1 and value_of(index).dtype != torch.bool else None


def _read(
    key: torch.fx.Node, cache: torch.fx.Node, axis: int, reader: torch.fx.Node
) -> CacheBinding | str:
    """A cache that is written through a view of it, or not at all."""
    writes = _writes(cache)
    if not writes:
        return CacheBinding(key, "static", cache, None, reads_only=True)
    target = writes[0].args[0]
    whole_slice = calls(target, aten.slice.Tensor) and target.args[0] is cache  # type: ignore[union-attr]
    if len(writes) > 1 or not whole_slice or not calls(writes[0], aten.copy_.default):
        return "the form of the cache write is not known"
    assert isinstance(target, torch.fx.Node)
    if reader < writes[0]:
        return "the cache is written after it is read"
    if argument(target, "dim", 0) % 4 != axis or argument(target, "step", 1) != 1:
        return "the cache is written along another axis than its tokens"
    kv_len = shape_of(cache)[axis]
    start = _slot(argument(target, "start", 0), kv_len)
    end = _slot(argument(target, "end"), kv_len)
    if start is None or end is None:
        return "the form of the cache write is not known"
    return CacheBinding(key, "static", cache, None, span=(start, end))


def _slot(bound: Any, kv_len: int | torch.SymInt) -> int | torch.fx.Node | None:
    """The slot at a bound of a slice: negative and large ones mean what they do in Python.

    None where only a run can tell.
    """
    size = static_size(kv_len)
    if isinstance(bound, torch.fx.Node):
        return bound
    return None if size is None or bound is None else slice(bound, None).indices(size)[0]


def _grown(key: torch.fx.Node, graph: torch.fx.Graph) -> CacheBinding | str:
    parts = argument(key, "tensors")
    if argument(key, "dim", 0) % 4 != 2 or len(shape_of(key)) != 4:
        return "the keys are not read from a cache"
    output = _output_index(key, graph)
    if output is None:
        return "the cache keeps only a part of these keys, as in a sliding window"
    past = through_copies(parts[0])
    if len(parts) != 2:
        return "the cache grows by more than one piece"
    if past.op == "placeholder":
        return CacheBinding(key, "dynamic", past, output)
    empty = shape_of(past)
    if same(empty[0], 0) or (len(empty) == 4 and same(empty[2], 0)):
        return CacheBinding(key, "dynamic", None, output)
    return "the tensor that the cache grows from is no input of the graph"


def _writes(tensor: torch.fx.Node) -> list[torch.fx.Node]:
    """Operators that write `tensor` or a view of it."""
    views = VIEWS | {aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.permute.default}
    found = []
    for user in tensor.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None:
            continue
        if user.args and user.args[0] is tensor and schema.is_mutable:
            found.append(user)
        elif user.target in views:
            found.extend(_writes(user))
    return found


def _output_index(key: torch.fx.Node, graph: torch.fx.Graph) -> int | None:
    outputs = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    if not isinstance(outputs, (tuple, list)):
        outputs = (outputs,)
    for place, node in enumerate(outputs):
        if isinstance(node, torch.fx.Node) and through_copies(node) is key:
            return place
    return None
