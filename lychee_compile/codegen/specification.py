"""The specification of a module: everything about one attention site that its code depends on."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import sympy
from sympy.logic.boolalg import Boolean

from lychee_compile.kernels.levels.groups import GroupSettings

S = sympy.Symbol("s", real=True)
"""The raw score: the product of a query and a key."""
B, H, Q, KV, KV_LEN = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "q", "kv", "kv_len")
)
"""Batch row, query head, query position within the call, slot of the cache, number of slots."""

KV_HEAD = H
"""KV head, in expressions of keys and values, which have no query head."""
D = sympy.Symbol("d", integer=True, nonnegative=True)
"""Channel of a key or value."""

SHORT_DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True)
class Captured:
    """A tensor whose elements the score or the mask reads."""

    name: str
    """Name of the tensor in expressions: `sympy.IndexedBase(name)`."""
    dtype: str
    """Name of a dtype: "bool", "float32", "int64", ..."""
    rank: int


@dataclass(frozen=True)
class Stored:
    """A tensor whose elements keys or values are computed from."""

    name: str
    """Name of the tensor in expressions."""
    dtype: str
    """Name of a dtype: "int8", "float8_e4m3fn", "int64", ..."""
    sizes: tuple[int | None, ...]
    """Sizes that a kernel has to know, by dimension; None: it need not know this one."""


@dataclass(frozen=True)
class LoadSpec:
    """Keys or values as an expression of what is stored."""

    element: sympy.Expr
    """Element [b, h, kv, d] of keys or values, an expression of B, KV_HEAD, KV, D and elements of
    tensors. Indices that may be negative are remainders already."""
    tensors: tuple[Stored, ...]
    """Tensors that the expression reads, in the order of a call."""
    numbers: tuple[sympy.Symbol, ...] = ()
    """Sizes that only a call tells, as that of a past before a tail, in the order of a call."""


@dataclass(frozen=True)
class SparseSpec:
    """The selection of a step of decoding. All lengths are in tokens."""

    policy: str
    """Name of the policy that selects."""
    budget: int
    sinks: int
    recent: int
    overfetch: int
    flat_tokens: int
    coverage: float | None = None
    """Share of the softmax, as shares estimate it, at which choosing ends below 1; None: as many
    tokens are read as the budget allows."""
    groups: GroupSettings = field(default_factory=GroupSettings)
    """Settings by which chunks are cut and clusters are made."""
    epsilon: float | None = None
    """Largest share of the softmax that a row may leave unread: a row whose certificate is larger
    reads all keys. 1: certificates are computed, and change nothing; None: there are none."""
    draws: bool = False
    """True if tokens of small shares are drawn by chance, and stand for others."""


@dataclass(frozen=True)
class TileSpec:
    """The choice of the tiles of a prefill. All lengths are in tokens."""

    policy: str
    """Name of the policy that chooses."""
    sinks: int
    recent: int
    ordered: bool = False
    """True if queries come in another order than the keys that they are the tokens of."""


@dataclass(frozen=True)
class AttentionSpec:
    """One attention: softmax(score(q.k)) v over the visible keys of a cache.

    Batch, lengths, number of heads and strides are no part of it: kernels take them as arguments.
    """

    dtype: str
    """Dtype of query, key and value: a key of `SHORT_DTYPES`."""
    group: int
    """Query heads that share a KV head."""
    head_dim: int
    value_dim: int
    score: sympy.Expr
    """Score before the softmax, of S, B, H, Q, KV and elements of captured tensors."""
    visible: Boolean = sympy.true
    """Condition for a visible key, of B, H, Q, KV, KV_LEN and elements of captured tensors."""
    captured: tuple[Captured, ...] = ()
    extra: bool = False
    """True if there is an extra logit, as of an attention sink."""
    sparse: SparseSpec | None = None
    """Selection of a step of decoding; None: it reads all keys."""
    tiles: TileSpec | None = None
    """Choice of the tiles of a prefill; None: the site is for decoding."""
    autotune: bool = False
    """True if tile sizes are measured at the first call."""
    extra_value: bool = False
    """True if the extra logit has a value."""
    part: bool = False
    """True if the output is to be joined with attention to other keys: it is float32, and has the
    log-sum-exp of the scores behind its channels."""
    keys: LoadSpec | None = None
    """Keys as an expression of what is stored; None: they are stored as they are."""
    values: LoadSpec | None = None
    """Values as such an expression."""

    @property
    def policy(self) -> str | None:
        """Return the name of the policy that selects keys; None: all visible keys are read."""
        chosen = self.sparse if self.tiles is None else self.tiles
        return None if chosen is None else chosen.policy

    @property
    def name(self) -> str:
        """Return a readable name, such as "decode_lychee_bf16_g4_d128_b1024"."""
        policy = re.sub(r"\W", "_", self.policy or "exact", flags=re.ASCII)
        parts = ["decode" if self.tiles is None else "prefill", policy]
        parts += [SHORT_DTYPES[self.dtype], f"g{self.group}", f"d{self.head_dim}"]
        if self.value_dim != self.head_dim:
            parts.append(f"v{self.value_dim}")
        parts += ["loads"] if self.keys is not None or self.values is not None else []
        parts += ["part"] if self.part else []
        if self.sparse is not None:
            parts.append(f"b{self.sparse.budget}")
            if self.sparse.coverage is not None:
                parts.append(f"c{self.sparse.coverage:g}".replace(".", "_"))
            if self.sparse.draws:
                parts.append("drawn")
            if self.sparse.epsilon is not None:
                parts.append(f"e{self.sparse.epsilon:g}".replace(".", "_").replace("-", "m"))
        return "_".join(parts)
