"""Greedy steps of decoding, and their time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lychee_compile.evaluate.cache_argument import cache_argument

WARM_UP = 8
"""Number of steps before any is timed: the first ones compile."""
ROUNDS = 5
"""Number of rounds of steps, of whose mean times the median counts."""

Step = Callable[[Tensor], Tensor]
"""One step of greedy decoding: the next token [B, 1] after a token [B, 1]."""


def greedy_step(model: Any, forward: Callable[..., Any], cache: Any) -> Step:
    """Return a step of `forward`, that of `model` compiled, over `cache`; it does not wait."""
    arguments = {cache_argument(model): cache, "use_cache": True}

    def step(token: Tensor) -> Tensor:
        return forward(token, **arguments).logits[:, -1:].argmax(-1).clone()

    return step


def seconds_per_step(step: Step, token: Tensor, steps: int, rounds: int = ROUNDS) -> float:
    """Return the median over rounds of the mean time of `steps` steps, after a warm-up."""
    for _ in range(WARM_UP):
        token = step(token)
    times = []
    for _ in range(rounds):
        synchronise(token)
        started = time.perf_counter()
        for _ in range(steps):
            token = step(token)
        synchronise(token)
        times.append((time.perf_counter() - started) / steps)
    return statistics.median(times)


def synchronise(tensor: Tensor) -> None:
    """Wait for the GPU that a tensor is on."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
