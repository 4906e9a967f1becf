"""What an index and a selection are parametrised by: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

BOUNDARIES = ("auto", "tokens", "similarity", "fixed")
PREFILLS = ("exact", "sparse")


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
    overfetch: int = 16
    """In a context longer than `flat_tokens`, units, clusters and chunks are narrowed down to this
    many tokens for each that is read; then come the sketches of single tokens."""
    flat_tokens: int = 65536
    """Up to this many tokens the sketches of all are ranked: better than to descend through units,
    clusters and chunks, and faster as long as one scan reads them quickly."""
    boundaries: str = "auto"
    """Where chunks are cut: see `BOUNDARIES`. "auto" cuts by token strengths where they are known
    and by the similarity of neighbouring keys elsewhere."""
    policy: str = "lychee"
    """How tokens are chosen, a name in `kernels/policies/decode`: "lychee", "quest",
    "clusterkv", "tokenselect", "hisa", "streaming", "oracle", or one of your own. Whole sequences
    can have those in `kernels/policies/prefill`: "lychee", "streaming", "dhsa", "s2o",
    "compact"; the last three cannot decode."""
    epsilon: float | None = None
    """Largest share of the softmax mass that may be missed: the budget widens, up to all tokens,
    until a certificate proves it. None: the budget holds, and nothing is proved."""
    seed: int = 0
    """Seed of the k-means."""
    repair: bool = True
    """Split clusters and units that grow too full or too wide, and find the axes of sketches anew
    as tokens arrive. Off, an index decays as more is generated: to see what repair is for."""
    dense_layers: int | None = None
    """First attentions of each graph that stay exact; None: as many as the policy's paper says."""
    prefill: str = "exact"
    """What attention over whole sequences does, prefill, encoders and vision: "exact", or "sparse":
    every tile of queries reads the keys that matter to it."""
    prefill_budget: int | float = 0.2
    """Keys that a tile of a whole sequence reads: a share of those it sees, below 1, or their
    number. Sinks, recent tokens and what it sees in part are among them, and read in any case."""
    prefill_from: int = 16384
    """Whole sequences of fewer keys stay exact, and tiles that see fewer read all of them: there
    sparse attention wins no time."""
    reference: bool = False
    """Run the plain PyTorch operators on any device, to study quality where they win no time."""
