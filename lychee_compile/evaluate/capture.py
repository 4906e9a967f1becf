"""Queries, keys and values of sparse attentions, captured from a model through the backend.

A document is prefilled densely. At chosen positions single tokens are decoded through
`torch.compile(model, backend="lychee")` under a policy that reads every key. The model's hidden
states stay those of dense attention, while each attention is one that the backend rewrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lychee_compile.evaluate.cache_argument import cache_argument
from lychee_compile.evaluate.collector import Collector
from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import compiled, device_of, new_cache, nothing, read_on
from lychee_compile.evaluate.read_all import SHORTEST, read_all_options
from lychee_compile.evaluate.tensors import Capture, SiteTensors
from lychee_compile.inspection import reports
from lychee_compile.kernels.operators.observe import observers
from lychee_compile.torch_private import unlimited_recompiles

__all__ = ["Capture", "SiteTensors", "capture", "last_positions"]


def last_positions(length: int, steps: int) -> list[int]:
    """Return the last `steps` positions of a sequence of `length` tokens."""
    return list(range(length - steps, length))


@torch.no_grad()
def capture(
    model: Any,
    token_ids: Tensor,
    positions: Sequence[int],
    *,
    strengths: Tensor | None = None,
    sites: Sequence[str] = (),
    name: str = "",
    text: str = "",
    advance: Callable[[int], object] = nothing,
) -> Capture:
    """Return tensors of every global attention of `model`, with the queries at `positions`.

    `model` is a causal language model of transformers. `token_ids` are int64 [L]; tokens after the
    last of the ascending `positions` are not read. `strengths`, uint8 [L], go into the capture.
    `sites` are patterns of module paths as in file names; no patterns mean all attentions.
    `advance` is called with the number of tokens that were read. Raise `EvaluationError` if
    positions do not fit or the backend rewrites no attention.
    """
    token_ids = token_ids.flatten()
    _check_positions(positions, len(token_ids))
    length, device = positions[-1] + 1, device_of(model)
    forward, argument = compiled(model, read_all_options()), cache_argument(model)
    collector, cache, read = Collector(sites), new_cache(model), 0
    observers.append(collector)
    try:
        with unlimited_recompiles():
            for position in positions:
                read_on(model, cache, token_ids[read:position], advance)
                collector.begin(position, final=position == positions[-1])
                token = token_ids[None, position : position + 1].to(device)
                forward(token, **{argument: cache}, logits_to_keep=1)
                advance(1)
                read = position + 1
    finally:
        observers.remove(collector)
    captured = collector.tensors()
    if not captured:
        raise EvaluationError(_nothing_captured(collector, sites))
    kept = None if strengths is None else strengths.flatten()[:length].cpu()
    return Capture(captured, torch.tensor(positions), token_ids[:length].cpu(), kept, name, text)


def _check_positions(positions: Sequence[int], length: int) -> None:
    ascending = all(a < b for a, b in itertools.pairwise(positions))
    if not positions or not ascending or positions[0] < SHORTEST or positions[-1] >= length:
        raise EvaluationError(
            f"positions must ascend within [{SHORTEST}, {length}), the tokens of the sequence, "
            f"got {list(positions[:3])} ... {list(positions[-3:])}"
        )


def _nothing_captured(collector: Collector, sites: Sequence[str]) -> str:
    """Return a message on why no site was captured."""
    reasons = [f"{name}: {reason}" for name, reason in collector.skipped.items()]
    if not reasons:
        reported = [site for report in reports() for site in report.sites]
        reasons = sorted(
            {f"{site.name}: {site.decision}, {site.reason or site.reads}" for site in reported}
        )
    among = f" among those named {', '.join(sites)}" if sites else ""
    listed = "; ".join(reasons[:4]) or "the backend found no attention"
    return f"no global attention was captured{among}: {listed}"
