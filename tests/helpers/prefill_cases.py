"""Attentions of prefill in many spellings, and running them through the backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import lychee_compile
from lychee_compile.kernels.operators.observe import PrefillCall, prefill_observers
from lychee_compile.kernels.reference.attention import dense_attention
from lychee_compile.kernels.reference.operands import Operands
from lychee_compile.kernels.reference.prefill_attention import PrefillConfig, prefill_attention
from lychee_compile.passes.site import Site

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 16, 400
SCALE = DIM**-0.5
SINKS, RECENT = 4, 16
SPARSE = {"prefill": "sparse", "prefill_from": 64, "sinks": SINKS, "recent": RECENT}
KERNEL = "lychee::sparse_prefill (reference)"

Function = Callable[..., Tensor]


@contextmanager
def recorded() -> Iterator[list[PrefillCall]]:
    """Yield every call of the operator that reads sparsely."""
    calls: list[PrefillCall] = []
    prefill_observers.append(calls.append)
    try:
        yield calls
    finally:
        prefill_observers.remove(calls.append)


def only_site() -> Site:
    (site,) = lychee_compile.reports()[-1].sites
    return site


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="lychee", options={**SPARSE, **options})


def operands(
    length: int = LENGTH, kv_len: int = 0, kv_heads: int = HEADS
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [2, Hq, T, D], key and value [2, Hkv, L, D]; some keys matter more than others."""
    torch.manual_seed(0)
    kv_len = kv_len or length
    query, key = torch.randn(2, HEADS, length, DIM), torch.randn(2, kv_heads, kv_len, DIM)
    return query + 1, key * torch.rand(kv_len, 1) * 3, torch.randn(2, kv_heads, kv_len, DIM)


PLACES = torch.arange(LENGTH)
CAUSAL = PLACES[:, None] >= PLACES
WINDOW = CAUSAL & (PLACES[:, None] - 150 < PLACES)
LENGTHS = torch.tensor([LENGTH, LENGTH - 90])
PADDING = (LENGTHS[:, None] > PLACES)[:, None, None]
DOCUMENTS = (PLACES > 170).long()
SAME_DOCUMENT = DOCUMENTS[:, None] == DOCUMENTS
RANDOM = torch.rand(2, 1, 4, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.7
RANDOM = RANDOM.repeat_interleave(128, 2)[:, :, :LENGTH]  # what is seen in part is always read
BIAS = torch.randn(1, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def sdpa_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def causal_by_places(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    place = torch.arange(query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=place <= place[:, None])


def windowed_by_places(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    place = torch.arange(query.shape[2])
    seen = (place <= place[:, None]) & (place > place[:, None] - 150)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * SCALE).softmax(-1) @ value


def eager_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    key, value = (
        each[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2)
        for each in (key, value)
    )
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    score = (query @ key.mT / DIM**0.5).masked_fill(hidden, -torch.inf)
    return score.softmax(-1, dtype=torch.float32) @ value


def soft_capped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    score = torch.tanh(query @ key.mT * SCALE / 5) * 5
    return score.softmax(-1) @ value


def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return torch.tanh(score / 5) * 5

    return flex_attention(query, key, value, score_mod=capped)


@dataclass(frozen=True)
class Case:
    """An attention, and what the operator is to be called with."""

    function: Function
    inputs: tuple[Tensor, ...]
    given: dict[str, Any] = field(default_factory=dict)
    form: str = "sdpa"
    mask: str = "none"

    def sparse(self, config: PrefillConfig) -> Tensor:
        """Return the output by the specification of sparse tiles."""
        mask, causal = self.given.get("mask"), self.given.get("causal", False)
        operands = Operands(*self.inputs[:3], mask, SCALE, self.given.get("softcap"))
        return prefill_attention(operands, config, causal).output

    def dense(self) -> Tensor:
        """Return the output over all keys."""
        mask = CAUSAL if self.given.get("causal") else self.given.get("mask")
        operands = Operands(*self.inputs[:3], mask, SCALE, self.given.get("softcap"))
        return dense_attention(operands)


GROUPED = operands(kv_heads=KV_HEADS)
CASES = {
    "none": Case(sdpa, operands()),
    "grouped": Case(sdpa, GROUPED),
    "eager": Case(eager, operands(), form="eager"),
    "soft-cap": Case(soft_capped, operands(), {"softcap": 5.0}, "eager"),
    "is_causal": Case(sdpa_causal, operands(), {"causal": True}, mask="causal"),
    "causal": Case(causal_by_places, operands(), {"causal": True}, mask="causal"),
    "causal eager": Case(eager_causal, GROUPED, {"causal": True}, "eager", "causal"),
    "window": Case(windowed_by_places, operands(), {"mask": WINDOW}, mask="causal, window 150"),
    "padding": Case(sdpa, (*GROUPED, PADDING), {"mask": PADDING}, mask="padding mask"),
    "documents": Case(
        lambda q, k, v, d: sdpa(q, k, v, d == d[:, None]),
        (*GROUPED, DOCUMENTS),
        {"mask": SAME_DOCUMENT},
        mask="same document",
    ),
    "bool": Case(sdpa, (*GROUPED, RANDOM), {"mask": RANDOM}, mask="bool tensor [2, 1, 400, 400]"),
    "bias": Case(sdpa, (*GROUPED, BIAS), {"mask": BIAS}, mask="additive float32"),
    "cross": Case(sdpa, operands(200, 500)),
    "flex": Case(flex, operands(), {"softcap": 5.0}, "flex"),
}
