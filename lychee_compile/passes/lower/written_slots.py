"""Slots of a key cache that a graph names when it writes them."""

from __future__ import annotations

import torch
import torch.fx

from lychee_compile.passes.detect.caches import CacheBinding
from lychee_compile.passes.graph.dataflow import aten, value_of
from lychee_compile.passes.graph.emitter import Emitter


def named_slots(binding: CacheBinding, emit: Emitter) -> torch.fx.Node | None:
    """Return or emit the slots written, int [T]; None if the graph does not name them."""
    if binding.span is None:
        return binding.positions
    device = value_of(binding.key).device
    return emit(aten.arange.start, *binding.span, device=device, dtype=torch.int64)
