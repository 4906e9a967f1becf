"""Counts of how often each decode step read from each chunk of a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lychee_compile.recorder import Call

PAGE = 16
"""Number of tokens in a page, where kernels read by pages."""


@dataclass(frozen=True)
class Reading:
    """Chunks of a document and how often each step read them."""

    edges: np.ndarray
    """First token of each chunk, and the end of the last chunk: int64 [chunks + 1]."""
    counts: np.ndarray
    """Number of (layer, KV head) that read something of a chunk: int64 [steps, chunks]."""
    readers: int
    """Number of (layer, KV head)."""

    @classmethod
    def of(cls, steps: Sequence[Sequence[Call]]) -> Reading:
        """Return the reading of batch row 0, by the chunks of the last step."""
        edges = _edges(steps[-1][0])
        counts = np.zeros((len(steps), len(edges) - 1), dtype=np.int64)
        for row, calls in zip(counts, steps, strict=True):
            for call in calls:
                for tokens in call.tokens[0, :, 0].cpu().numpy():
                    chunks = np.searchsorted(edges, tokens[tokens >= 0], side="right") - 1
                    row[np.unique(chunks)] += 1
        return cls(edges, counts, sum(call.tokens.shape[1] for call in steps[-1]))

    @property
    def totals(self) -> np.ndarray:
        """Number of reads of each chunk over all steps: int64 [chunks]."""
        return np.asarray(self.counts.sum(0))

    def most_read_at(self, begin: int, end: int) -> int:
        """Return the most read of the chunks that hold some of the tokens [begin, end)."""
        outside = (self.edges[:-1] >= end) | (self.edges[1:] <= begin)
        return int(np.argmax(np.where(outside, -1, self.totals)))

    def most_read(self, begin: int, end: int, count: int, first: Sequence[int]) -> list[int]:
        """Return the `count` most read chunks in the tokens [begin, end), in the document's order.

        `first` are among them. No two are so near that their numbers would cover each other.
        """
        totals = self.totals
        apart = (end - begin) / (2 * count)
        chosen = list(first)
        for chunk in np.argsort(-totals, kind="stable").tolist():
            inside = begin <= self.edges[chunk] and self.edges[chunk + 1] <= end
            near = any(abs(self.edges[chunk] - self.edges[other]) < apart for other in chosen)
            if inside and totals[chunk] and not near and len(chosen) < count:
                chosen.append(chunk)
        return sorted(chosen)


def _edges(call: Call) -> np.ndarray:
    """Return the edges of the chunks, or of pages of `PAGE` tokens if there are no chunks."""
    chunks = call.chunk_lengths[0] > 0
    if not chunks.any():
        return np.unique([*range(0, call.kv_len, PAGE), call.kv_len])
    starts = call.chunk_starts[0][chunks].cpu().numpy()
    return np.unique([*starts, call.kv_len])
