"""The best choice of chunks there is, from every score: a yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.grouped import GroupedIndex
from lychee_compile.kernels.reference.question import Question, Runs


class OracleIndex(GroupedIndex):
    """Chooses among the boundary-aware chunks of LycheeCluster (arXiv 2603.08453) by true mass.

    Nothing is summarised: every key is read, and a chunk is ranked by the softmax mass that it
    really holds, of all that a query sees, as the mean of its shares over the query heads of a KV
    head. Chunks are cut as the `lychee` policy cuts them and read whole, beside sinks and a window:
    what a policy of chunks captures less than this is what its estimates cost it. Reads the whole
    cache at every step: for evaluation.

    Chunks are taken in the order of their mass, which is best up to the last one that fits. Tokens
    taken one by one hold more: `tokenselect` that never reuses a choice is that oracle, of tokens,
    where there is one KV head; with several it lets them choose together.
    """

    reads_keys = True

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """There are no summaries to estimate from. Raises NotImplementedError."""
        raise NotImplementedError("the oracle estimates nothing: it reads the keys")

    def choose(self, question: Question) -> Runs:
        """Whole chunks of most mass."""
        share = question.share(question.token_scores())
        share = share.masked_fill(~question.candidates()[:, None], -torch.inf)
        offset = torch.arange(self.group_range[1], device=self.device)
        slot = (self.group_start[..., None] + offset).clamp(max=share.shape[-1] - 1)
        wide = slot.flatten(1)[:, None, None].expand(*share.shape[:3], -1)
        inside = offset < self.group_length[:, None, None, :, None]
        held = share.gather(-1, wide).unflatten(-1, slot.shape[1:])
        rank = held.masked_fill(~inside, -torch.inf).logsumexp(-1)
        return question.take_groups(rank, self.group_start, self.group_length)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Every key."""
        return 2 * self.head_dim * tokens
