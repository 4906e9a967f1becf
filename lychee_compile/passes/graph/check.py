"""Check a rewritten graph before it is compiled."""

from __future__ import annotations

import torch
import torch.fx

from lychee_compile.passes import reasons
from lychee_compile.passes.graph.dataflow import same_shape, value_of
from lychee_compile.passes.reasons import ReasonedError


class RewriteError(ReasonedError):
    """A rewritten graph does not compute what the original did."""


def check_replacement(old: torch.Tensor, new: torch.fx.Node) -> None:
    """The output of a replaced attention has the shape, dtype and device that it had."""
    made = value_of(new)
    if not same_shape(tuple(made.shape), tuple(old.shape)):
        raise RewriteError(reasons.OUTPUT_SHAPE(found=tuple(made.shape), wanted=tuple(old.shape)))
    if made.dtype != old.dtype or made.device != old.device:
        found, wanted = (f"{each.dtype} on {each.device}" for each in (made, old))
        raise RewriteError(reasons.OUTPUT_DTYPE(found=found, wanted=wanted))


def check_graph(gm: torch.fx.GraphModule, outputs: int) -> None:
    """The graph is well formed, in order, and gives as many outputs as before."""
    gm.graph.lint()
    node = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    given = node.args[0]
    count = len(given) if isinstance(given, (tuple, list)) else 1
    if count != outputs:
        raise RewriteError(reasons.OUTPUT_COUNT(found=count, wanted=outputs))
    gm.recompile()
