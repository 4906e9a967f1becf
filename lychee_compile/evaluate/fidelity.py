"""Fidelity: the part of dense attention that a policy keeps at each budget, on captured tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch

from lychee_compile.evaluate.models import nothing
from lychee_compile.evaluate.replay import Measured, Replay, dense_truths
from lychee_compile.evaluate.rows import ALL_SITES, Result, Row
from lychee_compile.evaluate.tensors import Capture
from lychee_compile.evaluate.variants import Variant, check_budgets, describe

CERTIFIED = 0.1
"""Largest share of its softmax that a certified query head can have missed."""


@dataclass(frozen=True, kw_only=True)
class FidelityRow(Row):
    """Figures of one policy at one budget; a query is a step of decoding."""

    budget: int
    tokens: float
    """Mean number of tokens read per KV head and step."""
    index_bytes: float
    """Bytes of the index read per KV head and step to choose them, 2 bytes a number."""
    bytes: float
    """Bytes read per KV head and step, the keys and values attended to included."""
    certified: float
    """Share of (step, query head) proved to miss at most `CERTIFIED`."""
    violations: int
    """Number of times that more was missed than the certificate allows; 0 if it is right."""
    choices: int
    """Number of (step, query head) in all."""
    milliseconds: float
    """Median time of one choice by the plain PyTorch operators."""
    build_milliseconds: float
    """Mean time to index the prompt."""
    follow_milliseconds: float
    """Mean time to follow one more key."""


@dataclass(frozen=True, kw_only=True)
class FidelityResult(Result[FidelityRow]):
    """Figures of every policy at every budget over one capture."""

    steps: int
    """Number of queries per site."""
    by: ClassVar[str] = "budget"


def fidelity(
    capture: Capture,
    variants: Sequence[Variant],
    budgets: Sequence[int],
    advance: Callable[[int], object] = nothing,
) -> FidelityResult:
    """Replay every variant at every budget; an index serves all budgets of its variant.

    The prompt is all tokens before the first query. It is indexed at once, and later tokens one by
    one, as decoding does. `advance` is called with 1 after each query of each site. Raise
    `OptionError` for a budget that a policy cannot have.
    """
    check_budgets(variants, budgets)
    measured: dict[tuple[str, int, str], Measured] = {}
    times: dict[tuple[str, str], tuple[float, float]] = {}
    for site in capture.sites:
        replays = {v.label: Replay(site, capture, v.config(max(budgets))) for v in variants}
        parts: dict[tuple[str, int], list[Measured]] = {
            (label, budget): [] for label in replays for budget in budgets
        }
        for truth in dense_truths(site, capture):
            for label, replay in replays.items():
                replay.follow(truth.key.shape[2])
                for budget in budgets:
                    parts[label, budget].append(replay.measure(truth, budget))
            advance(1)
        for (label, budget), each in parts.items():
            measured[label, budget, site.name] = Measured.joined(each)
        for label, replay in replays.items():
            follow = replay.follow_seconds / max(replay.followed, 1)
            times[label, site.name] = (replay.build_seconds, follow)
    rows = []
    names = [site.name for site in capture.sites]
    for variant, budget in itertools.product(variants, budgets):
        label = variant.label
        for name, those in (*((name, [name]) for name in names), (ALL_SITES, names)):
            parts_of_row = [measured[label, budget, each] for each in those]
            times_of_row = [times[label, each] for each in those]
            rows.append(_row(label, budget, name, parts_of_row, times_of_row))
    configs = {v.label: describe(v.backend_options(max(budgets))) for v in variants}
    return FidelityResult(
        model=capture.model,
        text=capture.text,
        length=int(capture.lengths[-1]),
        steps=len(capture.positions),
        configs=configs,
        rows=rows,
    )


def _row(
    policy: str,
    budget: int,
    site: str,
    sites: Sequence[Measured],
    times: Sequence[tuple[float, float]],
) -> FidelityRow:
    """Return averages over (site, step, head), as sites may differ in their heads."""

    def flat(name: str) -> torch.Tensor:
        return torch.cat([getattr(each, name).flatten() for each in sites])

    mass, error = flat("mass"), flat("error")
    index_bytes = flat("index_bytes").mean().item()
    build, follow = (1e3 * fmean(column) for column in zip(*times, strict=True))
    return FidelityRow(
        policy=policy,
        budget=budget,
        site=site,
        mass=mass.mean().item(),
        mass_p10=mass.quantile(0.1).item(),
        mass_worst_head=min(each.mass.mean(0).min().item() for each in sites),
        error=error.mean().item(),
        error_p90=error.quantile(0.9).item(),
        tokens=flat("tokens").mean().item(),
        index_bytes=index_bytes,
        bytes=index_bytes + flat("attended_bytes").mean().item(),
        certified=(flat("bound") <= CERTIFIED).double().mean().item(),
        violations=int(flat("violated").sum()),
        choices=len(mass),
        milliseconds=1e3 * flat("seconds").median().item(),
        build_milliseconds=build,
        follow_milliseconds=follow,
    )
