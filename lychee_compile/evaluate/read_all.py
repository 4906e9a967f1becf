"""Policy that reads every key: the backend's sparse path with the result of dense attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lychee_compile.kernels.policies.registry import register_policy
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, Runs

NAME = "read_all"
SHORTEST = 2
"""Budget of the policy; the backend rewrites no attention over as many keys or fewer."""


class ReadAllIndex(KVIndex):
    """Index to which every token counts as recent, so that nothing is ever chosen."""

    @property
    def always_read(self) -> tuple[int, int]:
        """Number of sinks and of recent tokens: all tokens are recent."""
        return 0, 2**40

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Note the new `end` [B] and summarise nothing."""
        self.end = self.tail = end.clone()

    def choose(self, question: Question) -> Runs:
        """Return no runs: [B, Hkv, Tq, 0]."""
        none = torch.zeros(*question.room.shape, 0, dtype=torch.int64, device=self.device)
        return none, none

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Return 0, as nothing is read to choose."""
        return 0


def read_all_options() -> dict[str, Any]:
    """Return options under which attention over more than `SHORTEST` keys is sparse and exact."""
    register_policy(NAME, ReadAllIndex, words="every key, to take tensors for the evaluation")
    return {"policy": NAME, "budget": SHORTEST, "sinks": 0, "recent": 1, "chunk": (1, 1)}
