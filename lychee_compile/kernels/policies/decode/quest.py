"""Quest: pages of sixteen tokens, ranked by the box around their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from lychee_compile.kernels.reference.grouped import GroupedIndex
from lychee_compile.kernels.reference.nodes import rounding_slack
from lychee_compile.kernels.sizes import PAGE


class QuestIndex(GroupedIndex):
    """Quest (arXiv 2406.10774): the pages whose bounding box may hold the largest scores.

    A page of 16 neighbouring tokens is summarised by the least and the greatest value of each key
    channel. It is ranked by sum over channels of max(q min, q max), the score of the best corner of
    that box, and pages are read whole, best first. Only the page that decoding is writing is always
    read: neither sinks nor a window are. A page is summarised once it is full and another has
    begun. The first two layers stay dense.

    Not as in the paper: query heads that share a KV head choose together, by the mean of their
    softmax shares over pages (the paper has no grouped queries; one head ranks as it does), and a
    page cut by a mask counts for the tokens it shows. At least the query's own token is read; it is
    in a full page if several positions are computed at once.
    """

    dense_layers = 2

    @property
    def group_range(self) -> tuple[int, int]:
        """Shortest and longest group: all pages have one length."""
        return PAGE, PAGE

    @property
    def always_read(self) -> tuple[int, int]:
        """The query's own token; the page being written is in no group, and read with it."""
        return 0, 1

    def summarise(self, keys: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Return the least and greatest key of each page, channel by channel: [B, Hkv, M, D]."""
        padding = ~valid[:, None, :, :, None]
        return {
            "least": keys.masked_fill(padding, torch.inf).amin(3),
            "greatest": keys.masked_fill(padding, -torch.inf).amax(3),
        }

    def log_estimate(self, query: Tensor, scale: float) -> Tensor:
        """Return the score of each page's best corner, [B, Hkv, R, C], as if all keys had it."""
        query = scale * query
        above = query.clamp(min=0) @ self.summaries["greatest"].transpose(-1, -2)
        return above + query.clamp(max=0) @ self.summaries["least"].transpose(-1, -2)

    def group_bound(self, query: Tensor, scale: float) -> Tensor:
        """Return the score of the best corner, widened by what float32 rounding can hide."""
        reach = torch.maximum(self.summaries["least"].abs(), self.summaries["greatest"].abs())
        most = (scale * query).abs() @ reach.transpose(-1, -2)
        bound = self.log_estimate(query, scale) + rounding_slack(self.head_dim) * most
        return bound.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def bytes_per_step(self, tokens: int, budget: int) -> int:
        """Count two vectors for each page."""
        return 2 * 2 * self.head_dim * (tokens // PAGE)
