"""What sparse attention works on, taken from a real model through the backend itself.

A document is prefilled densely; at the positions asked for, single tokens are decoded through
`torch.compile(model, backend="lychee")` under a policy that reads every key, so that the model's
hidden states stay those of dense attention while each attention is one that the backend rewrote.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    """The last `steps` positions of a sequence of `length` tokens."""
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
    """Tensors of every attention of `model` over a whole sequence, at `positions`, ascending.

    `model` is a causal language model of transformers, `token_ids` int64 [L]; what follows the last
    position is not read. `strengths`, uint8 [L], go into the capture; `sites` are patterns as in
    file names, all where there are none. `advance` is called with how many tokens were read.
    Raises `EvaluationError` where positions do not fit or the backend rewrites no attention.
    """
    token_ids = token_ids.flatten()
    _check_positions(positions, len(token_ids))
    length, device = positions[-1] + 1, device_of(model)
    forward = compiled(model, read_all_options())
    collector, cache, read = Collector(sites), new_cache(model), 0
    observers.append(collector)
    try:
        with unlimited_recompiles():
            for position in positions:
                read_on(model, cache, token_ids[read:position], advance)
                collector.begin(position, final=position == positions[-1])
                token = token_ids[None, position : position + 1].to(device)
                forward(token, past_key_values=cache, logits_to_keep=1)
                advance(1)
                read = position + 1
    finally:
        observers.remove(collector)
    found = collector.tensors()
    if not found:
        raise EvaluationError(_nothing_seen(collector, sites))
    known = None if strengths is None else strengths.flatten()[:length].cpu()
    return Capture(found, torch.tensor(positions), token_ids[:length].cpu(), known, name, text)


def _check_positions(positions: Sequence[int], length: int) -> None:
    ascending = all(a < b for a, b in itertools.pairwise(positions))
    if not positions or not ascending or positions[0] < SHORTEST or positions[-1] >= length:
        raise EvaluationError(
            f"positions must ascend within [{SHORTEST}, {length}), the tokens of the sequence, "
            f"got {list(positions[:3])} ... {list(positions[-3:])}"
        )


def _nothing_seen(collector: Collector, sites: Sequence[str]) -> str:
    """Why no site was captured."""
    reasons = [f"{name}: {reason}" for name, reason in collector.skipped.items()]
    if not reasons:
        found = [site for report in reports() for site in report.sites]
        reasons = sorted(
            {f"{site.name}: {site.decision}, {site.reason or site.reads}" for site in found}
        )
    among = f" among those named {', '.join(sites)}" if sites else ""
    listed = "; ".join(reasons[:4]) or "the backend found no attention"
    return f"no attention over the whole sequence was captured{among}: {listed}"
