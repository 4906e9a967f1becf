"""Parameters of sparse attention: plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

BOUNDARIES = ("auto", "tokens", "similarity", "fixed")
"""Values of the option `boundaries`."""
PREFILLS = ("exact", "sparse")
"""Values of the option `prefill`."""
DRAWN_FROM = 512
"""Number of tokens or keys of a budget from which on those of small shares are drawn.

With room to choose some 128 the best lose as little. With less room drawn ones lose more.
"""
ALL_KEYS = 10**9
"""Value of the option `prefill_budget` from which on every tile of a prefill reads all keys."""


@dataclass(frozen=True)
class IndexConfig:
    """Settings of sparse attention: of the index, of the selection from it, and of prefill.

    They are plain numbers and words, so that equal settings are equal and hashable: graphs with
    equal settings share the index of a cache. All lengths are in tokens. A selection reads at most
    `budget` tokens per KV head and query position; the `sinks` first and the `recent` last valid
    tokens count among them. The names are those of LycheeCluster (arXiv 2603.08453).
    """

    budget: int | None = 1024
    """Number of tokens read per KV head and step, sinks and recent included; None reads all."""
    sinks: int = 16
    """Number of first valid tokens of each row, which are always read."""
    recent: int = 64
    """Number of last tokens of each row, which are always read."""
    chunk: tuple[int, int] = (8, 16)
    """Lengths of the shortest and the longest chunk."""
    cluster_chunks: int = 4
    """Mean number of chunks in a fine cluster."""
    coarse_units: int = 64
    """Largest number of coarse units above the fine clusters."""
    overfetch: int = 16
    """Number of candidate tokens for each token that is read, in a context longer than
    `flat_tokens`. Units, clusters and chunks, or pages on a GPU, narrow the context down to the
    candidates, whose sketches are then ranked."""
    flat_tokens: int = 65536
    """Longest context in which the sketches of all tokens are ranked. That is a better choice than
    one through units, clusters and chunks. On a CPU it is also faster up to some 100,000 tokens at
    budget 1,024 (measured: see benchmarks/results/index-cost.md)."""
    boundaries: str = "auto"
    """Cuts of chunks, one of `BOUNDARIES`: "tokens" cuts by boundary strengths of token ids,
    "similarity" where neighbouring keys differ, "fixed" at one length, and "auto" by token ids if
    their strengths are known and by similarity elsewhere."""
    coverage: float | None = None
    """Share of the softmax mass, as a policy estimates it, at which choosing ends: a KV head and
    query position read the fewest of the best tokens that hold it together with sinks and recent
    tokens, and at most `budget`. It is the mean over the query heads of the KV head. None: as many
    as the budget."""
    draw: bool | None = None
    """Draw the tokens of small shares by chance, with policy "lychee". A token that is read counts
    as often as tokens like it are not, so that a step sums over all tokens on average (priority
    sampling, Duffield, Lund and Thorup, 2007). Luck depends on the slot, the KV head and the step:
    the same step always reads the same. None: from a budget of `DRAWN_FROM` tokens on, if neither
    `coverage` nor `epsilon` is set."""
    policy: str = "lychee"
    """Method of choosing tokens. To decode: "lychee", "lycheecluster", "quest", "clusterkv",
    "tokenselect", "longheads", "fasa", "hisa", "dhsa", "streaming", "oracle", or one of your own.
    For prefill: "lychee", "streaming", "dhsa", "s2o", "compact", or one of your own; "s2o" and
    "compact" cannot decode."""
    epsilon: float | None = None
    """Largest share of the softmax mass that may be missed. The budget widens, up to all tokens,
    until a certificate proves it. Kernels do not widen it: a query whose certificate proves too
    little reads all keys. None: the budget is kept and nothing is proved."""
    seed: int = 0
    """Seed of the k-means clustering."""
    repair: bool = True
    """Cluster all chunks of "lychee" anew once they are twice as many, and fit the axes of its
    sketches anew, as tokens arrive. Without repair an index gets worse the more is generated. A GPU
    always repairs."""
    dense_layers: int | None = None
    """Number of first layers that stay exact; None: as in the policy's paper. A graph of one
    attention that does not tell the number of its layer has none."""
    prefill: str = "exact"
    """Attention of prefill, encoders and vision: "exact", or "sparse", where every tile of queries
    reads the keys that matter to it."""
    prefill_budget: int | float = 0.2
    """Number of keys that a tile of a sparse prefill reads, an int, or their share of the keys that
    it sees, a float up to 1.0, which is all of them. Sinks, recent tokens and keys that only some
    of its queries see count among them, and are always read."""
    prefill_coverage: float | None = None
    """Share of the softmax over the keys a tile may choose, by estimate, at which choosing ends: it
    reads those that hold it and a sample of the others. None: as many keys as the budget."""
    prefill_from: int = 16384
    """Number of keys from which on a prefill is sparse. A tile that sees fewer keys reads all of
    them: below, sparse attention saves no time."""
    reference: bool = False
    """Run the plain PyTorch operators on any device, to study quality. They are slow on a GPU."""

    def draws(self, budget: int) -> bool:
        """Return True if a step that reads `budget` tokens draws those of small shares."""
        if self.draw is not None:
            return self.draw
        proves_or_ends = self.epsilon is not None or self.coverage is not None
        return self.policy == "lychee" and not proves_or_ends and budget >= DRAWN_FROM
