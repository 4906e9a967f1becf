"""A policy that reads every key: the backend's sparse path with the result of dense attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.policies.registry import register_policy
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, Runs

NAME = "read_all"
SHORTEST = 2
"""Keys that the backend may know to be within the budget, and then rewrites no attention."""


class ReadAllIndex(KVIndex):
    """Every token counts as recent, whatever the budget; so nothing is ever chosen."""

    @property
    def always_read(self) -> tuple[int, int]:
        """All of them."""
        return 0, 2**40

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Nothing is summarised."""
        self.end = self.tail = end.clone()

    def choose(self, question: Question) -> Runs:
        """No runs: `[B, Hkv, Tq, 0]`."""
        none = torch.zeros(*question.room.shape, 0, dtype=torch.int64, device=self.device)
        return none, none

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Nothing is looked at."""
        return 0


def read_all_options() -> dict[str, Any]:
    """Options under which attention over more than `SHORTEST` keys is rewritten and stays exact."""
    register_policy(NAME, ReadAllIndex)
    return {"policy": NAME, "budget": SHORTEST, "sinks": 0, "recent": 1, "chunk": (1, 1)}
