"""Ways to decode that are compared: those that users have without this package, and ours."""

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
"""Name by which transformers knows the baseline without `repeat_kv`."""


@dataclass(frozen=True)
class Way:
    """One way to call a model's forward for each token."""

    label: str
    """Name that tables show."""
    compile_arguments: Mapping[str, Any] | None
    """Arguments of `torch.compile`; None if the model is not compiled."""
    attention: str = "sdpa"
    """Name of transformers' implementation of attention."""
    sparse: bool = False
    """True if the budget is among the options of the backend."""

    def compiled(self, forward: Callable[..., Any], budget: int) -> Callable[..., Any]:
        """Return the forward to call; a sparse one reads `budget` tokens."""
        if self.compile_arguments is None:
            return forward
        arguments = dict(self.compile_arguments)
        if self.sparse:
            arguments["options"] = {**arguments["options"], "budget": budget}
        return torch.compile(forward, fullgraph=True, **arguments)


def _flash(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend to the whole buffer, without copies of grouped keys and without a mask.

    This is the fastest that dense attention gets. It is right only if the buffer is full.
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
"""Ways by name; all that are compiled have mode="reduce-overhead"."""
