"""The ways to decode that are compared: what a user has, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

FLASH = "dense_gqa"


@dataclass(frozen=True)
class Way:
    """One way to call a model's forward for each token."""

    label: str
    given: Mapping[str, Any] | None
    """What `torch.compile` is given; None: not compiled."""
    attention: str = "sdpa"
    """transformers' implementation of attention."""
    sparse: bool = False

    def compiled(self, forward: Callable[..., Any], budget: int) -> Callable[..., Any]:
        """The forward to call; `budget` counts if it is sparse."""
        if self.given is None:
            return forward
        given = dict(self.given)
        if self.sparse:
            given["options"] = {**given["options"], "budget": budget}
        return torch.compile(forward, fullgraph=True, **given)


def _flash(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over the whole buffer, without copies of grouped keys and without a mask.

    The fastest that dense attention gets: right only where the buffer is full.
    """
    output = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def register() -> None:
    """Make the baseline without `repeat_kv` known to transformers."""
    AttentionInterface.register(FLASH, _flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, lambda *_, **__: None)


_INDUCTOR = {"mode": "reduce-overhead"}
_LYCHEE = {"backend": "lychee", "options": {"mode": "reduce-overhead", "budget": None}}

WAYS = {
    "eager": Way("HF eager", None),
    "inductor": Way("HF + torch.compile", _INDUCTOR),
    "flash": Way("flash, no repeat_kv", _INDUCTOR, FLASH),
    "exact": Way("lychee exact", _LYCHEE),
    "sparse": Way("lychee sparse", _LYCHEE, sparse=True),
}
"""All compiled ones with mode="reduce-overhead"."""
