"""Keep tensors as they were when operators read them, for a kernel that reads them later.

    hidden = arange(L) > length         before, `hidden` is computed from `length`...
    length.add_(1)
    out = attention(q, k, v, hidden)    after, the kernel would read `length` here: too late

A tensor that is written in between is copied before the write if it is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.fx

from lychee_compile.passes.graph.aliasing import is_pure_view, storage_of, written_by
from lychee_compile.passes.graph.dataflow import aten, operator_of, shape_of, value_of
from lychee_compile.passes.graph.emitter import Emitter

MOST_KEPT = 4096
"""Largest number of elements of a tensor that is copied before it is written."""


class NotCapturable(Exception):  # noqa: N818  the mask is read instead
    """A tensor is no longer what it was when it was read; the message says why."""


class Reads:
    """All tensors that are read on the way to some others, with the operators that read them."""

    def __init__(self, roots: Sequence[torch.fx.Node], reader: torch.fx.Node) -> None:
        """Follow what `reader` reads back from `roots`."""
        self._readers: dict[torch.fx.Node, set[torch.fx.Node]] = {}
        waiting = [(root, reader) for root in roots]
        while waiting:
            tensor, by = waiting.pop()
            readers = self._readers.setdefault(tensor, set())
            if by not in readers:
                readers.add(by)
                waiting += _read_for(tensor, by)

    def as_read(self, tensor: torch.fx.Node, last: torch.fx.Node, emit: Emitter) -> torch.fx.Node:
        """Return `tensor` as it was when it was read, for an operator at `last` to read.

        Raises `NotCapturable` if it has changed since and cannot be copied.
        """
        readers = self._readers.get(tensor)
        if not readers:
            raise NotCapturable(f"{tensor} is read in an unknown way")
        since = [each for each in _writes(storage_of(tensor)) if min(readers) <= each < last]
        if not since:
            return tensor
        first = min(since)
        if any(first < reader for reader in readers):
            raise NotCapturable(f"{tensor} is read both before and after it is written")
        sizes = shape_of(tensor)
        if any(isinstance(size, torch.SymInt) for size in sizes) or math.prod(sizes) > MOST_KEPT:
            raise NotCapturable(f"{tensor} is written after it is read")
        with emit.graph.inserting_before(first):
            return emit(aten.clone.default, tensor)


def _read_for(
    tensor: torch.fx.Node, by: torch.fx.Node
) -> Iterator[tuple[torch.fx.Node, torch.fx.Node]]:
    """Yield the tensors that `tensor` is made of, each with the operator that reads it.

    The memory of a view is read when `by` reads the view. An operator that may or may not give a
    view may have copied instead, and so counts as a reader too.
    """
    if operator_of(tensor).reads_shape_only:
        return
    for source in tensor.all_input_nodes:
        if isinstance(value_of(source), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            continue
        if storage_of(tensor) is storage_of(source):
            yield source, by
        if not is_pure_view(tensor):
            yield source, tensor


def _writes(memory: torch.fx.Node) -> list[torch.fx.Node]:
    """Return the operators that write to `memory`, or to what may be a view of it."""
    writes, views = [], [memory]
    for view in views:
        for user in view.users:
            if any(storage_of(each) is memory for each in written_by(user)):
                writes.append(user)
            if storage_of(user) is memory and user not in views:
                views.append(user)
    return writes
