"""How much of dense attention a policy keeps, at several budgets, over captured tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from lychee_compile.evaluate.models import nothing
from lychee_compile.evaluate.replay import Measured, Replay, dense_truths
from lychee_compile.evaluate.tensors import Capture
from lychee_compile.evaluate.variants import Variant, check_budgets, describe

CERTIFIED = 0.1
"""A query head counts as certified where at most this share of its softmax can have been missed."""
ALL_SITES = "all"


@dataclass(frozen=True)
class FidelityRow:
    """One policy at one budget, over one site or all of them."""

    policy: str
    budget: int | None
    site: str
    mass: float
    """Mean share of the dense softmax mass that was read."""
    mass_p10: float
    """A tenth of all (step, query head) captured less."""
    mass_worst_head: float
    """Mean of the query head that captured least."""
    error: float
    """Mean of |o - o_dense| / |o_dense|."""
    error_p90: float
    tokens: float
    """Mean number of tokens read per KV head and step."""
    index_bytes: float
    """Read per KV head and step to choose them, numbers counted as 2 bytes."""
    bytes: float
    """The same with the keys and values attended to."""
    certified: float
    """Share of (step, query head) proved to miss at most `CERTIFIED`."""
    violations: int
    """How often more was missed than the certificate allows: must be 0."""
    choices: int
    """How many (step, query head) that is out of."""
    milliseconds: float
    """Median time of one choice by the plain PyTorch operators."""
    build_milliseconds: float
    """Mean time to index the prompt."""
    follow_milliseconds: float
    """Mean time to follow one more key."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class FidelityResult:
    """Every policy at every budget over one capture."""

    model: str
    text: str
    length: int
    """Keys that the last query sees."""
    steps: int
    """Queries per site."""
    configs: dict[str, dict[str, Any]]
    """The options of each policy."""
    rows: list[FidelityRow]

    def overall(self) -> list[FidelityRow]:
        """The rows over all sites together."""
        return [row for row in self.rows if row.site == ALL_SITES]

    def row(self, policy: str, budget: int | None, site: str = ALL_SITES) -> FidelityRow:
        """One of the rows."""
        wanted = (policy, budget, site)
        return next(row for row in self.rows if (row.policy, row.budget, row.site) == wanted)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


def fidelity(
    capture: Capture,
    variants: Sequence[Variant],
    budgets: Sequence[int],
    advance: Callable[[int], object] = nothing,
) -> FidelityResult:
    """Replay every variant at every budget; an index serves all budgets of its variant.

    The prompt is what comes before the first query; it is indexed at once and what follows token by
    token, as decoding does. `advance` is called with 1 after each query of each site. Raises
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
            seen = [measured[label, budget, each] for each in those]
            rows.append(_row(label, budget, name, seen, [times[label, each] for each in those]))
    configs = {v.label: describe(v.backend_options(max(budgets))) for v in variants}
    length, steps = int(capture.lengths[-1]), len(capture.positions)
    return FidelityResult(capture.model, capture.text, length, steps, configs, rows)


def _row(
    policy: str,
    budget: int,
    site: str,
    sites: Sequence[Measured],
    times: Sequence[tuple[float, float]],
) -> FidelityRow:
    """Sites may differ in their heads: everything is averaged over (site, step, head)."""

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
