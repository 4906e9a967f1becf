"""Check a rewritten graph before it is compiled."""

from __future__ import annotations

import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.graph.dataflow import outputs_of, same_shape, value_of
from lychee_compile.passes.reasons import ReasonedError


class RewriteError(ReasonedError):
    """A rewritten graph does not compute what the original did."""


def check_replacement(old: torch.Tensor, new: torch.fx.Node) -> None:
    """Raise `RewriteError` unless `new` has the shape, dtype and device of `old`."""
    value = value_of(new)
    if not same_shape(tuple(value.shape), tuple(old.shape)):
        raise RewriteError(reasons.OUTPUT_SHAPE(found=tuple(value.shape), wanted=tuple(old.shape)))
    if value.dtype != old.dtype or value.device != old.device:
        found, wanted = (f"{each.dtype} on {each.device}" for each in (value, old))
        raise RewriteError(reasons.OUTPUT_DTYPE(found=found, wanted=wanted))


def check_graph(gm: torch.fx.GraphModule, outputs: int) -> None:
    """Raise unless the graph is well formed, in order, and gives as many `outputs` as before."""
    gm.graph.lint()
    count = output_count(gm)
    if count != outputs:
        raise RewriteError(reasons.OUTPUT_COUNT(found=count, wanted=outputs))
    gm.recompile()


def output_count(gm: torch.fx.GraphModule) -> int:
    """Return how many values a graph gives."""
    return len(outputs_of(gm.graph))
