"""What is known of one attention in a graph, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lychee_compile.passes.reasons import Reason

Decision = Literal["sparse", "exact", "kept"]
""""sparse": index and pruned attention; "exact": another operator that reads all keys, a generated
kernel or PyTorch's; "kept": the original."""


@dataclass
class Site:
    """One attention found. Sizes are symbolic expressions (str) where shapes are dynamic."""

    name: str
    """Module path, "model.layers.3.self_attn"."""
    source: str
    """The user's line, "modeling_llama.py:275, in forward"."""
    form: str
    """How it was written: "sdpa"; "eager", products and a softmax in any spelling; "flex"; "fused",
    a whole module in one operator of PyTorch's."""
    query_heads: int | str
    kv_heads: int | str
    head_dim: int | str
    query_len: int | str
    """Tokens that ask, Tq."""
    kv_len: int | str
    """Tokens of K and V, whole buffer of a static cache."""
    mask: str
    """Class in words: "none", "causal, window 512", "bool tensor [1, 1, 1, 6000]"."""
    cache: str
    """"none", "static", "dynamic" or "sliding"."""
    value_head_dim: int | str = ""
    """Size of a value, Dv."""
    score: str = "s"
    """What goes into the softmax, in s = q.k, batch b, head h, query q and key kv; empty where that
    could not be read."""
    predicate: str = ""
    """Which keys are visible, likewise; empty where all are."""
    key_range: str = ""
    """Keys that may be visible, "[0, cumulative_length + q + 1)"."""
    monotone: bool = False
    """Whether the score is proved to grow with q.k, so that bounds of q.k bound it."""
    decision: Decision = "kept"
    """Outcome, one of `Decision`."""
    reason: Reason | None = None
    """Why it is not sparse; None if it is."""
    reads: str = ""
    """How much of the keys a sparse attention reads, in words; empty if it is not sparse."""
    by_design: bool = False
    """Whether a kept site is meant to be exact, and not kept for want of support."""
    kernel: str = ""
    """Operator that runs, or the generated kernel: `Report.sources` has its source."""


@dataclass(frozen=True)
class RejectedSite:
    """A softmax that belongs to no attention."""

    name: str
    """Module path."""
    source: str
    """The user's line."""
    reason: Reason
    """Why it is none."""
