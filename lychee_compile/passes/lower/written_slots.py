"""Slots of a key cache that a graph names when it writes them."""

from __future__ import annotations

import operator

import torch
import torch.fx

from lychee_compile.passes.detect.caches import CacheBinding
from lychee_compile.passes.detect.token_writes import Span
from lychee_compile.passes.graph.dataflow import aten, shape_of, value_of
from lychee_compile.passes.graph.emitter import Emitter


def named_slots(binding: CacheBinding, emit: Emitter) -> torch.fx.Node | None:
    """Return or emit the slots written, int [T]; None if the graph does not name them."""
    slots = binding.slots
    if isinstance(slots, Span):
        stop = emit(operator.add, slots.start, slots.count) if slots.stop is None else slots.stop
        device = value_of(binding.key).device
        return emit(aten.arange.start, slots.start, stop, device=device, dtype=torch.int64)
    if slots is None or len(shape_of(slots)) == 1:
        return slots
    return emit(aten.reshape.default, slots, [-1])
