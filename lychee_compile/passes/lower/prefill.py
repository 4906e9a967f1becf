"""Attention over whole sequences: what counts as such, and what `prefill="sparse"` makes of it.

A prefill, an encoder, cross-attention from many positions, a vision transformer: no state is kept,
one operator chooses keys and attends. Where it does not pay they stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.operators.reference import LONGEST_QUERY
from lychee_compile.kernels.policies.prefill_registry import tile_policy_names
from lychee_compile.kernels.reference.tiles import TILE
from lychee_compile.passes import reasons
from lychee_compile.passes.detect.attention import Attention
from lychee_compile.passes.lower.patch_grids import Grid
from lychee_compile.passes.lower.prefill_site import TileSite
from lychee_compile.passes.reasons import Reason

OPERATOR = "lychee::sparse_prefill (reference)"


@dataclass(frozen=True)
class WholeSequence:
    """A whole sequence of which every tile of queries reads what matters to it."""

    config: IndexConfig
    grid: Grid | None
    """How the queries lie, where they are patches."""
    tiles: TileSite | None = None
    """The generated kernels that do it; None: the reference does."""

    @property
    def operator(self) -> str:
        """What runs, or the generated module."""
        return OPERATOR if self.tiles is None else self.tiles.kernel

    @property
    def reads(self) -> str:
        """How much it reads, in words."""
        config, budget = self.config, self.config.prefill_budget
        keys = f"{100 * budget:.4g} % of the keys it sees" if budget < 1 else f"up to {budget} keys"
        words = f"each tile of {TILE} queries reads {keys}"
        if self.grid is not None:
            words += f", in {self.grid.words()}"
        if config.policy != IndexConfig.policy:
            words += f", policy {config.policy}"
        if config.epsilon is not None:
            words += f", more where over {config.epsilon:.3g} of the softmax might be missed"
        return words


def is_whole_sequence(attention: Attention, cached: bool) -> bool:
    """Whether all positions of a sequence ask at once, or many of them.

    Over a cache, how many do may be known to a call alone: that may be one of decoding.
    """
    query_len = attention.query_len
    if query_len == attention.kv_len or attention.is_causal:
        return True
    return query_len > LONGEST_QUERY if isinstance(query_len, int) else not cached


def better_exact(attention: Attention, config: IndexConfig) -> Reason | None:
    """Why a whole sequence stays exact though `prefill="sparse"` is asked for; None: it does not.

    Of keys whose number only a call tells, the operator finds out itself whether they are few.
    """
    kv_len = attention.kv_len
    if isinstance(kv_len, int) and kv_len < config.prefill_from:
        return reasons.BELOW_PREFILL_FROM(kv_len=kv_len, prefill_from=config.prefill_from)
    if config.policy not in tile_policy_names():
        known = ", ".join(map(repr, tile_policy_names()))
        return reasons.POLICY_CANNOT_PREFILL(policy=config.policy, known=known)
    return None
