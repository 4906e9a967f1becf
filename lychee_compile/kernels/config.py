"""What an index and a selection are parametrised by: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("lychee", "streaming")
BOUNDARIES = ("auto", "tokens", "similarity", "fixed")


@dataclass(frozen=True)
class IndexConfig:
    """Parameters of the chunk index and of the selection from it (LycheeCluster, arXiv 2603.08453).

    All lengths are in tokens. A selection reads at most `budget` tokens per KV head and query
    position, the `sinks` first and the `recent` last valid tokens among them.
    """

    budget: int | None = 1024
    """Tokens read per KV head and step, sinks and recent included; None reads all of them."""
    sinks: int = 16
    """First valid tokens of each row, always read."""
    recent: int = 64
    """Last tokens of each row, always read."""
    chunk: tuple[int, int] = (8, 16)
    """Shortest and longest chunk."""
    cluster_chunks: int = 4
    """Chunks that a fine cluster holds on average."""
    coarse_units: int = 64
    """At most this many coarse units above the fine clusters."""
    overfetch: int = 4
    """Fine clusters are taken until they hold `overfetch * budget` tokens; then come chunks."""
    flat_chunks: int = 4096
    """Up to this many chunks all are ranked, which is then faster than to descend through units and
    clusters, and slightly better."""
    boundaries: str = "auto"
    """Where chunks are cut: see `BOUNDARIES`. "auto" cuts by token strengths where they are known
    and by the similarity of neighbouring keys elsewhere."""
    policy: str = "lychee"
    """How chunks are chosen: see `POLICIES`. "streaming" reads sinks and recent tokens alone."""
    seed: int = 0
    """Seed of the k-means."""
