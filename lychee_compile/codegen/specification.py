"""The specification of a kernel: everything about one attention that its code depends on."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

S = sympy.Symbol("s", real=True)
"""The raw score: the product of a query and a key."""
B, H, Q, KV, KV_LEN = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "q", "kv", "kv_len")
)
"""Row of the batch, query head, query position within the call, slot of the cache, kv_len."""

SHORT_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""Dtypes that kernels read, and what a kernel's name says for them."""


@dataclass(frozen=True)
class Captured:
    """A tensor whose elements the score or the mask reads."""

    name: str
    """Its name in expressions, `sympy.IndexedBase(name)`, and in kernels."""
    dtype: str
    """Name of a dtype: "bool", "float32", "int64", ..."""
    rank: int
    """Number of dims."""


@dataclass(frozen=True)
class SparseSpec:
    """Selection of keys in a step of decoding. All lengths are in tokens."""

    policy: str
    """Name of the policy that selects."""
    budget: int
    sinks: int
    recent: int
    overfetch: int
    flat_tokens: int


@dataclass(frozen=True)
class TileSpec:
    """Choice of the keys that the tiles of a prefill read. All lengths are in tokens."""

    policy: str
    """Name of the policy that chooses."""
    sinks: int
    recent: int


@dataclass(frozen=True)
class AttentionSpec:
    """One attention: softmax(score(q.k)) v over the visible keys of a cache.

    Batch, lengths, the number of heads and strides are arguments of the kernels, not part of it.
    """

    dtype: str
    """The dtype of query, key and value: a key of `SHORT_DTYPES`."""
    group: int
    """Number of query heads that share a KV head."""
    head_dim: int
    value_dim: int
    score: sympy.Expr
    """The score, of S, B, H, Q, KV and elements of captured tensors."""
    visible: Boolean = sympy.true
    """True for a key that a query sees, of B, H, Q, KV, KV_LEN and elements of captured tensors."""
    captured: tuple[Captured, ...] = ()
    extra: bool = False
    """True if there is an extra logit without a value, an attention sink."""
    sparse: SparseSpec | None = None
    """Selection in a step of decoding; None: all keys are read, or this is a prefill."""
    tiles: TileSpec | None = None
    """Choice of the tiles of a prefill; None: this is for decoding."""
    autotune: bool = False
    """True if tile sizes are measured at the first call."""

    @property
    def policy(self) -> str | None:
        """Name of the policy that selects keys; None: all visible keys are read."""
        chosen = self.sparse if self.tiles is None else self.tiles
        return None if chosen is None else chosen.policy

    @property
    def name(self) -> str:
        """A readable name for people, such as "decode_lychee_bf16_g4_d128_b1024"."""
        parts = ["decode" if self.tiles is None else "prefill", self.policy or "exact"]
        parts += [SHORT_DTYPES[self.dtype], f"g{self.group}", f"d{self.head_dim}"]
        if self.value_dim != self.head_dim:
            parts.append(f"v{self.value_dim}")
        if self.sparse is not None:
            parts.append(f"b{self.sparse.budget}")
        return "_".join(parts)
