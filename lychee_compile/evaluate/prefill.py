"""Prefill: the part of dense attention that a policy keeps at each share of the keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.models import nothing
from lychee_compile.evaluate.rows import ALL_SITES, Result, Row
from lychee_compile.evaluate.tensors import Capture, Columns, SiteTensors
from lychee_compile.evaluate.variants import Variant, check_prefill, describe
from lychee_compile.kernels.policies.registry import prefill_choice
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import PrefillConfig, prefill_attention
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.sizes import QUERY_TILE


@dataclass(frozen=True, kw_only=True)
class PrefillRow(Row):
    """Figures of one policy at one share of the keys."""

    share: float
    """Share of the keys it sees that a tile was to read."""
    pairs: float
    """Number of (query, key) pairs computed over the number that dense attention computes."""
    queries: int
    """Number of (query, query head) in all."""


@dataclass(frozen=True, kw_only=True)
class PrefillResult(Result[PrefillRow]):
    """Figures of every policy at every share over one capture."""

    tiles: int
    """Number of tiles of queries measured at each site."""
    by: ClassVar[str] = "share"


@dataclass(frozen=True)
class Tile:
    """One tile of queries of a site, the keys up to its last query, and its dense attention."""

    query: Tensor
    """Queries, float32 [1, Hq, QUERY_TILE, D]."""
    key: Tensor
    """Keys up to the last query, float32 [1, Hkv, n, D]."""
    value: Tensor
    """Values of those keys, float32 [1, Hkv, n, Dv]."""
    seen: Tensor
    """True for keys that a query sees, bool [QUERY_TILE, n]."""
    share: Tensor
    """Softmax share of each key, float32 [Hq, QUERY_TILE, n]."""
    output: Tensor
    """Output of dense attention, float32 [Hq, QUERY_TILE, Dv]."""


@dataclass(frozen=True)
class Measured(Columns):
    """Figures of one policy at one share, with tiles along the first axis."""

    pairs: Tensor
    """Number of pairs computed, float64 [N, Hq]."""
    dense_pairs: Tensor
    """Number of pairs that dense attention computes, float64 [N, Hq]."""
    mass: Tensor
    """Share of the dense softmax mass that was read, float64 [N, Hq, QUERY_TILE]."""
    error: Tensor
    """|o - o_dense| / |o_dense|, float64 [N, Hq, QUERY_TILE]."""


def prefill(
    capture: Capture,
    variants: Sequence[Variant],
    shares: Sequence[float],
    advance: Callable[[int], object] = nothing,
) -> PrefillResult:
    """Attend to the keys that every variant reads at every share, and compare with dense attention.

    `advance` is called with 1 after each tile of each site. Raise `EvaluationError` if the queries
    of the capture do not fill tiles, and `OptionError` for a policy without a prefill form.
    """
    check_prefill(variants)
    positions = tiles_of(capture)
    measured: dict[tuple[str, float, str], Measured] = {}
    for site in capture.sites:
        parts: dict[tuple[str, float], list[Measured]] = {
            (variant.label, share): [] for variant in variants for share in shares
        }
        for tile in dense_tiles(site, positions):
            for variant, share in itertools.product(variants, shares):
                parts[variant.label, share].append(
                    measure(tile, site, prefill_config(variant, share))
                )
            advance(1)
        for (label, share), each in parts.items():
            measured[label, share, site.name] = Measured.joined(each)
    names = [site.name for site in capture.sites]
    rows = [
        _row(variant.label, share, name, [measured[variant.label, share, each] for each in those])
        for variant, share in itertools.product(variants, shares)
        for name, those in (*((name, [name]) for name in names), (ALL_SITES, names))
    ]
    configs = {v.label: describe(v.prefill_options(max(shares))) for v in variants}
    return PrefillResult(
        model=capture.model,
        text=capture.text,
        length=len(capture.token_ids),
        tiles=len(positions),
        configs=configs,
        rows=rows,
    )


def tiles_of(capture: Capture) -> Tensor:
    """Return positions of queries, a tile a row: int64 [N, QUERY_TILE]. Raise `EvaluationError`."""
    whole = len(capture.positions) % QUERY_TILE == 0
    positions = capture.positions.view(-1, QUERY_TILE) if whole else capture.positions[None]
    if not whole or bool((positions.diff(dim=1) != 1).any()):
        raise EvaluationError(
            f"the capture of {capture.text} holds single queries, not whole tiles of {QUERY_TILE}: "
            "take one by `evaluate prefill --save-captures`"
        )
    return positions


def prefill_config(variant: Variant, share: float) -> PrefillConfig:
    """Return what a policy is to read of a sequence. Raise `OptionError` if it has no such form."""
    options = variant.prefill_options(share)
    choice = prefill_choice(options.policy)
    read = options.sinks, options.recent, options.epsilon
    return PrefillConfig(choice, share, *read, coverage=options.prefill_coverage)


def dense_tiles(site: SiteTensors, positions: Tensor) -> Iterator[Tile]:
    """Yield dense attention of each tile of queries, `positions` int64 [N, QUERY_TILE]."""
    key, value = site.key.float(), site.value.float()
    for number, position in enumerate(positions.to(key.device)):
        query = site.query[:, :, number * QUERY_TILE : (number + 1) * QUERY_TILE].float()
        end = int(position[-1]) + 1
        keys, values = key[:, :, :end], value[:, :, :end]
        seen = torch.arange(end, device=key.device) <= position[:, None]
        grouped = query.unflatten(1, (key.shape[1], -1))
        score = capped(site.scale * (grouped @ keys[:, :, None].transpose(-1, -2)), site.softcap)
        share = score.masked_fill(~seen, -torch.inf).softmax(-1)
        output = (share @ values[:, :, None])[0].flatten(0, 1)
        yield Tile(query, keys, values, seen, share[0].flatten(0, 1), output)


def measure(tile: Tile, site: SiteTensors, config: PrefillConfig) -> Measured:
    """Attend to the keys that a policy reads, and compare with dense attention."""
    operands = Operands(tile.query, tile.key, tile.value, tile.seen, site.scale, site.softcap)
    result = prefill_attention(operands, config)
    assert result.read is not None
    read = result.read[0, :, 0]
    missed = (tile.share @ (~read)[..., None].to(tile.share.dtype))[..., 0]
    length = tile.output.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    error = (result.output[0] - tile.output).norm(dim=-1) / length
    queries_of_key = tile.seen.sum(0).double()
    pairs = read.double() @ queries_of_key
    dense_pairs = queries_of_key.sum().expand_as(pairs)
    numbers = (pairs, dense_pairs, 1 - missed, error)
    return Measured(*(each.double().cpu()[None] for each in numbers))


def _row(policy: str, share: float, site: str, sites: Sequence[Measured]) -> PrefillRow:
    """Return averages over (site, tile, head, query), as sites may differ in their heads."""

    def flat(name: str) -> Tensor:
        return torch.cat([getattr(each, name).flatten() for each in sites])

    mass, error = flat("mass"), flat("error")
    return PrefillRow(
        policy=policy,
        share=share,
        site=site,
        pairs=(flat("pairs").sum() / flat("dense_pairs").sum()).item(),
        mass=mass.mean().item(),
        mass_p10=_quantile(mass, 0.1),
        mass_worst_head=min(each.mass.mean((0, 2)).min().item() for each in sites),
        error=error.mean().item(),
        error_p90=_quantile(error, 0.9),
        queries=len(mass),
    )


def _quantile(values: Tensor, share: float) -> float:
    """Return a quantile, also of more values than the 16 million that `Tensor.quantile` takes."""
    rank = min(max(round(share * (len(values) - 1)), 0), len(values) - 1)
    return values.kthvalue(rank + 1).values.item()
