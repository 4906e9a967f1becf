"""Ways to decode that are compared: those that users have without this package, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lychee_compile.cli.bench.whole_buffer import WHOLE_BUFFER

WAYS: Mapping[str, str] = {
    "eager": "transformers as it comes, not compiled",
    "compiled": "torch.compile with Inductor; CUDA graphs on a GPU",
    "flash": "the same without copies of grouped keys and without a mask, if that is right",
    "exact": "this backend with budget=None",
    "lychee": "this backend with the options below",
}
"""Description of each way, by its name."""


@dataclass(frozen=True)
class Way:
    """One way to call the forward of a model for each token."""

    label: str
    """Name in tables."""
    attention: str | None = None
    """Name of transformers' implementation of attention; None: the one that the model has."""
    backend: str | None = None
    """Backend of torch.compile; None: the model is not compiled."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of this backend."""

    @property
    def ours(self) -> bool:
        """True if this backend compiles the model."""
        return self.backend == "lychee"

    def forward(self, model: Any) -> Callable[..., Any]:
        """Return the forward to call, compiled if the way says so."""
        if self.backend is None:
            return model.forward
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        if self.ours:
            options: dict[str, Any] = {"mode": mode, **self.options}
            return torch.compile(model.forward, backend="lychee", options=options)
        return torch.compile(model.forward, backend=self.backend, mode=mode)


def ways(names: Sequence[str], options: Mapping[str, Any]) -> list[Way]:
    """Return the ways called `names`; `options` are those of this backend."""
    known = {
        "eager": Way("eager"),
        "compiled": Way("compiled", backend="inductor"),
        "flash": Way("flash", WHOLE_BUFFER, "inductor"),
        "exact": Way("exact", backend="lychee", options={"budget": None}),
        "lychee": Way(str(options.get("policy", "lychee")), backend="lychee", options=options),
    }
    return [known[name] for name in WAYS if name in names]
