"""The forward of one model, compiled apart for steps, drafts and prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch

from lychee_compile.backend import lychee

Forward = Callable[..., Any]

_WITHOUT_CUDA_GRAPHS = {
    "reduce-overhead": None,
    "max-autotune": "max-autotune-no-cudagraphs",
}
"""Modes of Inductor that record CUDA graphs, and what does the same without."""


class CompiledForward:
    """A forward that is compiled apart for four uses, each when it is first called.

    Dynamo takes each for a function of its own: no model uses up the recompile limit of another,
    and a number of tokens that varies in one use stays a constant in the others. The model is
    passed at each call, `step(model, forward, **inputs)`, and not kept.
    """

    def __init__(self, options: Mapping[str, Any], cuda: bool) -> None:
        mode = options.get("mode", "reduce-overhead" if cuda else None)
        without = {**options, "mode": _WITHOUT_CUDA_GRAPHS.get(mode, mode)}
        self.step = _compiled({**options, "mode": mode})
        """Takes one token of each row."""
        self.drafts = _compiled(without)
        """Takes a few tokens, of which some may be taken back."""
        self.chunk = _compiled(without)
        """Takes as many tokens as a chunk of a prompt has."""
        self.rest = _compiled(without)
        """Takes any number of tokens, and never records CUDA graphs."""


def _call(self: Any, forward: Forward, /, *args: Any, **kwargs: Any) -> Any:
    return forward(self, *args, **kwargs)  # "self", as module paths begin there


def _compiled(options: Mapping[str, Any]) -> Forward:
    """Return a compiled copy of `_call`, of which Dynamo knows no other copy."""
    name = f"generate_{next(_copies)}"
    copy = FunctionType(_call.__code__.replace(co_name=name), globals(), name)
    return torch.compile(copy, backend=lychee, options=dict(options))


_copies = itertools.count()
