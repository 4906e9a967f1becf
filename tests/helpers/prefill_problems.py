"""Prefill problems for the tests: operands, masks of any kind, and what attention means there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import DTYPES, KINDS, Heads, masks, random, seeds
from torch import Tensor

from lychee_compile.kernels.policies.registry import prefill_choice
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import (
    PrefillConfig,
    PrefillResult,
    prefill_attention,
)
from lychee_compile.kernels.sizes import QUERY_TILE

SCALES = (1.0, 0.25, 0.02, -0.4)

shapes = st.builds(
    Heads,
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([1, 4, 16, 33]),
)


def prefill_config(policy: str = "lychee", *given: Any, **more: Any) -> PrefillConfig:
    """Return the settings of a prefill whose keys a registered policy chooses."""
    return PrefillConfig(prefill_choice(policy), *given, **more)


@dataclass(frozen=True)
class Whole:
    """The operands of an attention of prefill."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    softcap: float | None
    extra: Tensor | None
    order: Tensor | None
    seen: Tensor
    """bool [B, Hq, T, L], what each query sees."""
    bias: Tensor
    """float64 [B, Hq, T, L], what is added to its scores."""

    def attend(self, config: PrefillConfig, **more: Any) -> PrefillResult:
        """Attend sparsely by the specification."""
        tensors = (self.query, self.key, self.value, self.mask)
        operands = Operands(*tensors, self.scale, self.softcap, self.extra)
        return prefill_attention(operands, config, self.causal, self.order, **more)

    def scores(self) -> Tensor:
        """Return scores, float64 [B, Hq, T, L], -inf for what is not seen."""
        group = self.query.shape[1] // self.key.shape[1]
        key = self.key.double().repeat_interleave(group, 1)
        score = self.scale * self.query.double() @ key.transpose(-1, -2)
        if self.softcap is not None:
            score = self.softcap * torch.tanh(score / self.softcap)
        return (score + self.bias).masked_fill(~self.seen, -torch.inf)

    def weights(self) -> Tensor:
        """Return the softmax over scores and extra logit, float64 [B, Hq, T, L]; 0 if no keys."""
        score = self.scores()
        if self.extra is not None:
            logit = self.extra.double().expand(score.shape[:-1])[..., None]
            score = torch.cat((score, logit), -1)
        nothing = (score == -torch.inf).all(-1, keepdim=True)
        return score.softmax(-1).masked_fill(nothing, 0)[..., : self.key.shape[2]]

    def output(self) -> Tensor:
        """Return dense attention, float64 [B, Hq, T, Dv]."""
        group = self.query.shape[1] // self.key.shape[1]
        return self.weights() @ self.value.double().repeat_interleave(group, 1)

    def slack(self) -> float:
        """Return how far from `output` rounding may lead."""
        eps = torch.finfo(torch.float32).eps
        group = self.query.shape[1] // self.key.shape[1]
        longest = self.key.double().norm(dim=-1).amax(-1).repeat_interleave(group, 1)
        reach = abs(self.scale) * (self.query.double().norm(dim=-1) * longest[..., None]).max()
        bias = self.bias.masked_fill(~self.seen, 0).abs().max()
        score = (self.query.shape[-1] + 8) * eps * (reach + bias + 1)
        last = torch.finfo(self.query.dtype).eps
        return (2 * score + last + 1e-6).item() * max(self.value.double().abs().max().item(), 1)

    def read_rows(self, result: PrefillResult) -> Tensor:
        """Return what each query's tile reads: bool [B, Hq, T, L], queries in their own order."""
        length = self.query.shape[2]
        rows = result.read.repeat_interleave(QUERY_TILE, 2)[:, :, :length]
        return rows if self.order is None else rows.index_select(2, self.order.argsort())


@st.composite
def wholes(draw, dtypes=DTYPES, kinds=KINDS, longest=300) -> Whole:
    """Draw an attention of any shape, mask and distribution; some queries may see nothing."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    kv_len = draw(st.integers(1, longest))
    query_len = kv_len if draw(st.booleans()) else draw(st.integers(1, kv_len))
    mask, seen, bias = _mask(draw, shape, query_len, kv_len, dtype)
    causal = draw(st.booleans())
    if causal:
        seen = seen & torch.ones(query_len, kv_len, dtype=torch.bool).tril()
    seed, value_dim = draw(seeds), draw(st.sampled_from([1, 5, shape.head_dim]))
    extra = None
    if draw(st.booleans()):
        positions = draw(st.sampled_from([1, query_len]))
        extra = 2 * random(seed + 2, 1, shape.query_heads, positions)
    order = None
    if draw(st.booleans()):
        order = torch.randperm(query_len, generator=torch.Generator().manual_seed(seed))
    return Whole(
        query=shape.queries(seed, query_len, dtype),
        key=shape.keys(draw(st.sampled_from(kinds)), seed, kv_len, dtype),
        value=random(seed + 1, shape.batch, shape.kv_heads, kv_len, value_dim).to(dtype),
        mask=mask,
        causal=causal,
        scale=draw(st.sampled_from(SCALES)),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        extra=extra,
        order=order,
        seen=seen,
        bias=bias.masked_fill(~seen, 0),
    )


def _mask(
    draw, shape: Heads, query_len: int, kv_len: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return masks of `strategies`, packed documents, and rows that see nothing at all."""
    if draw(st.sampled_from([False, False, True])):
        document = (random(draw(seeds), shape.batch, kv_len) > 1.5).cumsum(-1)
        at = document[:, kv_len - query_len :]
        mask = (at[:, :, None] == document[:, None])[:, None]
        full = mask.expand(-1, shape.query_heads, -1, -1)
        seen, bias = full, torch.zeros(full.shape, dtype=torch.float64)
    else:
        drawn = draw(masks(shape, query_len, kv_len, dtype))
        mask, seen, bias = drawn.tensor, drawn.seen, drawn.bias
    if mask is None or draw(st.booleans()):
        return mask, seen, bias
    blind = random(draw(seeds), query_len, 1) > 1
    if mask.dtype == torch.bool:
        return mask & ~blind, seen & ~blind, bias
    return mask.masked_fill(blind, -torch.inf), seen & ~blind, bias


@st.composite
def prefill_configs(draw, policies, **fixed) -> PrefillConfig:
    """Few sinks and recent tokens, so that much of a short sequence is left to choose from."""
    drawn = {
        "policy": draw(st.sampled_from(sorted(policies))),
        "budget": draw(st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9, 1, 20, 100])),
        "sinks": draw(st.integers(0, 4)),
        "recent": draw(st.integers(0, 9)),
        "shortest": draw(st.sampled_from([0, 0, 50, 200])),
    }
    return prefill_config(**{**drawn, **fixed})
