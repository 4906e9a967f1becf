"""The best choice of chunks that there is, made from every score: a yardstick."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.grouped import GroupedIndex
from lychee_compile.kernels.reference.question import Question, Runs


class OracleIndex(GroupedIndex):
    """Chooses among the boundary-aware chunks of LycheeCluster (arXiv 2603.08453) by true mass.

    Nothing is summarised: every key is read. A chunk is ranked by the softmax mass that it really
    holds: the mean, over the query heads of a KV head, of its share of all that a query sees.
    Chunks are cut as the `lychee` policy cuts them and read whole, beside sinks and a window. The
    difference between this and a policy of chunks is the price of that policy's estimates. The
    whole cache is read at every step: this is for evaluation.

    Chunks are taken in the order of their mass, which is best up to the last one that fits. Tokens
    taken one by one hold more. The oracle of tokens is `tokenselect` that never reuses a choice, if
    there is one KV head; several KV heads choose together there.
    """

    reads_keys = True

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Return no summaries."""
        return {}

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Raise NotImplementedError: there are no summaries to estimate from."""
        raise NotImplementedError("the oracle estimates nothing: it reads the keys")

    def choose(self, question: Question) -> Runs:
        """Return the chunks of most mass, whole."""
        share = question.share(question.token_scores(), of_all=True)
        share = share.masked_fill(~question.candidates()[:, None], -torch.inf)
        offset = torch.arange(self.group_range[1], device=self.device)
        slot = (self.group_start[..., None] + offset).clamp(max=share.shape[-1] - 1)
        wide = slot.flatten(1)[:, None, None].expand(*share.shape[:3], -1)
        inside = offset < self.group_length[:, None, None, :, None]
        inside_shares = share.gather(-1, wide).unflatten(-1, slot.shape[1:])
        rank = inside_shares.masked_fill(~inside, -torch.inf).logsumexp(-1)
        return question.take_groups(rank, self.group_start, self.group_length)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count every key."""
        return 2 * self.head_dim * tokens
