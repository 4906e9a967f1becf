"""Kernels for a prefill: every tile of queries looks for the keys that matter to it.

`deal_luck`          the luck of each slot, of a policy that draws keys
`summarise_queries`  the keys that a tile always reads; centres of its parts and the denominators of
                     their softmaxes
`scan`               the largest share that a part of a tile gives each key, as a bin; raised by
                     luck, of a policy that draws keys
`select_keys`        the bin that a tile's budget ends in, and the list of its keys
`attend`             attention of a tile over that list and over the keys that it always reads

`kernels/reference/tiles.py` and `kernels/policies/prefill/lychee.py` specify what a tile reads,
which keys it may choose from and how shares are estimated. If a mask has holes, three things
differ. A part votes for the keys that its first, middle or last query sees. Of the keys that a tile
always reads, only those at the ends remain. Keys that the last query of a part sees, and none
before the part, are chosen before all others.

Policy "s2o" has one part, whose denominator counts all keys, and stops early (`VOTES`).

Numbers that change from prompt to prompt are not specialised on: nothing is compiled for a length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lychee_compile.codegen.parts.site import fill, sees_range
from lychee_compile.codegen.rendering import library
from lychee_compile.codegen.specification import AttentionSpec, S
from lychee_compile.kernels.policies.prefill import s2o
from lychee_compile.kernels.policies.prefill.lychee import CENTRES_PER_TILE, SAMPLE
from lychee_compile.kernels.sizes import BINS, LUCKIEST, QUERY_TILE, WHOLE_SHARE


@dataclass(frozen=True)
class Votes:
    """The parts of a tile that estimate shares of keys, and when a tile stops to read."""

    parts: int
    """Number of parts of a tile."""
    sample: int
    """Number of keys of which one stands for all in a denominator."""
    wanes: bool = False
    """True if a tile stops once the next keys add little."""
    draws: bool = False
    """True if keys of small shares are drawn by chance. Denominators count candidates alone."""


VOTES = {
    "lychee": Votes(CENTRES_PER_TILE, SAMPLE, draws=True),
    "s2o": Votes(1, 1, wanes=True),
}
"""Policies that rank single keys by the shares that parts of a tile give them."""


def emit_prefill(spec: AttentionSpec) -> list[str]:
    """Return the functions and kernels of a prefill, but for its mask and score."""
    votes = _votes(spec)
    return [
        fill("prefill/edges.py.jinja", spec),
        *library("prefill", "load_edges"),
        fill("prefill/seen_by.py.jinja", spec),
        *(
            library("drawing", "luck_of_number", "luck_of", "deal_luck", "lift_of")
            if votes.draws
            else []
        ),
        fill("prefill/summarise_queries.py.jinja", spec, draws=votes.draws),
        fill("prefill/scan.py.jinja", spec, draws=votes.draws),
        *library("prefill", "bins_between", "room_for", "cut_of", "counted"),
        fill(
            "prefill/select_keys.py.jinja",
            spec,
            draws=votes.draws,
            wanes=votes.wanes,
            together=s2o.BLOCK,
            least=s2o.LEAST_SHARE,
        ),
        *emit_attend(spec, draws=votes.draws),
    ]


def emit_attend(spec: AttentionSpec, listed: bool = False, draws: bool = False) -> list[str]:
    """Return the kernel `attend` and its functions.

    `listed` is True if the rows of a launch are some tiles of all heads, and False if they are all
    tiles of some heads. `draws` is True if keys that are listed can stand for others.
    """
    return [
        *([_attend_unmasked(spec, draws)] if sees_range(spec) else []),
        fill("prefill/read_listed.py.jinja", spec, draws=draws),
        fill("prefill/attend.py.jinja", spec, listed=listed, draws=draws),
    ]


def emit_constants(spec: AttentionSpec, by_kernels: bool) -> str:
    """Return the sizes of a site of prefill, of tiles, and of a histogram if kernels choose."""
    return fill(
        "prefill/constants.py.jinja",
        spec,
        tile=QUERY_TILE,
        by_kernels=by_kernels,
        parts=_votes(spec).parts,
        sample=_votes(spec).sample,
        bins=BINS,
        draws=_votes(spec).draws,
        luckiest=LUCKIEST,
        whole_share=WHOLE_SHARE,
    )


def _votes(spec: AttentionSpec) -> Votes:
    return VOTES.get("" if spec.tiles is None else spec.tiles.policy, VOTES["lychee"])


def _attend_unmasked(spec: AttentionSpec, draws: bool) -> str:
    most = 15 if spec.dtype == "float16" else 100  # far from overflow
    factor, rest = spec.score.as_independent(S)
    bits = float(factor) / math.log(2) if factor.is_number and rest == S else 0.0
    held = bits if 2**-12 < abs(bits) < 2**12 else None
    return fill(
        "prefill/attend_unmasked.py.jinja", spec, most=most, draws=draws, bits_of_score=held
    )
