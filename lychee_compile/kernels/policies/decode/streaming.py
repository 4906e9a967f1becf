"""StreamingLLM: the first and the last tokens, whatever the query."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.question import Question, Runs


class StreamingIndex(KVIndex):
    """StreamingLLM (arXiv 2309.17453): attention sinks and a window that fills the budget.

    Nothing is summarised and nothing is ranked. The `sinks` first tokens are read, and as many of
    the last as the budget allows; `recent` of them even if the budget is smaller. The window moves
    with every token. A choice by content must beat this policy.

    Not as in the paper: tokens keep the positions they were encoded with, as the cache holds them
    rotated, and what leaves the window stays in the cache.
    """

    estimates_shares = False

    def extend(self, key: Tensor, end: Tensor) -> None:
        """Let every token be chosen as soon as it is there."""
        self.end, self.tail = end.clone(), torch.maximum(end, self.start)

    def choose(self, question: Question) -> Runs:
        """Return one run of the last tokens that a query sees, or two if the cache wraps."""
        candidate, end = question.candidates(), question.end[..., None]
        stop = end if question.newest is None else question.newest[..., None] + 1
        older = torch.arange(candidate.shape[-1], device=self.device) >= stop
        start, length, room = self._last(candidate & ~older, question.room, end.minimum(stop))
        more, size, _ = self._last(candidate & older, room, end)
        return torch.cat((start, more), -1), torch.cat((length, size), -1)

    def _last(self, candidate: Tensor, room: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the run of the last `room` candidates, which ends at `end`, and the room left.

        `candidate` is bool [B, Tq, L], `room` int64 [B, Hkv, Tq], `end` int64 [B, Tq, 1].
        """
        behind = candidate.flip(-1).cumsum(-1).flip(-1)[:, None]
        taken = candidate[:, None] & (behind <= room[..., None])
        start = taken.to(torch.uint8).argmax(-1, keepdim=True)
        length = torch.where(taken.any(-1, keepdim=True), end[:, None] - start, 0)
        return start, length, room - taken.sum(-1)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Return 0: nothing is looked at."""
        return 0
