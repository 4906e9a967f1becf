"""Records for the report: one attention with its outcome, and one softmax that is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lychee_compile.passes.reasons import Reason

Decision = Literal["sparse", "exact", "kept"]
""""sparse": index and pruned attention; "exact": another operator that reads all keys, a generated
kernel or PyTorch's; "kept": the original."""


@dataclass
class Site:
    """One attention of a graph. Sizes are symbolic expressions (str) if shapes are dynamic."""

    name: str
    """Path of the module that attends, "model.layers.3.self_attn"."""
    source: str
    """Line of the user's code, "modeling_llama.py:275, in forward"."""
    form: str
    """Spelling of the attention: "sdpa"; "eager", two products and a softmax however written;
    "flex"; or "fused", a whole module in one operator of PyTorch."""
    query_heads: int | str
    """Number of query heads, Hq."""
    kv_heads: int | str
    """Number of key and value heads, Hkv."""
    head_dim: int | str
    """Size of a query and of a key, D."""
    query_len: int | str
    """Number of query positions, Tq."""
    kv_len: int | str
    """Number of keys, L; for a static cache that of its whole buffer."""
    mask: str
    """Mask in words: "none", "causal, window 512", "bool tensor [1, 1, 1, 6000]"."""
    cache: str
    """Kind of cache that keys are read from: "none", "static", "dynamic" or "sliding"."""
    value_head_dim: int | str = ""
    """Size of a value, Dv."""
    score: str = "s"
    """Argument of the softmax as a formula of s = q.k, batch b, head h, query q and key kv; empty
    if it could not be read."""
    predicate: str = ""
    """Condition under which a key is visible, a formula of b, h, q and kv; empty if all are."""
    key_range: str = ""
    """Keys that may be visible, "[0, cumulative_length + q + 1)"."""
    monotone: bool = False
    """True if the score is proved to grow with q.k, so that bounds of q.k bound the score."""
    decision: Decision = "kept"
    """Outcome, one of `Decision`."""
    reason: Reason | None = None
    """Reason why the attention is not sparse; None if it is sparse."""
    reads: str = ""
    """Number or share of the keys that sparse attention reads, in words; "" for other attention."""
    by_design: bool = False
    """True if a kept site is meant to be exact, False if it is kept for want of support."""
    kernel: str = ""
    """Name of the operator or the generated kernel that runs. `Report.sources` has the source of a
    generated one."""
    keys: str = ""
    """Keys as a formula of what is stored, and of row b, head h, token kv and channel d; "" if they
    are stored as they are read."""
    values: str = ""
    """Values as such a formula."""
    note: str = ""
    """Remark on an option that was not applied to a sparse site; "" if there is none."""


@dataclass(frozen=True)
class RejectedSite:
    """A softmax that belongs to no attention."""

    name: str
    """Path of the module that computes the softmax."""
    source: str
    """Line of the user's code, as in `Site`."""
    reason: Reason
    """Reason why the softmax belongs to no attention."""
