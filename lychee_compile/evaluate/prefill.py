"""How much of a whole sequence's dense attention a policy keeps, at several shares of its keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lychee_compile.evaluate.errors import EvaluationError
from lychee_compile.evaluate.fidelity import ALL_SITES
from lychee_compile.evaluate.models import nothing
from lychee_compile.evaluate.tensors import Capture, Columns, SiteTensors
from lychee_compile.evaluate.variants import Variant, check_whole, describe
from lychee_compile.kernels.policies.registry import prefill_choice
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import PrefillConfig, prefill_attention
from lychee_compile.kernels.reference.softcap import capped
from lychee_compile.kernels.sizes import QUERY_TILE


@dataclass(frozen=True)
class PrefillRow:
    """One policy at one share of the keys, over one site or all of them."""

    policy: str
    share: float
    """Of the keys that a tile sees, what it was to read."""
    site: str
    pairs: float
    """Share of the (query, key) pairs that dense attention computes which were computed."""
    mass: float
    """Mean share of the dense softmax mass that was read."""
    mass_p10: float
    """A tenth of all (query, query head) captured less."""
    mass_worst_head: float
    """Mean of the query head that captured least."""
    error: float
    """Mean of |o - o_dense| / |o_dense|."""
    error_p90: float
    queries: int
    """How many (query, query head) that is out of."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class PrefillResult:
    """Every policy at every share over one capture."""

    model: str
    text: str
    length: int
    """Tokens of the sequence."""
    tiles: int
    """Tiles of queries measured, at each site."""
    configs: dict[str, dict[str, Any]]
    """The options of each policy."""
    rows: list[PrefillRow]

    def overall(self) -> list[PrefillRow]:
        """The rows over all sites together."""
        return [row for row in self.rows if row.site == ALL_SITES]

    def row(self, policy: str, share: float, site: str = ALL_SITES) -> PrefillRow:
        """One of the rows."""
        wanted = (policy, share, site)
        return next(row for row in self.rows if (row.policy, row.share, row.site) == wanted)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


@dataclass(frozen=True)
class Tile:
    """One tile of queries of a site over the keys up to its last, and its dense attention."""

    query: Tensor
    """float32 [1, Hq, QUERY_TILE, D]"""
    key: Tensor
    value: Tensor
    """The keys and values before its end, float32 [1, Hkv, n, D]."""
    seen: Tensor
    """Which of them each query sees, bool [QUERY_TILE, n]."""
    share: Tensor
    """Softmax share of each key, float32 [Hq, QUERY_TILE, n]."""
    output: Tensor
    """float32 [Hq, QUERY_TILE, Dv]"""


@dataclass(frozen=True)
class Measured(Columns):
    """What one policy at one share made of tiles; a tile each along the first axis."""

    pairs: Tensor
    """Pairs computed, float64 [N, Hq]."""
    dense_pairs: Tensor
    """Pairs that dense attention computes, float64 [N, Hq]."""
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
    """Attend to what every variant reads at every share, tile by tile, and compare with dense.

    `advance` is called with 1 after each tile of each site. Raises `EvaluationError` where the
    queries of the capture are not those of whole tiles, `OptionError` for a policy that has no form
    for whole sequences.
    """
    check_whole(variants)
    positions = tiles_of(capture)
    measured: dict[tuple[str, float, str], Measured] = {}
    for site in capture.sites:
        parts: dict[tuple[str, float], list[Measured]] = {
            (variant.label, share): [] for variant in variants for share in shares
        }
        for tile in dense_tiles(site, positions):
            for variant, share in itertools.product(variants, shares):
                parts[variant.label, share].append(measure(tile, site, tile_config(variant, share)))
            advance(1)
        for (label, share), each in parts.items():
            measured[label, share, site.name] = Measured.joined(each)
    names = [site.name for site in capture.sites]
    rows = [
        _row(variant.label, share, name, [measured[variant.label, share, each] for each in those])
        for variant, share in itertools.product(variants, shares)
        for name, those in (*((name, [name]) for name in names), (ALL_SITES, names))
    ]
    configs = {v.label: describe(v.whole_options(max(shares))) for v in variants}
    length = len(capture.token_ids)
    return PrefillResult(capture.model, capture.text, length, len(positions), configs, rows)


def tiles_of(capture: Capture) -> Tensor:
    """Positions of the queries, a tile a row: int64 [N, QUERY_TILE]. Raises `EvaluationError`."""
    whole = len(capture.positions) % QUERY_TILE == 0
    positions = capture.positions.view(-1, QUERY_TILE) if whole else capture.positions[None]
    if not whole or bool((positions.diff(dim=1) != 1).any()):
        raise EvaluationError(
            f"the capture of {capture.text} holds single queries, not whole tiles of {QUERY_TILE}: "
            "take one by `evaluate prefill --save-captures`"
        )
    return positions


def tile_config(variant: Variant, share: float) -> PrefillConfig:
    """What a policy is to read of a whole sequence. Raises `OptionError`."""
    options = variant.whole_options(share)
    choice = prefill_choice(options.policy)
    return PrefillConfig(choice, share, options.sinks, options.recent, options.epsilon)


def dense_tiles(site: SiteTensors, positions: Tensor) -> Iterator[Tile]:
    """Dense attention of each tile of queries, `positions` int64 [N, QUERY_TILE], in order."""
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
    """Attend to what a policy reads, and compare."""
    operands = Operands(tile.query, tile.key, tile.value, tile.seen, site.scale, site.softcap)
    result = prefill_attention(operands, config)
    assert result.read is not None
    read = result.read[0, :, 0]
    missed = (tile.share @ (~read)[..., None].to(tile.share.dtype))[..., 0]
    length = tile.output.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    error = (result.output[0] - tile.output).norm(dim=-1) / length
    asking = tile.seen.sum(0).double()
    pairs = read.double() @ asking
    dense_pairs = asking.sum().expand_as(pairs)
    numbers = (pairs, dense_pairs, 1 - missed, error)
    return Measured(*(each.double().cpu()[None] for each in numbers))


def _row(policy: str, share: float, site: str, sites: Sequence[Measured]) -> PrefillRow:
    """Sites may differ in their heads: everything is averaged over (site, tile, head, query)."""

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
    """As `Tensor.quantile`, which takes no more than 16 million values."""
    rank = min(max(round(share * (len(values) - 1)), 0), len(values) - 1)
    return values.kthvalue(rank + 1).values.item()
