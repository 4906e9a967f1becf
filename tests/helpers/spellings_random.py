"""Spellings of attention composed at random: one choice for each part of it.

Scores are [b, h, t, l], or [b, h, g, t, l] where the g query heads of a KV head are kept together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Given = dict[str, Tensor]
WINDOW, PREFIX = 7, 5


@dataclass(frozen=True)
class Sizes:
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    value_head_dim: int
    query_len: int
    kv_len: int

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def packing(self) -> list[int]:
        """Features of queries, keys and values where they lie side by side."""
        widths = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        return [*widths, self.kv_heads * self.value_head_dim]


@dataclass(frozen=True)
class Recipe:
    """A choice for each part, by its name in the tables below."""

    sizes: Sizes
    dtype: torch.dtype
    layout: str
    heads: str
    place: str
    scale: float
    product: str
    change: str
    visible: str
    hide: str
    sink: str
    softmax: str
    weigh: str
    output: str


# How the query heads of a group meet their KV head: query, key and value as they are multiplied.


def _expanded(x: Tensor, group: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, group, t, d).reshape(b, h * group, t, d)


HEADS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "repeat_interleave": lambda x, h, g: x if x.shape[1] == h * g else x.repeat_interleave(g, 1),
    "expand": lambda x, h, g: x if x.shape[1] == h * g else _expanded(x, g),
    "grouped": lambda x, h, g: x.unflatten(1, (h, -1)),
    "rows": lambda x, h, g: x.reshape(x.shape[0], h, -1, x.shape[-1]),
}
GROUPED = ("grouped", "rows")


# The product of queries and keys, and that of weights and values.


def _folded(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(_folded(left), _folded(right)).view(*left.shape[:-1], right.shape[-1])


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.transpose(-1, -2),
    "einsum": lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
    "keys first": lambda q, k: (k @ q.mT).mT,
    "multiply and sum": lambda q, k: (q[..., :, None, :] * k[..., None, :, :]).sum(-1),
    "bmm": lambda q, k: _bmm(q, k.transpose(-1, -2)),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.zeros(1, 1, 1, dtype=q.dtype), _folded(q), _folded(k).mT
    ).view(*q.shape[:-1], -1),
}
WEIGHINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": torch.matmul,
    "einsum": lambda w, v: torch.einsum("...qk,...kd->...qd", w, v),
    "transposed": lambda w, v: (v.mT @ w.mT).mT,
    "multiply and sum": lambda w, v: (w[..., None] * v[..., None, :, :]).sum(-2),
    "bmm": _bmm,
}
FOLDING = ("bmm", "baddbmm")


# Where the scale stands: query, key and scores.


def _on_queries(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q * scale, k


def _on_keys(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q, k * scale


def _on_both(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return q * math.sqrt(scale), k * math.sqrt(scale)


ON_OPERANDS = {"queries": _on_queries, "keys": _on_keys, "both": _on_both}
ON_SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scores": lambda scores, scale: scores * scale,
    "division": lambda scores, scale: scores / (1 / scale),
    "in place": lambda scores, scale: scores.clone().mul_(scale),
    "tensor": lambda scores, scale: scores * torch.tensor(scale, dtype=scores.dtype),
}


# What is done to scores besides; `fit` gives a [.., h or 1, t, l] tensor the axes of the scores.

Fit = Callable[[Tensor], Tensor]


def _distance(given: Given, kv_len: int) -> Tensor:
    return given["positions"][:, None] - torch.arange(kv_len)


def _soft_cap(scores: Tensor, given: Given, fit: Fit) -> Tensor:
    return 5.0 * torch.tanh(scores / 5.0)


def _alibi(scores: Tensor, given: Given, fit: Fit) -> Tensor:
    bias = -given["slopes"][:, None, None] * _distance(given, scores.shape[-1]).abs()
    return scores + fit(bias[None].to(scores.dtype))


def _table(scores: Tensor, given: Given, fit: Fit) -> Tensor:
    bias = F.embedding(_distance(given, scores.shape[-1]).clamp(0, 7), given["table"])
    return scores + fit(bias.permute(2, 0, 1).unsqueeze(0).to(scores.dtype))


def _temperature(scores: Tensor, given: Given, fit: Fit) -> Tensor:
    return scores * fit(given["temperature"].view(1, -1, 1, 1)).to(scores.dtype)


def _cap_then_alibi(scores: Tensor, given: Given, fit: Fit) -> Tensor:
    return _alibi(_soft_cap(scores, given, fit), given, fit)


CHANGES: dict[str, Callable[[Tensor, Given, Fit], Tensor]] = {
    "nothing": lambda scores, given, fit: scores,
    "soft-cap": _soft_cap,
    "alibi": _alibi,
    "table": _table,
    "temperature": _temperature,
    "soft-cap and alibi": _cap_then_alibi,
}


# Which keys are visible, bool [b or 1, 1, t, l], and how the others are hidden.


def _causal(given: Given, kv_len: int) -> Tensor:
    return (torch.arange(kv_len) <= given["positions"][:, None])[None, None]


def _same_document(given: Given, kv_len: int) -> Tensor:
    documents = given["documents"]
    return (documents[:, given["positions"], None] == documents[:, None])[:, None]


VISIBLE: dict[str, Callable[[Given, int], Tensor]] = {
    "causal": _causal,
    "window": lambda given, kv_len: _causal(given, kv_len) & (_distance(given, kv_len) < WINDOW),
    "padding": lambda given, kv_len: (
        _causal(given, kv_len) & given["padding"][:, None, None].bool()
    ),
    "document": lambda given, kv_len: _causal(given, kv_len) & _same_document(given, kv_len),
    "prefix": lambda given, kv_len: _causal(given, kv_len) | (torch.arange(kv_len) < PREFIX),
}


def _lowest(scores: Tensor) -> float:
    return torch.finfo(scores.dtype).min


HIDES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "infinity filled": lambda scores, seen: scores.masked_fill(~seen, -math.inf),
    "lowest filled": lambda scores, seen: scores.masked_fill(seen == 0, _lowest(scores)),
    "filled in place": lambda scores, seen: scores.clone().masked_fill_(~seen, -1e4),
    "where": lambda scores, seen: torch.where(seen, scores, -math.inf),
    "lowest added": lambda scores, seen: (
        scores + torch.zeros(seen.shape, dtype=scores.dtype).masked_fill(~seen, _lowest(scores))
    ),
    "infinity added": lambda scores, seen: (
        torch.where(seen, 0.0, -math.inf).to(scores.dtype) + scores
    ),
    "one minus mask": lambda scores, seen: (
        scores + (1.0 - seen.to(scores.dtype)) * torch.finfo(scores.dtype).min
    ),
    "logarithm": lambda scores, seen: scores + seen.to(scores.dtype).log(),
}


# The softmax; `weigh` multiplies weights with values.

Weigh = Callable[[Tensor], Tensor]


def _exponentials(scores: Tensor) -> Tensor:
    return torch.exp(scores - scores.amax(-1, keepdim=True))


def _written_out(scores: Tensor, weigh: Weigh) -> Tensor:
    weights = _exponentials(scores)
    return weigh(weights / weights.sum(-1, keepdim=True))


def _base_two(scores: Tensor, weigh: Weigh) -> Tensor:
    scores = scores * math.log2(math.e)
    weights = torch.exp2(scores - scores.max(-1, keepdim=True).values)
    return weigh(weights / weights.sum(-1, keepdim=True))


def _deferred(scores: Tensor, weigh: Weigh) -> Tensor:
    weights = _exponentials(scores)
    return weigh(weights) / weights.sum(-1, keepdim=True)


SOFTMAXES: dict[str, Callable[[Tensor, Weigh], Tensor]] = {
    "fused": lambda scores, weigh: weigh(scores.softmax(-1)),
    "upcast": lambda scores, weigh: weigh(
        F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    ),
    "written out": _written_out,
    "logsumexp": lambda scores, weigh: weigh((scores - scores.logsumexp(-1, True)).exp()),
    "log_softmax": lambda scores, weigh: weigh(F.log_softmax(scores, -1).exp()),
    "base two": _base_two,
    "deferred": _deferred,
    "with dropout": lambda scores, weigh: weigh(F.dropout(scores.softmax(-1), 0.1, False)),
}
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "b h t d": lambda out: out,
    "b t h d": lambda out: out.transpose(1, 2),
    "b t (h d)": lambda out: out.transpose(1, 2).flatten(2),
}


def attend(recipe: Recipe, query: Tensor, key: Tensor, value: Tensor, given: Given) -> Tensor:
    """Attention as the recipe has it, of operands laid out as it says."""
    sizes = recipe.sizes
    grouped = recipe.heads in GROUPED

    def fit(x: Tensor) -> Tensor:
        if not grouped:
            return x
        alike = x.shape[1] != sizes.query_heads
        return x.unsqueeze(2) if alike else x.unflatten(1, (sizes.kv_heads, -1))

    if recipe.layout == "b t h d":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key, value = (
        HEADS[recipe.heads](x, sizes.kv_heads, sizes.group) for x in (query, key, value)
    )
    scores = CHANGES[recipe.change](_scaled_product(recipe, query, key), given, fit)
    scores = HIDES[recipe.hide](scores, fit(VISIBLE[recipe.visible](given, sizes.kv_len)))
    if recipe.sink != "none":
        sink = fit(given["sinks"].view(1, -1, 1, 1)).to(scores.dtype)
        parts = (scores, sink.expand(*scores.shape[:-1], 1))
        scores = torch.cat(parts if recipe.sink == "last" else parts[::-1], dim=-1)
    out = SOFTMAXES[recipe.softmax](scores, _weigh_by(recipe, value))
    return OUTPUTS[recipe.output](out.flatten(1, 2) if grouped else out)


def _scaled_product(recipe: Recipe, query: Tensor, key: Tensor) -> Tensor:
    if recipe.place in ON_OPERANDS:
        query, key = ON_OPERANDS[recipe.place](query, key, recipe.scale)
    scores = PRODUCTS[recipe.product](query, key)
    if recipe.place in ON_SCORES:
        scores = ON_SCORES[recipe.place](scores, recipe.scale)
    return scores.unflatten(2, (recipe.sizes.group, -1)) if recipe.heads == "rows" else scores


def _weigh_by(recipe: Recipe, value: Tensor) -> Weigh:
    keys = {"none": slice(None), "first": slice(1, None), "last": slice(-1)}[recipe.sink]
    multiply = WEIGHINGS[recipe.weigh]
    if recipe.heads != "rows":
        return lambda weights: multiply(weights[..., keys], value)
    group = recipe.sizes.group
    return lambda weights: multiply(weights[..., keys].flatten(2, 3), value).unflatten(
        2, (group, -1)
    )


def plainly(recipe: Recipe) -> Recipe:
    """Return a recipe of the same attention in the plainest operators."""
    return replace(
        recipe,
        heads="expand",
        place="scores",
        scale=1.0 if recipe.place == "nowhere" else recipe.scale,
        product="matmul",
        hide="infinity filled",
        softmax="fused",
        weigh="matmul",
    )


sizes = st.builds(
    Sizes,
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 3, 8, 16, 33]),
    value_head_dim=st.sampled_from([3, 8, 16]),
    query_len=st.integers(1, 3),
    kv_len=st.sampled_from([33, 40]),
)


@st.composite
def recipes(draw: st.DrawFn, heads: str) -> Recipe:
    """Any combination of parts, but for those that do not go together."""
    shape = draw(sizes)
    unfolded = heads == "grouped" and shape.group > 1  # keys would have to be expanded

    def one_of(table: dict[str, object]) -> str:
        return draw(
            st.sampled_from([each for each in table if not unfolded or each not in FOLDING])
        )

    return Recipe(
        sizes=shape,
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        layout=draw(st.sampled_from(["b h t d", "b t h d"])),
        heads=heads,
        place=draw(st.sampled_from([*ON_OPERANDS, *ON_SCORES, "nowhere"])),
        scale=draw(st.sampled_from([shape.head_dim**-0.5, 0.3])),
        product=one_of(PRODUCTS),
        change=one_of(CHANGES),
        visible=one_of(VISIBLE),
        hide=one_of(HIDES),
        sink=draw(st.sampled_from(["none", "none", "none", "first", "last"])),
        softmax=one_of(SOFTMAXES),
        weigh=one_of(WEIGHINGS),
        output=one_of(OUTPUTS),
    )
