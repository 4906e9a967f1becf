"""What a kernel is generated for: everything about one attention site that its code depends on."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

S = sympy.Symbol("s", real=True)
"""The raw score, a product of a query and a key."""
B, H, Q, KV, KV_LEN = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "q", "kv", "kv_len")
)
"""Row of the batch, query head, query position within the call, slot of the cache, slots."""

SHORT_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True)
class Captured:
    """A tensor that the score or the mask reads."""

    name: str
    """What expressions call it: `sympy.IndexedBase(name)`."""
    dtype: str
    """"bool", "float32", "int64", ..."""
    rank: int


@dataclass(frozen=True)
class SparseSpec:
    """How a sparse site selects. All lengths are in tokens."""

    policy: str
    budget: int
    sinks: int
    recent: int
    overfetch: int
    flat_tokens: int


@dataclass(frozen=True)
class TileSpec:
    """How tiles of a whole sequence choose what they read. All lengths are in tokens."""

    sinks: int
    recent: int


@dataclass(frozen=True)
class AttentionSpec:
    """One attention: softmax(score(q.k)) v over the visible keys of a cache.

    Batch, lengths, the number of heads and strides are arguments of the kernels, not part of this.
    """

    dtype: str
    """Of query, key and value: a key of `SHORT_DTYPES`."""
    group: int
    """Query heads that share a KV head."""
    head_dim: int
    value_dim: int
    score: sympy.Expr
    """Of S, B, H, Q, KV and elements of captured tensors."""
    visible: Boolean = sympy.true
    """Which keys a query sees, of B, H, Q, KV, KV_LEN and elements of captured tensors."""
    captured: tuple[Captured, ...] = ()
    extra: bool = False
    """Whether there is an extra logit without a value, an attention sink."""
    sparse: SparseSpec | None = None
    """How a step of decoding selects; None: it does not."""
    tiles: TileSpec | None = None
    """How tiles of a whole sequence do; None: this is for decoding."""
    autotune: bool = False
    """Whether tile sizes are measured at the first call."""

    @property
    def name(self) -> str:
        """A readable key, "decode_lychee_bf16_g4_d128_b1024"."""
        parts = ["decode", "exact" if self.sparse is None else self.sparse.policy]
        if self.tiles is not None:
            parts = ["prefill", "lychee"]
        parts += [SHORT_DTYPES[self.dtype], f"g{self.group}", f"d{self.head_dim}"]
        if self.value_dim != self.head_dim:
            parts.append(f"v{self.value_dim}")
        if self.sparse is not None:
            parts.append(f"b{self.sparse.budget}")
        return "_".join(parts)
