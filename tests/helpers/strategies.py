"""Hypothesis strategies for keys, masks, configurations and what happens to a cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from lychee_compile.kernels.config import IndexConfig
from lychee_compile.kernels.policies.registry import make_index
from lychee_compile.kernels.reference.certificate import log_unread_bound
from lychee_compile.kernels.reference.index import KVIndex
from lychee_compile.kernels.reference.operands import ScoreInputs
from lychee_compile.kernels.reference.selection import Selection, select

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("gaussian", "common", "topics", "duplicates", "zeros", "outlier", "huge", "scales")

seeds = st.integers(0, 2**20)


def random(seed: int, *shape: int) -> Tensor:
    """Standard normal float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_keys(kind: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return keys [B, Hkv, T, D] of a distribution that real or hostile caches have."""
    key = random(seed, *shape)
    tokens = shape[2]
    picks = torch.randint(tokens, (tokens,), generator=torch.Generator().manual_seed(seed))
    if kind == "common":
        key = 0.1 * key + 5 * random(seed + 1, *shape[:2], 1, shape[3])
    elif kind == "topics":
        key = 0.2 * key + 2 * random(seed + 1, *shape)[:, :, (picks % 3).sort().values]
    elif kind == "duplicates":
        key = key[:, :, picks % 3]
    elif kind == "zeros":
        key = key * (picks % 3 > 0)[:, None]
    elif kind == "outlier":
        key[:, :, picks[0]] *= 1e3
    elif kind == "huge":
        key = key * 5e3
    elif kind == "scales":
        key = key * torch.pow(10.0, (picks % 9 - 5).float())[:, None]
    return key.to(dtype)


@dataclass(frozen=True)
class Heads:
    """Everything of an attention's shape but its lengths."""

    batch: int
    kv_heads: int
    group: int
    head_dim: int

    @property
    def query_heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    def keys(self, kind: str, seed: int, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return keys [B, Hkv, T, D]."""
        return make_keys(kind, seed, (self.batch, self.kv_heads, tokens, self.head_dim), dtype)

    def queries(self, seed: int, query_len: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return queries [B, Hq, Tq, D]."""
        shape = (self.batch, self.query_heads, query_len, self.head_dim)
        return 2 * random(seed + 7, *shape).to(dtype)

    def index(self, config: IndexConfig) -> KVIndex:
        """Return an empty index for such keys."""
        return make_index(self.batch, self.kv_heads, self.head_dim, config, CPU)


def bounded_select(index: KVIndex, inputs: ScoreInputs, budget: int | None) -> Selection:
    """Return a selection that carries the bound of what it leaves out."""
    selection = select(index, inputs, budget)
    bound = log_unread_bound(index, inputs.query, selection, inputs.softcap)
    return dataclasses.replace(selection, log_unread_bound=bound)


heads = st.builds(
    Heads,
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 4, 16, 33]),
)


@st.composite
def configs(draw, **fixed) -> IndexConfig:
    """Draw small chunks and budgets, so that a hundred tokens exercise every level."""
    shortest = draw(st.integers(1, 4))
    longest = draw(st.integers(shortest, 8))
    sinks, recent = draw(st.integers(0, 5)), draw(st.integers(longest, longest + 8))
    drawn = {
        "budget": sinks + recent + draw(st.integers(1, 40)),
        "sinks": sinks,
        "recent": recent,
        "chunk": (shortest, longest),
        "cluster_chunks": draw(st.integers(1, 4)),
        "coarse_units": draw(st.sampled_from([1, 2, 5, 64])),
        "overfetch": draw(st.integers(1, 4)),
        "flat_tokens": draw(st.sampled_from([0, 0, 65536])),
        "boundaries": draw(st.sampled_from(["auto", "similarity", "fixed"])),
        "policy": "lychee",
        "seed": draw(st.integers(0, 3)),
    }
    return IndexConfig(**{**drawn, **fixed})


@dataclass(frozen=True)
class Mask:
    """An SDPA mask, and what it means, worked out apart from it."""

    tensor: Tensor | None
    """Mask as an SDPA call takes it."""
    seen: Tensor
    """bool [B, Hq, Tq, L]."""
    bias: Tensor
    """float64 [B, Hq, Tq, L], what is added to the scores; -inf where a key is hidden."""


PATTERNS = ("none", "causal", "left pad", "right pad", "window", "holes", "heads")
FORMS = ("bool", "-inf", "lowest", "bias")


@st.composite
def masks(draw, shape: Heads, query_len: int, kv_len: int, dtype: torch.dtype) -> Mask:
    """Draw masks of every form; each query sees at least one key. Needs query_len <= kv_len."""
    pattern, form = draw(st.sampled_from(PATTERNS)), draw(st.sampled_from(FORMS))
    seen = _pattern(draw, pattern, shape, query_len, kv_len)
    full = seen.expand(shape.batch, shape.query_heads, query_len, kv_len)
    bias = torch.zeros(full.shape, dtype=torch.float64)
    if pattern == "none" and form != "bias":
        return Mask(None, full, bias)
    if form == "bool":
        tensor = seen
    else:
        added = torch.zeros(seen.shape)
        if form == "bias":
            many = draw(st.sampled_from([1, shape.query_heads]))
            size = draw(st.sampled_from([0.5, 10.0, 1e3]))
            added = size * random(draw(seeds), 1, many, query_len, kv_len)
        added = added.to(dtype)
        bias = bias + added.double()
        hidden = torch.finfo(dtype).min if form == "lowest" else -torch.inf
        tensor = torch.where(seen, added, torch.tensor(hidden, dtype=dtype))
    if tensor.shape[:2] == (1, 1) and draw(st.booleans()):
        tensor = tensor[0, 0]
    return Mask(tensor, full, bias.masked_fill(~full, -torch.inf))


def _pattern(draw, pattern: str, shape: Heads, query_len: int, kv_len: int) -> Tensor:
    """Return what is visible, bool, broadcastable to [B, Hq, Tq, L]."""
    slot = torch.arange(kv_len)
    at = torch.arange(kv_len - query_len, kv_len)[:, None]
    causal = slot <= at
    if pattern == "none":
        return torch.ones(1, 1, query_len, kv_len, dtype=torch.bool)
    if pattern == "causal":
        return causal[None, None]
    if pattern == "window":
        return (causal & (slot > at - draw(st.integers(1, kv_len))))[None, None]
    if pattern == "left pad":
        pad = draw(_per_row(shape.batch, 0, kv_len - query_len))
        return causal & (slot >= pad[:, None, None, None])
    if pattern == "right pad":
        length = draw(_per_row(shape.batch, 1, kv_len))
        return (slot < length[:, None, None, None]).expand(-1, 1, query_len, -1)
    many = shape.query_heads if pattern == "heads" else 1
    share = draw(st.sampled_from([-1.5, 0.0, 1.5]))
    holes = random(draw(seeds), shape.batch, many, query_len, kv_len) > share
    return (holes | (slot == at)) & causal


def _per_row(batch: int, least: int, most: int) -> st.SearchStrategy[Tensor]:
    return st.lists(st.integers(least, most), min_size=batch, max_size=batch).map(torch.tensor)


def lengths(batch: int, most: int, least: int = 0) -> st.SearchStrategy[Tensor]:
    """Draw lengths, int64 [B]."""
    return _per_row(batch, least, most)


@st.composite
def histories(draw, batch: int, longest: int = 160) -> list[tuple[str, Tensor]]:
    """Draw steps in the life of a cache's rows: ("grow" | "rewind" | "restart", int64 [B]).

    The numbers are new tokens, tokens taken back, and a first token or -1 for rows left alone.
    """
    steps = [("grow", draw(lengths(batch, longest)))]
    few = lengths(batch, 12)
    step = st.one_of(
        st.tuples(st.just("grow"), few),
        st.tuples(st.just("grow"), lengths(batch, 70)),
        st.tuples(st.just("rewind"), few),
        st.tuples(st.just("rewind"), lengths(batch, longest)),
        st.tuples(st.just("restart"), lengths(batch, 20, least=-1)),
    )
    return [*steps, *draw(st.lists(step, max_size=6))]


class GrownCache:
    """A key cache and its index, taken through a history."""

    def __init__(self, shape: Heads, config: IndexConfig, kind: str, dtype: torch.dtype) -> None:
        self.shape, self.config, self.kind, self.dtype = shape, config, kind, dtype
        self.index = shape.index(config)
        self.key = shape.keys(kind, 0, 1, dtype)[:, :, :0]
        self.end = torch.zeros(shape.batch, dtype=torch.int64)

    def apply(self, step: str, numbers: Tensor, seed: int) -> None:
        """Change the keys, then let the index follow."""
        if step == "grow":
            self._write(numbers, seed)
            self.index.extend(self.key, self.end)
            self.index.complete(self.key)
        elif step == "rewind":
            self.end = (self.end - numbers).clamp(min=0)
            self.index.truncate(self.end)
        else:
            first = torch.minimum(numbers, self.end)
            self.index.restart(numbers >= 0, first.clamp(min=0))
            self.index.extend(self.key, self.end)
            self.index.complete(self.key)

    def _write(self, count: Tensor, seed: int) -> None:
        total = int((self.end + count).max())
        if total > self.key.shape[2]:
            # What lies beyond a row's end is whatever was in the buffer.
            garbage = torch.full((*self.key.shape[:2], total, self.key.shape[3]), torch.nan)
            garbage = garbage.to(self.dtype)
            garbage[:, :, : self.key.shape[2]] = self.key
            self.key = garbage
        if total:
            fresh = self.shape.keys(self.kind, seed, total, self.dtype)
            slot = torch.arange(self.key.shape[2])
            new = (slot >= self.end[:, None]) & (slot < (self.end + count)[:, None])
            fresh = torch.nn.functional.pad(fresh, (0, 0, 0, self.key.shape[2] - total))
            self.key = torch.where(new[:, None, :, None], fresh, self.key)
        self.end = self.end + count


@st.composite
def grown_caches(draw, **fixed) -> GrownCache:
    """Draw a cache with no tokens yet, of any shape, distribution and dtype."""
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    return GrownCache(draw(heads), draw(configs(**fixed)), kind, dtype)


def row_chunks(index: KVIndex, row: int) -> list[tuple[int, int]]:
    """(start, length) of each chunk of a row, its tail the last."""
    starts, lengths_ = index.partition()
    pairs = zip(starts[row].tolist(), lengths_[row].tolist(), strict=True)
    return [pair for pair in pairs if pair[1] > 0]


def greedy_chunks(strength: list[int], first: int, end: int, chunk: tuple[int, int]):
    """Return the chunks so far by the definition, [(start, length)], and where the tail starts."""
    chunks = []
    while first + chunk[1] < end:
        sizes = range(chunk[0], chunk[1] + 1)
        size = max(sizes, key=lambda size: (strength[first + size - 1], size))
        chunks.append((first, size))
        first += size
    return chunks, first
