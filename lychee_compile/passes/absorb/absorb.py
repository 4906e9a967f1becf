"""Absorb projections of latents into queries and outputs, if attention becomes sparse by that.

An attention whose keys are computed from a cache is rewritten in a copy of the graph first. The
graph itself is rewritten only if detection then finds a cache, and sparse decoding is decided.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch.fx

from lychee_compile import torch_private
from lychee_compile.passes import reasons
from lychee_compile.passes.absorb.pieces import NoPiece
from lychee_compile.passes.absorb.rewriting import Absorber
from lychee_compile.passes.decide import Plan
from lychee_compile.passes.detect.attention import Attention, Products
from lychee_compile.passes.graph.check import RewriteError
from lychee_compile.passes.graph.dead_code import erase_dead_code
from lychee_compile.passes.graph.emitter import Emitter
from lychee_compile.torch_private import FakeTensorMode

logger = logging.getLogger(__name__)

_COMPUTED = (reasons.CACHE_COMPUTED.code, reasons.CACHE_JOINED.code)
"""Codes of the reasons that keys are made from a cache; the second if only some are seen to be."""
Written = frozenset[torch.fx.Node]
Judge = Callable[[torch.fx.GraphModule, Written], Sequence[Plan]]
"""Detects the attentions of a graph, and decides about them."""


def absorb(
    gm: torch.fx.GraphModule,
    mode: FakeTensorMode,
    plans: Sequence[Plan],
    written: Written,
    judge: Judge,
) -> bool:
    """Rewrite `gm` in place; True if it was changed, and has to be decided about anew."""
    candidates = [products for plan in plans if (products := _candidate(plan)) is not None]
    if not candidates:
        return False
    chosen = _sparse_then(gm, mode, candidates, written, judge)
    for products in chosen:
        _attempt(Absorber(gm, Emitter(gm.graph, mode), written), products)
    if chosen:
        erase_dead_code(gm)
    return bool(chosen)


def _candidate(plan: Plan) -> Products | None:
    """Return the products of an attention that reads all keys as they are computed; else None."""
    attention, reason = plan.attention, plan.outcome.reason
    if not isinstance(attention, Attention) or reason is None:
        return None
    return attention.products if reason.code in _COMPUTED else None


def _sparse_then(
    gm: torch.fx.GraphModule,
    mode: FakeTensorMode,
    candidates: Sequence[Products],
    written: Written,
    judge: Judge,
) -> list[Products]:
    """Return those candidates that decode sparsely once they are rewritten."""
    trial, copies = torch_private.copied(gm)
    kept = frozenset(copies[node] for node in written if node in copies)
    absorber = Absorber(trial, Emitter(trial.graph, mode), kept)
    tried = [(each, _attempt(absorber, _over(each, copies))) for each in candidates]
    if all(node is None for _, node in tried):
        return []
    erase_dead_code(trial)
    sparse = {
        plan.attention.node for plan in judge(trial, kept) if plan.outcome.decision == "sparse"
    }
    return [products for products, node in tried if node in sparse]


def _over(products: Products, copies: dict[torch.fx.Node, torch.fx.Node]) -> Products:
    return Products(**{name: copies[node] for name, node in vars(products).items()})


def _attempt(absorber: Absorber, products: Products) -> torch.fx.Node | None:
    """Rewrite one attention; None if it stays as it is."""
    try:
        return absorber.over_latents(products)
    except torch_private.RestartAnalysis:
        raise
    except (NoPiece, RewriteError):
        return None
    except Exception:  # whatever it is, the attention itself is understood
        logger.debug("%s was not rewritten over latents", products.values, exc_info=True)
        return None
