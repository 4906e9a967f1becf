"""Ways to decode that are compared: those that users have without this package, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lychee_compile.cli.bench.whole_buffer import WHOLE_BUFFER


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


_INDUCTOR = {"mode": "reduce-overhead"}
_LYCHEE = {"backend": "lychee", "options": {"mode": "reduce-overhead", "budget": None}}

WAYS = {
    "eager": Way("HF eager", None),
    "inductor": Way("HF + torch.compile", _INDUCTOR),
    "flash": Way("flash, no repeat_kv", _INDUCTOR, WHOLE_BUFFER),
    "exact": Way("lychee exact", _LYCHEE),
    "sparse": Way("lychee sparse", _LYCHEE, sparse=True),
}
"""Ways by name; all that are compiled have mode="reduce-overhead"."""
